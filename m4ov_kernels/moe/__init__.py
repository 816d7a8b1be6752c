"""Mixture of experts: ``route_topk``, ``permute``, ``grouped_linear``, ``unpermute``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.moe import reference

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

    Saves for backward: ``logits``, ``weights``, ``experts``, and a float32 for each token. The choice itself has no
    gradient.

    Invariance: weights and experts of a token, and its part of the gradient of ``weights``, depend on that token
    alone. ``probability`` is summed over a fixed split of the tokens: its bits do not depend on the number of threads.

    Raises:
        TypeError: ``logits`` is not a dense floating-point tensor, ``top_k`` no int, ``normalize`` no bool.
        ValueError: a shape or ``top_k`` does not fit.

    Source: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538; the load is that of Fedus et al.,
    "Switch Transformers", arXiv 2101.03961: balance loss = E · Σ counts/T · probability.
    """
    _check_route(logits, top_k, normalize)
    weights, experts, counts, probability = reference.route_topk(logits, top_k, normalize)
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
    check_experts(experts, num_experts)
    return reference.permute(hidden_states, experts, num_experts)


def unpermute(rows: Tensor, order: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum over the rows of each token, weighted: what undoes :func:`permute`.

    Args:
        rows: ``[T · K, H]``, bfloat16, float16, float32 or float64; any strides.
        order: ``[T, K]`` int32, on the same device: the rows of each token, every row once, as :func:`permute` gives.
        weights: ``[T, K]``, float32 (float64 for float64 rows), or ``None``: all 1.

    Returns:
        ``[T, H]``, contiguous, of the dtype of ``rows``: ``Σₖ weights[t, k] · rows[order[t, k]]``, in float32, in the
        order of ``k``, rounded once.

    Saves for backward: ``order``, and with ``weights`` these and ``rows``.

    Invariance: a token's sum, and the gradients of its rows and weights, depend on its rows and weights alone.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes or devices do not fit, or (CPU) an element of ``order`` is out of range or there twice: names
            the first. On a GPU such a token, or the gradient of a row that is not there once, is NaN, and
            :func:`m4ov_kernels.check` raises the error.

    Source: Gale et al., "MegaBlocks", arXiv 2211.15841.
    """
    _check_unpermute(rows, order, weights)
    check_order(order)
    return reference.unpermute(rows, order, weights)


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

    Saves for backward: ``rows``, ``weight`` and ``offsets``. The gradient of ``weight`` is written for every expert,
    zeros for one without rows.

    Raises:
        TypeError: an argument is not of the kind above, or dtypes differ.
        ValueError: shapes or devices do not fit, or (CPU) an offset is wrong: names the first. On a GPU rows that
            belong to no expert are NaN then, and :func:`m4ov_kernels.check` raises the error.

    Source: Gale et al., "MegaBlocks", arXiv 2211.15841.
    """
    _check_grouped(rows, weight, offsets)
    return reference.grouped_linear(rows, weight, offsets)


def check_experts(experts: Tensor, num_experts: int) -> None:
    """``ValueError`` for an expert out of range, where the host sees it."""
    if experts.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((experts < 0) | (experts >= num_experts)).flatten().nonzero()
    if len(wrong):
        at = int(wrong[0])
        _refuse_value("permute", "experts", at, int(experts.flatten()[at]), f"from 0 to {num_experts - 1}")


def check_order(order: Tensor) -> None:
    """``ValueError`` for an element of ``order`` that is no row or is there twice, where the host sees it."""
    if order.device.type != "cpu" or torch.compiler.is_compiling():
        return
    flat = order.flatten().tolist()
    seen: set[int] = set()
    for at, row in enumerate(flat):
        if not 0 <= row < len(flat):
            _refuse_value("unpermute", "order", at, row, f"from 0 to {len(flat) - 1}")
        if row in seen:
            _refuse_value("unpermute", "order", at, row, "every row once")
        seen.add(row)


def _refuse_value(operator: str, argument: str, position: int, value: int, expected: str) -> None:
    raise ValueError(f"{operator}: {argument}[{position}] is {value}: expected {expected}")


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


def _matrix(operator: str, argument: str, value: Tensor, expected: str) -> None:
    checks.float_tensor(operator, argument, value)
    if value.ndim != 2 or not value.shape[1]:
        checks.refuse(ValueError, operator, argument, expected, checks.describe(value))


def _integer(operator: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        checks.refuse(TypeError, operator, argument, "an int", checks.describe(value))
