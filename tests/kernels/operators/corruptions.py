"""Single faults in a valid call, each with the error that must name it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..draws import Draw

Change = Callable[[dict[str, Any], Draw], "tuple[dict[str, Any], str] | None"]


class Corruption(NamedTuple):
    """``change``: of valid arguments, those to replace and what the message must say came; ``None`` where the fault
    cannot be made. ``argument``: the one that the message must name."""

    argument: str
    what: str
    error: type[Exception]
    change: Change

    def __str__(self) -> str:
        return f"{self.argument}: {self.what}"


def value(argument: str, error: type[Exception], what: str, *options: Any) -> Corruption:
    """One of ``options`` instead."""

    def change(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
        wrong = draw.choice(options)
        return {argument: wrong}, repr(wrong)

    return Corruption(argument, what, error, change)


def changed(
    argument: str, error: type[Exception], what: str, make: Callable[[Tensor, Draw], tuple[Any, str]]
) -> Corruption:
    """A tensor that is given, made into something else; ``make`` also says what came."""

    def change(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
        if arguments.get(argument) is None:
            return None
        wrong, came = make(arguments[argument], draw)
        return {argument: wrong}, came

    return Corruption(argument, what, error, change)


def float_tensor(argument: str, optional: bool = False) -> tuple[Corruption, ...]:
    """What no floating-point tensor argument may be."""
    others = (torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    return (*_a_tensor(argument, optional), dtype(argument, *others), _sparse(argument))


def index_tensor(argument: str, optional: bool = False) -> tuple[Corruption, ...]:
    """What no int64 argument may be."""
    others = (torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16)
    return (*_a_tensor(argument, optional), dtype(argument, *others), _sparse(argument))


def int32_tensor(argument: str) -> tuple[Corruption, ...]:
    """What no int32 argument may be."""
    others = (torch.int64, torch.int16, torch.bool, torch.float32)
    return (*_a_tensor(argument, False), dtype(argument, *others), _sparse(argument))


def _a_tensor(argument: str, optional: bool) -> tuple[Corruption, ...]:
    values = [[1.0], (1.0, 2.0), 1.0, "tensor", np.ones(3)] + ([] if optional else [None])
    return (value(argument, TypeError, "not a tensor", *values),)


def dtype(argument: str, *others: torch.dtype) -> Corruption:
    def make(tensor: Tensor, draw: Draw) -> tuple[Tensor, str]:
        other = draw.choice([other for other in others if other is not tensor.dtype])
        # Zeros: not every value has a meaning in every dtype.
        return torch.zeros_like(tensor, dtype=torch.float32).to(other), str(other).removeprefix("torch.")

    return changed(argument, TypeError, "another dtype", make)


def float_dtype(argument: str) -> Corruption:
    """Floating, but not the dtype of the other tensors."""
    return dtype(argument, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _sparse(argument: str) -> Corruption:
    return changed(argument, TypeError, "sparse", lambda tensor, draw: (_as_sparse(tensor), "sparse"))


def _as_sparse(tensor: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(size=tensor.shape, dtype=tensor.dtype, check_invariants=True)


def device(argument: str) -> Corruption:
    return changed(argument, ValueError, "on another device", lambda tensor, draw: (tensor.to("meta"), "meta"))


def shape(argument: str, *options: Callable[[Sequence[int]], Sequence[int]], blamed: str | None = None) -> Corruption:
    """Of another shape; ``blamed``: the argument that the message names instead."""

    def make(tensor: Tensor, draw: Draw) -> tuple[Tensor, str]:
        wrong = tuple(draw.choice(options)(tuple(tensor.shape)))
        return tensor.new_zeros(wrong), str(list(wrong)) if blamed is None else ""

    made = changed(argument, ValueError, "another shape", make)
    return made if blamed is None else made._replace(argument=blamed, what=f"another shape of {argument}")


def wider(shape: Sequence[int]) -> Sequence[int]:
    return (*shape[:-1], shape[-1] + 1)


def doubled(shape: Sequence[int]) -> Sequence[int]:
    return (*shape[:-1], 2 * shape[-1])


def deeper(shape: Sequence[int]) -> Sequence[int]:
    return (1, *shape)


def longer(shape: Sequence[int]) -> Sequence[int]:
    return (shape[0] + 1, *shape[1:])


def scalar(shape: Sequence[int]) -> Sequence[int]:
    return ()


def bounds(argument: str) -> tuple[Corruption, ...]:
    """What no cumulative lengths may be."""

    def not_from_zero(bounds: Tensor, draw: Draw) -> tuple[Tensor, str]:
        wrong = bounds.clone()
        wrong[0] = draw.choice((1, -1))
        return wrong, str(int(wrong[0]))

    def wrong_end(bounds: Tensor, draw: Draw) -> tuple[Tensor, str]:
        wrong = bounds.clone()
        wrong[-1] += draw.choice((1, -1, 7))
        return wrong, str(int(wrong[-1]))

    def falling(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
        bounds = arguments[argument]
        if bounds is None or len(bounds) < 3 or bounds[1] == 0:
            return None
        wrong = bounds.clone()
        wrong[2 if len(wrong) > 3 else 1] = -1
        return {argument: wrong}, "-1"

    return (
        changed(argument, ValueError, "not from 0", not_from_zero),
        changed(argument, ValueError, "another end", wrong_end),
        Corruption(argument, "falling", ValueError, falling),
        dtype(argument, torch.float32, torch.int16, torch.bool),
    )


def head(hidden: str, weight: str, rows: str) -> tuple[Corruption, ...]:
    """Of hidden states ``[..., D]`` and a weight ``[V, D]``; ``rows`` is blamed where there are other rows."""
    return (
        *float_tensor(hidden),
        shape(hidden, scalar, lambda size: (*size[:-1], 0)),
        shape(hidden, wider, blamed=weight),
        shape(hidden, longer, deeper, blamed=rows),
        *float_tensor(weight),
        shape(weight, wider, deeper, lambda size: (0, size[1])),
        device(weight),
    )
