"""``linear_kl`` by the compiled kernels (CPU): both heads' logits in float32, a tile at a time, never in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.head import kl_state as states
from m4ov_kernels.head import native_logprob
from m4ov_kernels.layout import output

_Head = tuple[Tensor, Tensor, Tensor | None]


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
    """``(divergence, normalizer)``, 0 in rows that do not count; the normalizer is ``kl_state.finish``'s."""
    count = hidden_states.shape[0]
    rows = states.rows_of(hidden_states, mask, num_valid, True)
    heads = [(rows.input, weight, bias), (states.of_rows(rows, ref_hidden_states), ref_weight, ref_bias)]

    def run(heads: list[_Head], normalizer: Tensor | None, sums: int) -> Tensor:
        found = torch.zeros(sums, rows.target.shape[0], dtype=torch.float32)
        if found.numel():
            arguments, others, alive = _arguments(heads, rows.target, temperature, rounded)
            given = 0 if normalizer is None else normalizer.data_ptr()
            native_logprob.run(_C.linear_kl_fwd, arguments, *others, given, found.data_ptr())
            del alive
        return found

    state = run(heads[::-1] if states.reference_first(kind) else heads, None, states.STATES)
    made = states.finish(kind, state, lambda normalizer: run(heads, normalizer, states.JSD_STATES))
    divergence, normalizer = (rows.put(values, count) for values in made)
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
    """``(grad_hidden_states, grad_weight, grad_bias)``; an empty tensor for each that is not needed."""
    needed = (need_hidden, need_weight, need_bias and bias is not None)
    shapes = (hidden_states.shape, weight.shape, weight.shape[:1])
    grad_hidden, grad_weight, grad_bias = (
        output(out and out[i], shapes[i] if needed[i] else (0,), hidden_states, hidden_states.dtype) for i in range(3)
    )
    rows = states.rows_of(hidden_states, mask, num_valid, True)
    tokens = rows.target.shape[0]
    if not any(needed) or tokens == 0:
        for gradient in (grad_hidden, grad_weight, grad_bias):
            gradient.zero_()
        return grad_hidden, grad_weight, grad_bias
    coefficients = states.coefficients(rows, kind, grad, normalizer, temperature)
    row_grad = torch.empty_like(rows.input) if need_hidden and rows.index is not None else grad_hidden
    heads = [(rows.input, weight, bias), (states.of_rows(rows, ref_hidden_states), ref_weight, ref_bias)]
    arguments, others, alive = _arguments(heads, rows.target, temperature, rounded)
    addresses = [x.data_ptr() if n else 0 for x, n in zip((row_grad, grad_weight, grad_bias), needed, strict=True)]
    more = (
        states.KINDS.index(kind),
        coefficients.data_ptr(),
        *addresses,
        native_logprob.backward_columns(tokens, weight),
    )
    native_logprob.run(_C.linear_kl_bwd, arguments, *others, *more)
    del alive
    if need_hidden:
        rows.put_rows(grad_hidden, row_grad)
    return grad_hidden, grad_weight, grad_bias


def _arguments(heads: list[_Head], target: Tensor, temperature: float, rounded: bool) -> tuple[list[Any], Any, Any]:
    """All that the kernels take of the first head; addresses and sizes of the second; what must outlive the call."""
    nothing = heads[0][0].new_empty(0)  # no logits are kept
    (first, alive), (second, more_alive) = (
        native_logprob._arguments(hidden, weight, bias, target, None, temperature, 0.0, rounded, 0, nothing)
        for hidden, weight, bias in heads
    )
    return first, second[:2], (alive, more_alive)
