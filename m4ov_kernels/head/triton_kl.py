"""``linear_kl`` in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors).

As ``triton_logprob.py``: one persistent forward kernel and a small one that merges its splits of the vocabulary (twice
for the symmetric divergence, whose sum takes both normalisers); backward by chunks of the vocabulary, whose logits'
gradient the vendor's library multiplies into the weight's, written once, and the hidden states', summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels.head import kl_state as states
from m4ov_kernels.head.rows import Rows
from m4ov_kernels.head.triton_kl_builds import KERNELS
from m4ov_kernels.head.triton_kl_launches import Call, Head
from m4ov_kernels.head.triton_logprob import _add_product
from m4ov_kernels.head.triton_logprob_launches import columns_of_a_chunk
from m4ov_kernels.layout import output

__all__ = ["KERNELS", "linear_kl_bwd", "linear_kl_fwd"]


def linear_kl_fwd(
    hidden_states: Tensor,
    weight: Tensor,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    temperature: float,
    num_valid: int | None,
    rounded: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(divergence, normalizer)``, 0 in rows that do not count, NaN in those that did not fit in ``num_valid``; the
    normalizer is ``kl_state.finish``'s."""
    count = hidden_states.shape[0]
    rows = _rows(hidden_states, mask, num_valid)
    policy = Head(rows.input, weight, bias)
    reference = Head(states.of_rows(rows, ref_hidden_states), ref_weight, ref_bias)
    call = Call(rows, policy, reference, temperature, rounded)
    first, second = (reference, policy) if states.reference_first(kind) else (policy, reference)
    state = call.state(first, second, None)
    made = states.finish(kind, state, lambda normalizer: call.state(policy, reference, normalizer))
    divergence, normalizer = (rows.put(values.masked_fill(rows.target < 0, 0), count) for values in made)
    if out is not None:
        for given, tensor in zip(out, (divergence, normalizer), strict=True):
            output(given, tensor.shape, tensor, tensor.dtype).copy_(tensor)
        return out
    return divergence, normalizer


def linear_kl_bwd(
    grad: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    normalizer: Tensor,
    kind: str,
    temperature: float,
    num_valid: int | None,
    rounded: bool,
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
    rows = _rows(hidden_states, mask, num_valid)
    tokens = rows.target.shape[0]
    if not any(needed) or tokens == 0:
        for gradient in (grad_hidden, grad_weight, grad_bias):
            gradient.zero_()
        return grad_hidden, grad_weight, grad_bias
    vocab = weight.shape[0]
    coefficients = states.coefficients(rows, kind, grad, normalizer, temperature)
    # A NaN of a row that does not count must not meet its gradient of 0.
    ignored = (rows.target < 0)[:, None]
    rows = rows._replace(input=torch.where(ignored, 0.0, rows.input))
    reference = torch.where(ignored, 0.0, states.of_rows(rows, ref_hidden_states))
    heads = Head(rows.input, weight, bias), Head(reference, ref_weight, ref_bias)
    call = Call(rows, *heads, temperature, rounded)
    columns = columns_of_a_chunk(tokens * weight.element_size(), vocab)
    buffer = call.room(columns)
    row_grad = torch.empty_like(rows.input, memory_format=torch.contiguous_format) if need_hidden else grad_hidden
    sums = row_grad if columns >= vocab or not need_hidden else torch.empty_like(row_grad, dtype=torch.float32)
    for begin in range(0, vocab, columns):
        end = min(begin + columns, vocab)
        gradient = buffer[:tokens, : end - begin]
        parts = call.chunk(buffer, begin, end, coefficients, kind, needed[2])
        if need_weight:
            torch.mm(gradient.t(), rows.input, out=grad_weight[begin:end])
        if needed[2]:
            grad_bias[begin:end] = parts[:, : end - begin].sum(0)
        if need_hidden:
            _add_product(sums, gradient, weight[begin:end], begin == 0)
    if need_hidden:
        sums.masked_fill_(ignored, 0.0)  # of an infinite weight 0 · inf stands there
        rows.put_rows(grad_hidden, sums if sums is row_grad else row_grad.copy_(sums))
    return grad_hidden, grad_weight, grad_bias


def _rows(hidden_states: Tensor, mask: Tensor | None, num_valid: int | None) -> Rows:
    """Rows that do not count last, where there may be any. The order of all others is theirs."""
    count = hidden_states.shape[0]
    some = num_valid if num_valid is not None and num_valid < count else None
    rows = states.rows_of(hidden_states, mask, some, False)
    if mask is None or num_valid is not None or count == 0:
        return rows
    order = torch.argsort((rows.target < 0).to(torch.uint8), stable=True)
    return Rows(rows.input.index_select(0, order), rows.target.index_select(0, order), order, None)
