"""What every packed weight asks of its tensors, and the rounding that makes scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from m4ov_kernels.checks import FLOAT_DTYPES, describe, float_tensor, refuse

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Past this share of float32's range a code times its scale can round past the end.
LARGEST = torch.finfo(torch.float32).max * 7 / 8
_W = TypeVar("_W")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_of(owner: str, argument: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Refuse anything but a dense, contiguous tensor of one of these dtypes and of exactly this shape."""
    expected = f"a {' or '.join(map(name_of, dtypes))} tensor {list(shape)}"
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        refuse(TypeError, owner, argument, expected, describe(value))
    if value.layout is not torch.strided or tuple(value.shape) != shape:
        refuse(ValueError, owner, argument, expected, describe(value))
    if not value.is_contiguous():
        refuse(ValueError, owner, argument, "contiguous", f"strides {value.stride()}")


def finite(owner: str, argument: str, value: Tensor) -> None:
    """Values are looked at where the host has them: a GPU's are never fetched."""
    if value.device.type == "cpu" and not bool(torch.isfinite(value).all()):
        refuse(ValueError, owner, argument, "finite", f"{int((~torch.isfinite(value)).sum())} NaN or infinite values")


def one_device(owner: str, tensors: Mapping[str, Tensor | None]) -> None:
    devices = {name: value.device for name, value in tensors.items() if value is not None}
    if len(set(devices.values())) > 1:
        refuse(ValueError, owner, "tensors", "on one device", {name: str(device) for name, device in devices.items()})


def matrix(owner: str, weight: Any) -> Tensor:
    """The float32 matrix that is quantised: [N, K], at least 1 × 1, contiguous, finite, not at the very end of the
    range."""
    float_tensor(owner, "weight", weight)
    assert isinstance(weight, Tensor)
    if weight.dim() != 2 or 0 in weight.shape:
        refuse(ValueError, owner, "weight", "[N, K] with N and K at least 1", describe(weight))
    finite(owner, "weight", weight)
    weight = weight.detach().to(torch.float32).contiguous()
    if weight.device.type == "cpu" and float(weight.abs().max()) > LARGEST:
        refuse(ValueError, owner, "weight", f"at most {LARGEST:.4g} in magnitude", f"{float(weight.abs().max()):.4g}")
    return weight


def scale_dtype_of(owner: str, weight: Tensor, asked: torch.dtype | None) -> torch.dtype:
    if asked is None:
        return weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    if asked not in SCALE_DTYPES:
        refuse(ValueError, owner, "scale_dtype", " or ".join(map(name_of, SCALE_DTYPES)), asked)
    return asked


def rounded_scales(owner: str, ideal: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 scales, rounded to dtype. 0 (nothing but zeros) becomes 1; nothing else rounds to 0.

    The smallest scale is the smallest *normal* float32 or bfloat16, so that a processor that flushes subnormals
    divides by no zero, and the smallest subnormal float16, which is normal wherever it is computed with.
    """
    smallest = 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny
    scales = torch.where(ideal == 0, torch.ones_like(ideal), ideal.clamp_min(smallest)).to(dtype)
    if scales.device.type == "cpu" and not bool(torch.isfinite(scales).all()):
        end = torch.finfo(dtype).max
        expected = f"a dtype that holds every scale (the end of {name_of(dtype)} is {end:.4g})"
        refuse(ValueError, owner, "scale_dtype", expected, f"a scale of {float(ideal.max()):.4g}")
    return scales


def output_dtype(owner: str, dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    dtype = default if dtype is None else dtype
    if dtype not in FLOAT_DTYPES:
        refuse(TypeError, owner, "dtype", "bfloat16, float16, float32 or float64", dtype)
    return dtype


def keys_of(owner: str, state: Any, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Refuse a state dict that lacks a tensor, or holds one that this weight does not have."""
    if not isinstance(state, Mapping):
        refuse(TypeError, owner, "state_dict", "a mapping of names to tensors", describe(state))
    for name in required:
        if name not in state:
            refuse(ValueError, owner, f"state_dict[{name!r}]", "present", f"only {sorted(state)}")
    unknown = sorted(set(state) - set(required) - set(optional))
    if unknown:
        refuse(ValueError, owner, "state_dict", f"of {sorted({*required, *optional})} alone", f"also {unknown}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            refuse(TypeError, owner, f"state_dict[{name!r}]", "a tensor", describe(value))
