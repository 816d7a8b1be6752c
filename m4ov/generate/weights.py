"""The text's linears as the engine calls them: the model's own weights where they lie, or packed in eight or four
bits; and whether they have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov_kernels import invariant
from m4ov_kernels.gemm.invariant import unavailable
from m4ov_kernels.nn import Fp8Linear, Int4Linear, Int8Linear
from m4ov_kernels.nn.plain import is_plain
from m4ov_kernels.nn.quantized import QuantizedLinear

Linear = Callable[[Tensor], Tensor]
NUMERICS = ("shared", "fast")
WEIGHTS = ("model", "int8", "int4", "fp8")
_GROUPS = (128, 64, 32)


def check(model: nn.Module, numerics: str, weights: str) -> None:
    """Whether an engine can be made of these.

    Raises:
        TypeError: the model is not a :class:`m4ov.models.qwen3_vl.Qwen3VL`, or a parameter is not a plain tensor (FSDP
            and tensor parallelism shard them).
        ValueError: an option is none of those there are, parameters have several dtypes or devices, or experts are to
            be quantised.
        RuntimeError: shared numerics where the compiled kernels cannot keep them; says why.
    """
    for name, value, choices in (("numerics", numerics, NUMERICS), ("weights", weights, WEIGHTS)):
        if value not in choices:
            raise ValueError(f"Engine: {name} must be one of {', '.join(choices)}; got {value!r}")
    if not isinstance(model, Qwen3VL):
        raise TypeError(f"Engine: model must be m4ov.models.qwen3_vl.Qwen3VL; got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if type(parameter) not in (Tensor, nn.Parameter):
            raise TypeError(f"Engine: {name} must be a plain tensor; got {type(parameter).__name__}: gather it first")
    kinds = {(parameter.dtype, parameter.device) for parameter in model.parameters()}
    if len(kinds) > 1:
        raise ValueError(f"Engine: parameters must be of one dtype on one device; got {sorted(map(str, kinds))}")
    ((dtype, device),) = kinds
    if device.type == "meta":
        raise ValueError("Engine: the model's parameters are on the meta device; load weights first")
    if weights != "model" and any(getattr(layer, "sparse", False) for layer in model.modules()):
        raise ValueError(f"Engine: weights={weights!r} of a mixture of experts is not built; use weights='model'")
    reason = unavailable(device.type, dtype) if numerics == "shared" else None
    if reason is not None:
        raise RuntimeError(f"Engine: numerics='shared' cannot be kept: {reason}; numerics='fast' can be used")


def linear_of(module: nn.Module, *, shared: bool, weights: str) -> Linear:
    """A linear as a function. ``shared``: of which a row's bits depend on the row and the weight alone: those of the
    module inside :func:`m4ov_kernels.invariant`.

    A plain linear's parameters are looked up at each call, so a change of them in place is seen; packed ones are those
    of now."""
    plain = type(module) is nn.Linear and is_plain(module)
    if plain and weights != "model":
        module, plain = _packed(module, weights, shared), False
    if plain:
        parameters: Mapping[str, Any] = module._parameters
        if not shared:
            return lambda x: F.linear(x, parameters["weight"], parameters["bias"])
        from m4ov_kernels.gemm.native_invariant import invariant_linear_fwd

        return lambda x: invariant_linear_fwd(x, parameters["weight"], parameters["bias"])
    if isinstance(module, QuantizedLinear) or not shared:
        return module
    return lambda x: _inside(module, x)


def _inside(module: nn.Module, x: Tensor) -> Tensor:
    with invariant():
        made: Tensor = module(x)
    return made


def _packed(module: nn.Module, weights: str, shared: bool) -> nn.Module:
    assert isinstance(module, nn.Linear)
    activation = "bf16" if shared else "auto"
    if weights == "int8":
        return Int8Linear.from_linear(module)
    if weights == "fp8":
        return Fp8Linear.from_linear(module, activation=activation)
    group_size = next((size for size in _GROUPS if module.in_features % size == 0), None)
    if group_size is None:
        raise ValueError(f"Engine: weights='int4' needs widths that are multiples of 32; got {module.in_features}")
    return Int4Linear.from_linear(module, group_size=group_size, activation=activation)


class Seen:
    """A model's parameters as they were: whether one was written or replaced since. (A write through ``.data`` is not
    counted by PyTorch and not seen.)"""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._state = self._now()

    def _now(self) -> list[tuple[int, int]]:
        return [(parameter.data_ptr(), parameter._version) for parameter in self._parameters]

    def same(self) -> bool:
        """Whether none of them was written."""
        return self._now() == self._state

    def holds(self, model: nn.Module) -> bool:
        """Whether the model has these parameters and no others."""
        now = list(model.parameters())
        return len(now) == len(self._parameters) and all(map(is_, now, self._parameters))


@torch.no_grad()
def copy_into(model: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Every parameter of ``model`` from ``source``, by name, converted; all names and shapes are checked before the
    first is written.

    Raises:
        ValueError: names the parameters that are missing, unknown or of another shape.
    """
    own = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own.keys()
    missing, unknown = own.keys() - source.keys(), source.keys() - own.keys() - tied
    if missing or unknown:
        raise ValueError(
            f"update_weights: {len(missing)} parameters missing ({', '.join(sorted(missing)[:3])}), {len(unknown)} "
            f"unknown ({', '.join(sorted(unknown)[:3])})"
        )
    for name, parameter in own.items():
        if source[name].shape != parameter.shape:
            raise ValueError(f"update_weights: {name} must be {list(parameter.shape)}; got {list(source[name].shape)}")
    for name, parameter in own.items():
        parameter.copy_(source[name])
