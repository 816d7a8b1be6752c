"""Mixture of experts: ``route_topk``, ``permute``, ``grouped_linear``, ``unpermute``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator
from m4ov_kernels.moe import reference
from m4ov_kernels.moe.values import check_experts, check_order

__all__ = ["ExpertLoad", "grouped_linear", "permute", "route_topk", "unpermute"]

_MOST = 2**31 - 1  # rows are counted in int32


class ExpertLoad(NamedTuple):
    """How a batch of T tokens was spread over E experts: what an auxiliary loss needs.

    ``counts`` ``[E]`` int64: how many tokens chose the expert; they add up to T · top_k. ``probability`` ``[E]``
    float32 (float64 of float64 logits), differentiable: the mean over tokens of the expert's probability before the
    choice; zeros where there are no tokens. Both may be summed over layers and ranks (probabilities weighted by
    their tokens).
    """

    counts: Tensor
    probability: Tensor


def route_topk(logits: Tensor, *, top_k: int, normalize: bool = True) -> tuple[Tensor, Tensor, ExpertLoad]:
    """The ``top_k`` likeliest experts of every token, and their weights: softmax over all experts, the largest kept.

    Args:
        logits: ``[T, E]``, bfloat16, float16, float32 or float64; any strides.
        top_k: K, from 1 to E.
        normalize: whether the K weights of a token are divided by their sum.

    Returns:
        ``(weights, experts, load)``: ``[T, K]`` float32 (float64 of float64 logits), by falling weight; ``[T, K]``
        int32; an :class:`ExpertLoad`. Experts are ordered by their logits (NaN before all numbers); of equal ones the
        lower comes first. Everything is computed in float32. A token with a NaN or an infinite largest logit has
        weights of NaN, and still K different experts.

    Saves for backward: ``logits``, ``weights`` and ``experts``. The choice itself has no gradient.

    Invariance: weights and experts of a token, and its part of the gradient of ``weights``, depend on that token
    alone. ``probability`` is summed over a fixed split of the tokens: its bits do not depend on the number of threads.

    Raises:
        TypeError: ``logits`` is not a dense floating-point tensor, ``top_k`` no int, ``normalize`` no bool.
        ValueError: a shape or ``top_k`` does not fit.

    Source: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538; the load is that of Fedus et al.,
    "Switch Transformers", arXiv 2101.03961: balance loss = E · Σ counts/T · probability.
    """
    _check_route(logits, top_k, normalize)
    implementation = ROUTE_TOPK.select(logits.device, logits.dtype)
    if implementation is None:
        weights, experts, counts, probability = reference.route_topk(logits, top_k, normalize)
    else:
        weights, experts, counts, probability = ROUTE_TOPK(implementation, logits, top_k, normalize)
    return weights, experts, ExpertLoad(counts, probability)


def permute(hidden_states: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of all tokens, one for each expert they chose, ordered by expert, then by token.

    Args:
        hidden_states: ``[T, H]``, bfloat16, float16, float32 or float64; any strides.
        experts: ``[T, K]`` int32, on the same device, each in ``[0, num_experts)``; T · K below 2³¹.
        num_experts: E, at least 1.

    Returns:
        ``(rows, order, offsets)``: ``[T · K, H]``, contiguous copies, bit for bit; ``[T, K]`` int32, where the row of
        token ``t`` for its ``k``-th expert is, ``rows[order[t, k]]``; ``[E + 1]`` int32, expert ``e`` has the rows
        ``offsets[e]`` to ``offsets[e + 1]``.

    Saves for backward: ``order``. The gradient of a token is the sum of those of its rows, in float32, in the order of
    its experts, rounded once.

    Invariance: a row is a copy, and a gradient the sum over one token's rows alone.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: a shape, device or ``num_experts`` does not fit, or (CPU) an expert is out of range: names the
            first. On a GPU the rows of such an expert are nowhere, the last rows are NaN instead, and
            :func:`m4ov_kernels.check` raises the error.

    Source: Gale et al., "MegaBlocks", arXiv 2211.15841.
    """
    _check_permute(hidden_states, experts, num_experts)
    implementation = PERMUTE.select(hidden_states.device, hidden_states.dtype)
    if implementation is None:
        check_experts(experts, num_experts)
        return reference.permute(hidden_states, experts, num_experts)
    result: tuple[Tensor, Tensor, Tensor] = PERMUTE(implementation, hidden_states, experts, num_experts)
    return result


def unpermute(rows: Tensor, order: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum over the rows of each token, weighted: what undoes :func:`permute`.

    Args:
        rows: ``[T · K, H]``, bfloat16, float16, float32 or float64; any strides.
        order: ``[T, K]`` int32, on the same device: the rows of each token, every row once, as :func:`permute` gives.
        weights: ``[T, K]``, float32 (float64 for float64 rows), or ``None``: all 1.

    Returns:
        ``[T, H]``, contiguous, of the dtype of ``rows``: ``Σₖ weights[t, k] · rows[order[t, k]]``, in float32, in the
        order of ``k``, rounded once.

    Saves for backward: ``order``, with ``weights`` these, and where these need a gradient ``rows``.

    Invariance: a token's sum, and the gradients of its rows and weights, depend on its rows and weights alone.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes or devices do not fit, or (CPU) an element of ``order`` is out of range or there twice: names
            the first. On a GPU a token with an element out of range, and the gradient of a row that is nobody's, are
            NaN, and :func:`m4ov_kernels.check` raises the error.

    Source: Gale et al., "MegaBlocks", arXiv 2211.15841.
    """
    _check_unpermute(rows, order, weights)
    implementation = UNPERMUTE.select(rows.device, rows.dtype)
    if implementation is None:
        check_order(order)
        return reference.unpermute(rows, order, weights)
    result: Tensor = UNPERMUTE(implementation, rows, order, weights)
    return result


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A linear layer for each expert's rows: ``rows[offsets[e]:offsets[e + 1]] @ weight[e]ᵀ``, one after the other.

    Args:
        rows: ``[S, K]``, bfloat16, float16, float32 or float64; any strides.
        weight: ``[E, N, K]``, of the same dtype, on the same device; any strides: as Hugging Face holds the experts'
            ``gate_up_proj`` and ``down_proj`` in memory (a checkpoint's, ``[E, K, N]``, are these transposed).
        offsets: ``[E + 1]`` int32 (or int64), on the same device, from 0 to S, never falling: as :func:`permute` gives.
            Experts may be empty, and any of them may have all rows.

    Returns:
        ``[S, N]``, contiguous: summed in float32, rounded once.

    Invariance: by the compiled CPU kernels a row's output, and its gradient, depend on that row and its expert's weight
    alone: not on how many rows the expert has, nor on the number of threads. The gradient of ``weight`` is a sum over
    the expert's rows, in one order.

    Saves for backward: ``rows``, ``weight`` and ``offsets``. The gradient of ``weight`` is written for every expert,
    zeros for one without rows.

    Raises:
        TypeError: an argument is not of the kind above, or dtypes differ.
        ValueError: shapes or devices do not fit, or (CPU) an offset is wrong: names the first. On a GPU everything is
            NaN then, and :func:`m4ov_kernels.check` raises the error.

    Source: Gale et al., "MegaBlocks", arXiv 2211.15841.
    """
    _check_grouped(rows, weight, offsets)
    implementation = GROUPED_LINEAR.select(rows.device, rows.dtype)
    if implementation is None:
        return reference.grouped_linear(rows, weight, offsets)
    result: Tensor = GROUPED_LINEAR(implementation, rows, weight, offsets)
    return result


def _check_route(logits: Tensor, top_k: int, normalize: bool) -> None:
    checks.float_tensor("route_topk", "logits", logits)
    if logits.ndim != 2 or not logits.shape[1]:
        checks.refuse(ValueError, "route_topk", "logits", "[T, E] with E at least 1", checks.describe(logits))
    _integer("route_topk", "top_k", top_k)
    if not 1 <= top_k <= logits.shape[1]:
        expected = f"from 1 to {logits.shape[1]}, the number of experts"
        checks.refuse(ValueError, "route_topk", "top_k", expected, repr(top_k))
    if type(normalize) is not bool:
        checks.refuse(TypeError, "route_topk", "normalize", "a bool", checks.describe(normalize))


def _check_permute(hidden_states: Tensor, experts: Tensor, num_experts: int) -> None:
    op = "permute"
    _matrix(op, "hidden_states", hidden_states, "[T, H] with H at least 1")
    checks.index_tensor(op, "experts", experts, (torch.int32,))
    tokens = hidden_states.shape[0]
    if (
        experts.ndim != 2
        or experts.shape[0] != tokens
        or not experts.shape[1]
        or experts.device != hidden_states.device
    ):
        expected = f"[{tokens}, K] on {hidden_states.device} with K at least 1"
        checks.refuse(ValueError, op, "experts", expected, checks.describe(experts))
    if tokens * experts.shape[1] > _MOST:
        checks.refuse(ValueError, op, "experts", "fewer than 2^31 elements", checks.describe(experts))
    _integer(op, "num_experts", num_experts)
    if not 1 <= num_experts < _MOST:
        checks.refuse(ValueError, op, "num_experts", "at least 1, below 2^31", repr(num_experts))


def _check_unpermute(rows: Tensor, order: Tensor, weights: Tensor | None) -> None:
    op = "unpermute"
    _matrix(op, "rows", rows, "[T · K, H] with H at least 1")
    checks.index_tensor(op, "order", order, (torch.int32,))
    if (
        order.ndim != 2
        or not order.shape[1]
        or order.shape[0] * order.shape[1] != rows.shape[0]
        or order.device != rows.device
    ):
        expected = f"[T, K] with T · K = {rows.shape[0]}, the number of rows, and K at least 1, on {rows.device}"
        checks.refuse(ValueError, op, "order", expected, checks.describe(order))
    if weights is None:
        return
    checks.float_tensor(op, "weights", weights)
    if weights.dtype is not torch.promote_types(rows.dtype, torch.float32):
        expected = f"{torch.promote_types(rows.dtype, torch.float32)} for {rows.dtype} rows"
        checks.refuse(TypeError, op, "weights", expected, weights.dtype)
    if weights.shape != order.shape or weights.device != rows.device:
        expected = f"{list(order.shape)} on {rows.device}, as order"
        checks.refuse(ValueError, op, "weights", expected, checks.describe(weights))


def _check_grouped(rows: Tensor, weight: Tensor, offsets: Tensor) -> None:
    op = "grouped_linear"
    _matrix(op, "rows", rows, "[S, K] with K at least 1")
    checks.float_tensor(op, "weight", weight)
    if weight.dtype is not rows.dtype:
        checks.refuse(TypeError, op, "weight", f"{rows.dtype}, as rows", weight.dtype)
    if weight.ndim != 3 or weight.shape[2] != rows.shape[1] or 0 in weight.shape or weight.device != rows.device:
        expected = f"[E, N, {rows.shape[1]}] on {rows.device} with E and N at least 1"
        checks.refuse(ValueError, op, "weight", expected, checks.describe(weight))
    checks.index_tensor(op, "offsets", offsets, (torch.int32, torch.int64))
    if offsets.shape != (weight.shape[0] + 1,) or offsets.device != rows.device:
        expected = f"[{weight.shape[0] + 1}] on {rows.device}, the bounds of {weight.shape[0]} experts"
        checks.refuse(ValueError, op, "offsets", expected, checks.describe(offsets))
    if rows.shape[0] > _MOST:
        checks.refuse(ValueError, op, "rows", "fewer than 2^31 rows", checks.describe(rows))


def _matrix(operator: str, argument: str, value: Tensor, expected: str) -> None:
    checks.float_tensor(operator, argument, value)
    if value.ndim != 2 or not value.shape[1]:
        checks.refuse(ValueError, operator, argument, expected, checks.describe(value))


def _integer(operator: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        checks.refuse(TypeError, operator, argument, "an int", checks.describe(value))


def _route_fake(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, count = logits.shape
    return (
        logits.new_empty((tokens, top_k), dtype=torch.float32),
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty((count,), dtype=torch.int64),
        logits.new_empty((count,), dtype=torch.float32),
    )


def _route_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.normalize = inputs
    weights, experts, counts, _ = output
    ctx.mark_non_differentiable(experts, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, weights, experts)


def _route_backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, weights, experts = ctx.saved_tensors
    grad_weights, grad_probability = grads[0], grads[3]
    if grad_weights is None and grad_probability is None:
        return None, None, None
    return bwd(logits, grad_weights, grad_probability, weights, experts, ctx.normalize), None, None


def _route_bwd_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _permute_fake(hidden_states: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden_states.new_empty((experts.shape[0] * experts.shape[1], hidden_states.shape[1]))
    return rows, experts.new_empty(experts.shape), experts.new_empty((num_experts + 1,))


def _permute_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])


def _permute_backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return bwd(grads[0], *ctx.saved_tensors), None, None


def _permute_bwd_fake(grad_rows: Tensor, order: Tensor) -> Tensor:
    return grad_rows.new_empty((order.shape[0], grad_rows.shape[1]))


def _unpermute_fake(rows: Tensor, order: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty((order.shape[0], rows.shape[1]))


def _unpermute_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, order, weights = inputs
    # Of the rows only the gradient of weights is made; without, they need not be kept.
    ctx.save_for_backward(None if weights is None or not weights.requires_grad else rows, order, weights)


def _unpermute_backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, order, weights = ctx.saved_tensors
    grad_rows, grad_weights = bwd(grads[0], rows, order, weights, needs[0], needs[2])
    return grad_rows if needs[0] else None, None, grad_weights if needs[2] else None


def _unpermute_bwd_fake(
    grad_output: Tensor,
    rows: Tensor | None,
    order: Tensor,
    weights: Tensor | None,
    need_rows: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    shape = (order.shape[0] * order.shape[1], grad_output.shape[1])
    grad_weights = grad_output.new_empty(order.shape if need_weights else (0,), dtype=torch.float32)
    return grad_output.new_empty(shape if need_rows else (0,)), grad_weights


def _grouped_fake(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


def _grouped_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_rows, grad_weight = bwd(grads[0], *ctx.saved_tensors, needs[0], needs[1])
    return grad_rows if needs[0] else None, grad_weight if needs[1] else None, None


def _grouped_bwd_fake(
    grad_output: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, need_rows: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape if need_rows else (0,)), rows.new_empty(weight.shape if need_weight else (0,))


ROUTE_TOPK = Operator(
    "moe",
    "route_topk",
    fwd_schema="(Tensor logits, int top_k, bool normalize)"
    " -> (Tensor weights, Tensor experts, Tensor counts, Tensor probability)",
    bwd_schema="(Tensor logits, Tensor? grad_weights, Tensor? grad_probability, Tensor weights, Tensor experts,"
    " bool normalize) -> Tensor",
    fwd_fake=_route_fake,
    bwd_fake=_route_bwd_fake,
    results=lambda *_: 4,
    setup_context=_route_setup_context,
    backward=_route_backward,
)
PERMUTE = Operator(
    "moe",
    "permute",
    fwd_schema="(Tensor hidden_states, Tensor experts, int num_experts) -> (Tensor rows, Tensor order, Tensor offsets)",
    bwd_schema="(Tensor grad_rows, Tensor order) -> Tensor",
    fwd_fake=_permute_fake,
    bwd_fake=_permute_bwd_fake,
    results=lambda *_: 3,
    setup_context=_permute_setup_context,
    backward=_permute_backward,
)
UNPERMUTE = Operator(
    "moe",
    "unpermute",
    fwd_schema="(Tensor rows, Tensor order, Tensor? weights) -> Tensor",
    bwd_schema="(Tensor grad_output, Tensor? rows, Tensor order, Tensor? weights, bool need_rows, bool need_weights)"
    " -> (Tensor grad_rows, Tensor grad_weights)",
    fwd_fake=_unpermute_fake,
    bwd_fake=_unpermute_bwd_fake,
    results=lambda *_: 1,
    setup_context=_unpermute_setup_context,
    backward=_unpermute_backward,
)
GROUPED_LINEAR = Operator(
    "moe",
    "grouped_linear",
    fwd_schema="(Tensor rows, Tensor weight, Tensor offsets) -> Tensor",
    bwd_schema="(Tensor grad_output, Tensor rows, Tensor weight, Tensor offsets, bool need_rows, bool need_weight)"
    " -> (Tensor grad_rows, Tensor grad_weight)",
    fwd_fake=_grouped_fake,
    bwd_fake=_grouped_bwd_fake,
    results=lambda *_: 1,
    setup_context=_grouped_setup_context,
    backward=_grouped_backward,
)
