"""What the backends share: errors of values that the host sees (experts, orders), and the memory of a routing."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from m4ov_kernels.layout import output

Routing = tuple[Tensor, Tensor, Tensor, Tensor]  # weights, experts, counts, probability


def check_experts(experts: Tensor, num_experts: int) -> None:
    """``ValueError`` for an expert out of range, where the host sees it."""
    if experts.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((experts < 0) | (experts >= num_experts)).flatten().nonzero()
    if len(wrong):
        refuse_expert(experts, int(wrong[0]), num_experts)


def check_order(order: Tensor) -> None:
    """``ValueError`` for an element of ``order`` that is no row or is there twice, where the host sees it."""
    if order.device.type != "cpu" or torch.compiler.is_compiling():
        return
    flat = order.flatten().tolist()
    seen: set[int] = set()
    for position, row in enumerate(flat):
        if not 0 <= row < len(flat) or row in seen:
            refuse_order(order, position)
        seen.add(row)


def refuse_expert(experts: Tensor, position: int, num_experts: int) -> NoReturn:
    value = int(experts.flatten()[position])
    raise ValueError(f"permute: experts[{position}] is {value}: expected 0 to {num_experts - 1}")


def refuse_order(order: Tensor, position: int) -> NoReturn:
    value, count = int(order.flatten()[position]), order.numel()
    expected = "every row once" if 0 <= value < count else f"0 to {count - 1}, the rows"
    raise ValueError(f"unpermute: order[{position}] is {value}: expected {expected}")


def routing(logits: Tensor, top_k: int, given: Routing | None) -> Routing:
    """The results of ``route_topk``: fresh ones, or those that a raw function was given, checked."""
    (tokens, count), (weights, experts, counts, probability) = logits.shape, given or (None, None, None, None)
    return (
        output(weights, (tokens, top_k), logits, torch.float32),
        output(experts, (tokens, top_k), logits, torch.int32),
        output(counts, (count,), logits, torch.int64),
        output(probability, (count,), logits, torch.float32),
    )
