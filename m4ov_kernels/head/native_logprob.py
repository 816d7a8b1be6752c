"""``linear_logprob`` through the compiled kernels (CPU): logits in float32, a tile at a time, never in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.head import state as states
from m4ov_kernels.head.rows import Rows, computed_rows
from m4ov_kernels.head.targets import ARGUMENTS
from m4ov_kernels.layout import DTYPES, output, scratch

# What the backward may take: the hidden states twice and the fp32 sums of their gradient; and of a chunk of the
# vocabulary the logits' gradient twice and its rows of the weight. No chunk is less than a unit of the vocabulary.
SCRATCH_BYTES = 14 << 20


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
    """``(logprob, logsumexp, entropy, total, top_logprobs, top_indices, normalizer, kept)``, 0 in ignored rows."""
    count = targets.shape[0]
    rows = computed_rows(caller, ARGUMENTS[caller], hidden_states, targets, vocab_size, ignore_index, num_valid, True)
    tokens = rows.target.shape[0]
    state = torch.zeros(states.STATES, tokens, dtype=torch.float32)
    top_values = torch.empty(tokens, top_k, dtype=torch.float32)
    top_indices = torch.empty(tokens, top_k, dtype=torch.int64)
    kept = states.room_for_logits(hidden_states, weight, num_valid, rounded, softcap, keep_logits_bytes)
    if tokens:
        arguments, alive = _arguments(
            rows.input, weight, bias, rows.target, class_weight, temperature, softcap, rounded, first, kept
        )
        tops = (top_k, top_values.data_ptr(), top_indices.data_ptr())
        run(_C.linear_logprob_fwd, arguments, state.data_ptr(), want_entropy, want_total, *tops)
        del alive
    if kept.numel():
        used = _kept_rows(tokens, weight.shape[0], kept) * -(-tokens // _C.HEAD_TOKENS) * _C.HEAD_TOKENS
        kept[used:].zero_()  # room that nothing reads; no output is handed on unwritten
    here = None if weight.shape[0] == vocab_size else rows.within(first, weight.shape[0])
    results = states.finish(state, here, want_entropy, want_total)
    if top_k:
        top_values = (top_values - results.normalizer[0, :, None]) - results.normalizer[1, :, None]
    made = (
        rows.put(results.logprob, count),
        rows.put(results.logsumexp, count),
        rows.put(results.entropy, count) if want_entropy else results.entropy,
        rows.put(results.total, count) if want_total else results.total,
        _put_columns(rows, top_values, count),
        _put_columns(rows, top_indices, count),
        rows.put(results.normalizer, count),
        kept,
    )
    if out is not None:
        for given, tensor in zip(out, made, strict=True):
            output(given, tensor.shape, tensor, tensor.dtype).copy_(tensor)
        return out
    return made


def linear_logits(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logits [V, T and more columns], largest [T], log_sum [T])``, float32: what the forward computes on its way,
    and the log of the sum of ``exp(logits - largest)``, infinite where a logit is. Columns beyond T are 0."""
    tokens, vocab_size = hidden_states.shape[0], weight.shape[0]
    kept = torch.empty(vocab_size, -(-tokens // states.TOKENS) * states.TOKENS, dtype=torch.float32)
    state = torch.empty(states.STATES, tokens, dtype=torch.float32)
    if tokens:
        target = torch.zeros(tokens, dtype=torch.int64)
        options = (temperature, 0.0, False, 0, kept)
        arguments, alive = _arguments(hidden_states, weight, bias, target, None, *options)
        run(_C.linear_logprob_fwd, arguments, state.data_ptr(), False, False, 0, 0, 0)
        del alive
    return kept, state[0], state[1].log()


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
    """``(grad_hidden_states, grad_weight, grad_bias)``; an empty tensor for each that is not needed."""
    needed = (need_hidden, need_weight, need_bias and bias is not None)
    shapes = (hidden_states.shape, weight.shape, weight.shape[:1])
    grad_hidden, grad_weight, grad_bias = (
        output(out and out[i], shapes[i] if needed[i] else (0,), hidden_states, hidden_states.dtype) for i in range(3)
    )
    rows = computed_rows("linear_logprob", "targets", hidden_states, targets, vocab_size, ignore_index, num_valid, True)
    tokens = rows.target.shape[0]
    if not any(needed) or tokens == 0:
        for gradient in (grad_hidden, grad_weight, grad_bias):
            gradient.zero_()
        return grad_hidden, grad_weight, grad_bias
    grads = (grad_logprob, grad_logsumexp, grad_entropy, grad_total)
    here = None if weight.shape[0] == vocab_size else rows.within(first, weight.shape[0])
    coefficients = states.coefficients(rows, grads, normalizer, entropy, here, temperature)
    row_grad = torch.empty_like(rows.input) if need_hidden and rows.index is not None else grad_hidden
    arguments, alive = _arguments(
        rows.input, weight, bias, rows.target, class_weight, temperature, softcap, rounded, first, kept
    )
    addresses = [x.data_ptr() if n else 0 for x, n in zip((row_grad, grad_weight, grad_bias), needed, strict=True)]
    run(_C.linear_logprob_bwd, arguments, coefficients.data_ptr(), *addresses, backward_columns(tokens, weight))
    del alive
    if need_hidden:
        rows.put_rows(grad_hidden, row_grad)
    return grad_hidden, grad_weight, grad_bias


def backward_columns(tokens: int, weight: Tensor) -> int:
    """Of a chunk: whole units, as many as fit; no bit of a result depends on how many."""
    unit, size, width = _C.HEAD_COLUMNS, weight.element_size(), weight.shape[1]
    left = SCRATCH_BYTES - tokens * width * (2 * size + 4)
    return unit * max(1, min(-(-weight.shape[0] // unit), left // (size * unit * (2 * tokens + width))))


def _kept_rows(tokens: int, vocab_size: int, kept: Tensor) -> int:
    """Of the weight: as many whole tiles as there is room for the logits of."""
    rows = kept.numel() // max(1, -(-tokens // _C.HEAD_TOKENS) * _C.HEAD_TOKENS)
    return vocab_size if rows >= vocab_size else rows // _C.HEAD_TILE * _C.HEAD_TILE


def _put_columns(rows: Rows, values: Tensor, count: int) -> Tensor:
    """``[rows, k]`` as ``[count, k]``."""
    if rows.index is None:
        return values
    return rows.put(values.t(), count).t().contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _arguments(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    temperature: float,
    softcap: float,
    rounded: bool,
    first: int,
    kept: Tensor,
) -> tuple[list[Any], tuple[Tensor | None, ...]]:
    """What both kernels take, and the tensors that must outlive the call."""
    hidden, weight, target = _dense(hidden), _dense(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    class_weight = None if class_weight is None else class_weight.to(torch.float32).contiguous()
    tensors = (hidden, weight, bias, target, class_weight, kept)
    inputs = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    strides = (hidden.stride(0), weight.stride(0))
    sizes = (target.shape[0], *weight.shape, *strides, first, _kept_rows(target.shape[0], weight.shape[0], kept))
    dtype = DTYPES[hidden.dtype]
    return [[*inputs, 0], sizes, temperature, softcap, rounded, dtype, torch.get_num_threads()], tensors


def run(kernel: Any, arguments: list[Any], *others: Any) -> None:
    size = kernel(*arguments, *others)  # without scratch memory it only says how much it needs
    _memory, arguments[0][-1] = scratch(size)
    kernel(*arguments, *others)
