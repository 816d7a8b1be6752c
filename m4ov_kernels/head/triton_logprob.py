"""``linear_logprob`` in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors): launches and declarations.

The forward is one persistent kernel (``triton_logprob_kernels.py``) and a small one that merges its splits of the
vocabulary. The backward makes a chunk's logits again and writes their gradient, and takes two products of it by the
vendor's library: the chunk's rows of the weight's gradient, written once, and a contribution to that of the hidden
states, summed in float32. The likeliest words take a pass of their own, by chunks of logits.

Where the host does not know how many rows count, they are sorted to the front, and the kernels read on the device where
to stop; the library's products take all rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m4ov_kernels.head import state as states
from m4ov_kernels.head.rows import Rows, computed_rows, report_bad_targets
from m4ov_kernels.head.triton_logprob_builds import KERNELS
from m4ov_kernels.head.triton_logprob_launches import Call, columns_of_a_chunk
from m4ov_kernels.layout import output

__all__ = ["KERNELS", "linear_logprob_bwd", "linear_logprob_fwd"]
_OP = "linear_logprob"


def linear_logprob_fwd(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    num_valid: int | None,
    rounded: bool,
    want_entropy: bool,
    want_total: bool,
    top_k: int,
    first: int,
    vocab_size: int,
    keep_logits_bytes: int,
    caller: str = "linear_logprob",
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """``(logprob, logsumexp, entropy, total, top_logprobs, top_indices, normalizer, kept)``, 0 in ignored rows, NaN
    where a target is out of range or did not fit in ``num_valid``. No logits are kept: ``kept`` is zeros."""
    count, vocab = targets.shape[0], weight.shape[0]
    report_bad_targets(caller, targets, vocab_size, ignore_index)
    rows = _computed_rows(hidden_states, targets, vocab_size, ignore_index, num_valid)
    tokens = rows.target.shape[0]
    state = torch.zeros(states.STATES, tokens, dtype=torch.float32, device=weight.device)
    call = Call(rows, weight, bias, class_weight, temperature, softcap, rounded, first)
    if tokens:
        call.forward(state, want_entropy, want_total)
    results = states.finish(state, rows.within(first, vocab), want_entropy, want_total)
    top_values, top_indices = call.likeliest(top_k)
    top_logprobs = (top_values - results.normalizer[0, :, None]) - results.normalizer[1, :, None]
    ignored, bad = rows.target < 0, rows.target == vocab_size

    def placed(values: Tensor) -> Tensor:
        """``[..., rows]`` of all rows."""
        values = values.masked_fill(ignored, 0)
        return rows.put(values.masked_fill_(bad, math.nan) if values.is_floating_point() else values, count)

    made = (
        placed(results.logprob),
        placed(results.logsumexp),
        placed(results.entropy) if want_entropy else results.entropy,
        placed(results.total) if want_total else results.total,
        placed(top_logprobs.t()).t().contiguous(),
        _placed_indices(rows, top_indices.t().masked_fill(ignored, 0), count),
        placed(results.normalizer),
        states.room_for_logits(hidden_states, weight, num_valid, rounded, softcap, keep_logits_bytes).zero_(),
    )
    if out is not None:
        for given, tensor in zip(out, made, strict=True):
            output(given, tensor.shape, tensor, tensor.dtype).copy_(tensor)
        return out
    return made


def linear_logprob_bwd(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor,
    entropy: Tensor,
    kept: Tensor,
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_total: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    num_valid: int | None,
    rounded: bool,
    first: int,
    vocab_size: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_hidden_states, grad_weight, grad_bias)``; an empty tensor for each that is not needed. Takes, beside
    them, ``GPU_CHUNK_BYTES`` (``triton_logprob_launches.py``) and, where there is more than one chunk, the hidden
    states' gradient in float32."""
    needed = (need_hidden, need_weight, need_bias and bias is not None)
    shapes = (hidden_states.shape, weight.shape, weight.shape[:1])
    grad_hidden, grad_weight, grad_bias = (
        output(out and out[i], shapes[i] if needed[i] else (0,), hidden_states, hidden_states.dtype) for i in range(3)
    )
    rows = _computed_rows(hidden_states, targets, vocab_size, ignore_index, num_valid)
    tokens = rows.target.shape[0]
    if not any(needed) or tokens == 0:
        for gradient in (grad_hidden, grad_weight, grad_bias):
            gradient.zero_()
        return grad_hidden, grad_weight, grad_bias
    vocab, dtype = weight.shape[0], hidden_states.dtype
    grads = (grad_logprob, grad_logsumexp, grad_entropy, grad_total)
    here = rows.within(first, vocab)
    coefficients = states.coefficients(rows, grads, normalizer, entropy, here, temperature)
    # A NaN of an ignored row must not meet its gradient of 0.
    rows = rows._replace(input=torch.where((rows.target < 0)[:, None], 0.0, rows.input))
    call = Call(rows, weight, bias, class_weight, temperature, softcap, rounded, first)
    general = grad_entropy is not None or grad_total is not None
    columns = columns_of_a_chunk(tokens * weight.element_size(), vocab)
    buffer = call.room(columns, dtype)
    row_grad = torch.empty_like(rows.input, memory_format=torch.contiguous_format) if need_hidden else grad_hidden
    sums = row_grad if columns >= vocab or not need_hidden else torch.empty_like(row_grad, dtype=torch.float32)
    for begin in range(0, vocab, columns):
        end = min(begin + columns, vocab)
        gradient = buffer[:tokens, : end - begin]
        parts = call.chunk(buffer, begin, end, coefficients, general, needed[2])
        if need_weight:
            torch.mm(gradient.t(), rows.input, out=grad_weight[begin:end])
        if needed[2]:
            grad_bias[begin:end] = parts[:, : end - begin].sum(0)
        if need_hidden:
            _add_product(sums, gradient, weight[begin:end], begin == 0)
    if need_hidden:
        row_grad = sums if sums is row_grad else row_grad.copy_(sums)
        row_grad.masked_fill_((rows.target < 0)[:, None], 0.0)  # not 0 · inf of an infinite weight
        rows.put_rows(grad_hidden, row_grad)
    return grad_hidden, grad_weight, grad_bias


def _add_product(sums: Tensor, left: Tensor, right: Tensor, assign: bool) -> None:
    """``sums (+)= left @ right``, in float32 where ``sums`` is."""
    if sums.dtype == left.dtype:
        if assign:
            torch.mm(left, right, out=sums)
        else:
            sums.addmm_(left, right)
    elif left.is_cuda and torch.version.hip is None:
        if assign:
            torch.mm(left, right, out_dtype=sums.dtype, out=sums)
        else:
            torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
    else:  # no float32 sums of such products there: each is rounded once
        product = torch.mm(left, right)
        sums.copy_(product) if assign else sums.add_(product)


def _computed_rows(
    hidden_states: Tensor, targets: Tensor, vocab_size: int, ignore_index: int, num_valid: int | None
) -> Rows:
    """Ignored rows last, where there may be any. The order of all others is theirs."""
    count = targets.shape[0]
    some = num_valid if num_valid is not None and num_valid < count else None
    rows = computed_rows(_OP, "targets", hidden_states, targets, vocab_size, ignore_index, some, False)
    if num_valid is not None or count == 0:
        return rows
    order = torch.argsort((rows.target < 0).to(torch.uint8), stable=True)
    return Rows(rows.input.index_select(0, order), rows.target.index_select(0, order), order, None)


def _placed_indices(rows: Rows, values: Tensor, count: int) -> Tensor:
    """int64 ``[k, rows]`` as ``[count, k]``: 0 in other rows, those that were left out too."""
    if rows.index is not None:
        values = values.new_zeros(values.shape[0], count).index_copy_(1, rows.index, values)
    return values.t().contiguous()
