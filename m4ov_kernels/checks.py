"""One wording for refused arguments: operator, argument, what was expected, what came."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = frozenset((torch.bfloat16, torch.float32, torch.float16, torch.float64))
_STRIDED = torch.strided
NUMERICS = ("hf", "vllm", "fp32")


def refuse(kind: type[Exception], operator: str, argument: str, expected: str, got: Any) -> NoReturn:
    raise kind(f"{operator}: {argument} must be {expected}; got {got}")


def describe(value: Any) -> str:
    """A tensor's dtype, shape and device, or a value's type and repr."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def float_tensor(operator: str, argument: str, value: Any) -> None:
    """Refuse anything but a dense floating-point tensor of a dtype that the operators know."""
    if isinstance(value, Tensor) and value.dtype in FLOAT_DTYPES and value.layout is _STRIDED:
        return
    if not isinstance(value, Tensor):
        refuse(TypeError, operator, argument, "a tensor", describe(value))
    if value.dtype not in FLOAT_DTYPES:
        refuse(TypeError, operator, argument, "a bfloat16, float16, float32 or float64 tensor", describe(value))
    refuse(TypeError, operator, argument, "a dense (strided) tensor", f"layout {value.layout}")


def index_tensor(operator: str, argument: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse anything but a dense tensor of one of these integer dtypes."""
    if isinstance(value, Tensor) and value.dtype in dtypes and value.layout is _STRIDED:
        return
    expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        refuse(TypeError, operator, argument, f"an {expected} tensor", describe(value))
    refuse(TypeError, operator, argument, "a dense (strided) tensor", f"layout {value.layout}")


def number(operator: str, argument: str, value: Any) -> None:
    """Refuse what cannot be compared with a number, such as a string or ``None``; a tensor is not a number."""
    if not isinstance(value, (float, int, numbers.Real)):
        refuse(TypeError, operator, argument, "a number", describe(value))


def one_of(operator: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        refuse(ValueError, operator, argument, "one of " + ", ".join(map(repr, choices)), repr(value))
