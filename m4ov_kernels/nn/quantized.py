"""``Int4Linear``, ``Int8Linear``, ``Fp8Linear``: linear layers of quantised weights, in the place of ``nn.Linear``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from m4ov_kernels.checks import FLOAT_DTYPES, describe, float_tensor, refuse
from m4ov_kernels.dispatch import is_compiling
from m4ov_kernels.gemm import fp8_linear, int4_linear, int8_linear
from m4ov_kernels.gemm.linear import ACTIVATIONS
from m4ov_kernels.gemm.panels import Panels, lay_out, own
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight
from m4ov_kernels.gemm.weights.fp8 import GRANULARITIES

W = TypeVar("W", Int4Weight, Int8Weight, Fp8Weight)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by which floating tensors are moved and never converted


class QuantizedLinear(nn.Module, Generic[W]):
    """What the three layers share. They keep one copy of the weight: on the CPU in the panels that its kernels read,
    elsewhere as it is. The weight is frozen and no parameter; ``to``, ``half`` and their like move it, and change
    ``compute_dtype`` and the bias, never a scale.

    ``state_dict`` holds the weight's own ``state_dict()``, exact, under the layer's prefix, and ``bias``;
    ``load_state_dict`` takes any weight of the same class and shape (another group size, with zero points or without),
    with ``assign=True`` on the device that it is on. A layer of meta tensors is made from a weight or linear of those.

    Attributes:
        in_features, out_features: K and N.
        bias: a parameter ``[N]``, or ``None``.
        compute_dtype: the dtype of ``weight``; ``forward`` computes in that of its input.
    """

    _class: ClassVar[type]
    _required: ClassVar[tuple[str, ...]]
    _optional: ClassVar[tuple[str, ...]] = ()
    _kind: ClassVar[str]

    def __init__(self, weight: W, bias: Tensor | None, activation: str, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        name = type(self).__name__
        if type(weight) is not self._class:
            refuse(TypeError, name, "weight", f"an {self._class.__name__}", describe(weight))
        if activation not in ACTIVATIONS[self._kind]:
            choices = ", ".join(map(repr, ACTIVATIONS[self._kind]))
            refuse(ValueError, name, "activation", f"one of {choices}", repr(activation))
        self.out_features, self.in_features = weight.shape
        if bias is not None:
            float_tensor(name, "bias", bias)
            if bias.shape != weight.shape[:1] or bias.device != weight.device:
                refuse(ValueError, name, "bias", f"[{self.out_features}] on {weight.device}", describe(bias))
        if compute_dtype is None:
            compute_dtype = weight.scales.dtype if bias is None else bias.dtype
        elif compute_dtype not in FLOAT_DTYPES:
            refuse(TypeError, name, "compute_dtype", "a floating dtype", repr(compute_dtype))
        self.activation, self.compute_dtype = activation, compute_dtype
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)
        self._hold(weight)

    def _hold(self, weight: W | Panels) -> None:
        on_cpu = weight.device.type == "cpu"
        if on_cpu and not isinstance(weight, Panels):
            weight = lay_out(weight)
        self.held: Any = weight  # as the kernels read it
        self.pair: Panels | None = None

    def share(self, half: Panels, pair: Panels) -> None:
        """Holds ``half``, the same weight as before, which is part of ``pair``."""
        self.held, self.pair = half, pair

    @property
    def quantized_weight(self) -> W:
        """The weight; on the CPU made anew of its panels, which costs a pass over it."""
        held: Any = self.held.weight() if isinstance(self.held, Panels) else self.held
        return held  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """``[N, K]`` in ``compute_dtype``, dequantised each time it is asked for: for code that looks at a linear's
        weight, which is right but slow. Its dtype alone is ``compute_dtype``."""
        return self.quantized_weight.dequantize(self.compute_dtype)

    def linear(self, input: Tensor, weight: Any, bias: Tensor | None, epilogue: str | None = None) -> Tensor:
        """The layer's function, of any weight of its kind."""
        raise NotImplementedError

    @staticmethod
    def cast(input: Tensor) -> Tensor:
        """Under autocast to its dtype."""
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return input if input.dtype is torch.float64 else input.to(torch.get_autocast_dtype(device))
        return input

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., N]``; under autocast in its dtype."""
        if self.pair is not None and not is_compiling():
            self._hold(own(self.held))
        input = self.cast(input)
        bias: Any = self.bias
        bias = bias if bias is None or bias.dtype is input.dtype else bias.to(input.dtype)
        return self.linear(input, self.held, bias)

    def extra_repr(self) -> str:
        held = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return ", ".join((held, *self._described(self.held), f"activation={self.activation!r}"))

    def _described(self, held: Any) -> tuple[str, ...]:
        return ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        held: Any = self.held
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=held.device))
        if isinstance(held, Panels) and probe.device.type != "cpu":
            held = held.weight()
        empty = held.device.type == "meta" and probe.device.type != "meta"  # to_empty: anything will do that is valid
        moved = {name: _moved(value, fn) for name, value in vars(held).items() if isinstance(value, Tensor)}
        self._hold(replace(held, **{name: value.zero_() if empty else value for name, value in moved.items()}))
        self.compute_dtype = probe.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self.quantized_weight.state_dict().items()})

    def _load_from_state_dict(  # type: ignore[override]
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = (*self._required, *self._optional)
        ours = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        rest = {name: value for name, value in state_dict.items() if name.removeprefix(prefix) not in ours}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing = [prefix + name for name in self._required if name not in ours]
        if missing:
            missing_keys.extend(missing if strict or ours else [])
            return
        try:
            weight = self._class.from_state_dict(ours)  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            error_msgs.append(f"While loading {prefix}*: {error}")
            return
        if weight.shape != (self.out_features, self.in_features):
            own = [self.out_features, self.in_features]
            error_msgs.append(f"size mismatch for {prefix}*: {list(weight.shape)} in the checkpoint, {own} here")
        elif local_metadata.get("assign_to_params_buffers", False):
            self._hold(weight)
        elif self.held.device.type == "meta" and weight.device.type != "meta":
            warnings.warn(f"{prefix}*: a layer of meta tensors loads with assign=True; nothing is done", stacklevel=2)
        elif self.held.device == weight.device != torch.device("cpu"):
            self._hold(replace(weight, **{n: v.clone() for n, v in vars(weight).items() if isinstance(v, Tensor)}))
        else:
            self._hold(weight.to(self.held.device))


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of ``Module._apply`` upon the bits of a tensor, in one dimension: no dtype and no memory format."""
    bits = tensor.reshape(-1).view(_BITS[tensor.element_size()])
    found = fn(bits)
    if found.dtype is not bits.dtype:
        refuse(TypeError, "a quantised linear", "its weight", "moved only, not converted", found.dtype)
    return found.view(tensor.dtype).view(tensor.shape)


def _of(linear: Any, name: str) -> tuple[Tensor, dict[str, Any]]:
    """The weight of an ``nn.Linear``, and what else a layer takes from it."""
    if not isinstance(linear, nn.Linear):
        refuse(TypeError, name, "linear", "an nn.Linear", describe(linear))
    return linear.weight.detach(), {"bias": linear.bias, "compute_dtype": linear.weight.dtype}


class Int4Linear(QuantizedLinear[Int4Weight]):
    """:func:`m4ov_kernels.int4_linear` with its weight, in the place of an ``nn.Linear``.

    Args:
        weight: ``[N, K]``.
        bias: ``[N]``, floating; a parameter stays what it is, trainable or not.
        activation: see :func:`m4ov_kernels.int4_linear`.
        compute_dtype: of ``weight`` where it is looked at; by default the bias's, or the scales'.
    """

    _class, _kind = Int4Weight, "int4"
    _required = ("weight_packed", "weight_scale", "weight_shape", "group_size")
    _optional = ("weight_zero_point", "weight_g_idx", "pre_quant_scale")

    def __init__(
        self,
        weight: Int4Weight,
        bias: Tensor | None = None,
        *,
        activation: str = "auto",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, bias, activation, compute_dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, group_size: int = 128, symmetric: bool = True, activation: str = "auto"
    ) -> Self:
        """Rounded to nearest, as :meth:`Int4Weight.quantize` does it; the bias is the linear's own."""
        matrix, rest = _of(linear, cls.__name__)
        weight = Int4Weight.quantize(matrix, group_size=group_size, symmetric=symmetric)
        return cls(weight, activation=activation, **rest).train(linear.training)

    def linear(self, input: Tensor, weight: Any, bias: Tensor | None, epilogue: str | None = None) -> Tensor:
        return int4_linear(input, weight, bias=bias, activation=self.activation, epilogue=epilogue)

    def _described(self, held: Any) -> tuple[str, ...]:
        group_size = held.form if isinstance(held, Panels) else held.group_size
        act_order = (held.order if isinstance(held, Panels) else held.g_idx) is not None
        symmetric = held.zeros is None
        return f"group_size={group_size}", f"symmetric={symmetric}", *(("act_order=True",) if act_order else ())


class Int8Linear(QuantizedLinear[Int8Weight]):
    """:func:`m4ov_kernels.int8_linear` with its weight, in the place of an ``nn.Linear``.

    Args:
        weight: ``[N, K]``.
        bias, compute_dtype: as in :class:`Int4Linear`.
    """

    _class, _kind, _required = Int8Weight, "int8", ("weight", "weight_scale")

    def __init__(
        self, weight: Int8Weight, bias: Tensor | None = None, *, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(weight, bias, "int8", compute_dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Rounded to nearest, as :meth:`Int8Weight.quantize` does it; the bias is the linear's own."""
        matrix, rest = _of(linear, cls.__name__)
        return cls(Int8Weight.quantize(matrix), **rest).train(linear.training)

    def linear(self, input: Tensor, weight: Any, bias: Tensor | None, epilogue: str | None = None) -> Tensor:
        return int8_linear(input, weight, bias=bias, epilogue=epilogue)


class Fp8Linear(QuantizedLinear[Fp8Weight]):
    """:func:`m4ov_kernels.fp8_linear` with its weight, in the place of an ``nn.Linear``.

    Args:
        weight: ``[N, K]``.
        activation: see :func:`m4ov_kernels.fp8_linear`.
        bias, compute_dtype: as in :class:`Int4Linear`.
    """

    _class, _kind = Fp8Weight, "fp8"
    _required, _optional = ("weight", "weight_scale", "granularity"), ("input_scale",)

    def __init__(
        self,
        weight: Fp8Weight,
        bias: Tensor | None = None,
        *,
        activation: str = "auto",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, bias, activation, compute_dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, granularity: str = "channel", activation: str = "auto") -> Self:
        """Rounded to nearest, as :meth:`Fp8Weight.quantize` does it; the bias is the linear's own."""
        matrix, rest = _of(linear, cls.__name__)
        weight = Fp8Weight.quantize(matrix, granularity=granularity)
        return cls(weight, activation=activation, **rest).train(linear.training)

    def linear(self, input: Tensor, weight: Any, bias: Tensor | None, epilogue: str | None = None) -> Tensor:
        return fp8_linear(input, weight, bias=bias, activation=self.activation, epilogue=epilogue)

    def _described(self, held: Any) -> tuple[str, ...]:
        granularity = GRANULARITIES[held.form] if isinstance(held, Panels) else held.granularity
        static = held.input_scale is not None
        return f"granularity={granularity!r}", *(("static=True",) if static else ())
