"""One call of one operator with everything that it must equal, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import gate
from m4ov_kernels import dispatch
from m4ov_kernels.dispatch import Implementation, Operator

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("contiguous", "wide rows", "offset", "transposed", "every other")


@dataclass(frozen=True)
class Example:
    """``function`` (the public operator) and ``definition`` (the reference) take ``inputs`` and return a tensor or
    several; the inputs that require a gradient are differentiated with ``grads`` handed to the outputs.

    ``names``: of the outputs, then of those gradients. ``terms``: see :func:`m4ov_bench.gate.compare`, by name.
    """

    title: str
    function: Callable[..., Any]
    definition: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    names: tuple[str, ...]
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    plain: Callable[..., Any] | None = None  # PyTorch in the same dtype, where that is not the definition

    @property
    def elements(self) -> int:
        return sum(tensor.numel() for tensor in self.inputs)

    def run(self) -> list[Tensor]:
        """Outputs and gradients through the front door and autograd."""
        return gate.differentiated(self.function, self.inputs, self.grads)

    def judge(self, ours: Sequence[Tensor]) -> gate.Gate:
        """The numerics rule, for every output and gradient."""
        plain = gate.differentiated(self.plain or self.definition, self.inputs, self.grads)
        doubled = [tensor.double() if tensor.is_floating_point() else tensor for tensor in self.inputs]
        exact = gate.differentiated(self.definition, doubled, [grad.double() for grad in self.grads])
        result = gate.Gate({})
        for name, *tensors in zip(self.names, ours, plain, exact, strict=True):
            result += gate.compare(name, *tensors, self.terms.get(name))
        return result


@dataclass(frozen=True)
class Maker:
    """Random tensors for examples, on one device and of one dtype."""

    device: torch.device
    dtype: torch.dtype

    def normal(
        self, shape: Sequence[int], layout: str = "contiguous", magnitude: float = 1.0, grad: bool = True
    ) -> Tensor:
        values = (torch.randn(*shape, device=self.device) * magnitude).to(self.dtype)
        return laid_out(values, layout).requires_grad_(grad)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory as named: rows of a wider buffer, one element off alignment, the first two dimensions
    swapped, or a gap between elements."""
    shape = values.shape
    if layout == "wide rows":
        out = values.new_empty((*shape[:-1], shape[-1] + 3))[..., 1 : shape[-1] + 1]
    elif layout == "offset":
        out = values.new_empty(values.numel() + 1)[1:].view(shape)
    elif layout == "transposed" and values.ndim > 1:
        out = values.new_empty((shape[1], shape[0], *shape[2:])).transpose(0, 1)
    elif layout == "every other":
        out = values.new_empty((*shape, 2))[..., 0]
    else:
        return values
    return out.copy_(values)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, every uninitialised tensor that PyTorch hands out is full of NaN, those of the operators too: an element
    that nothing wrote shows, in outputs and in workspaces."""
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # what fill_uninitialized_memory depends on
    previous, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = previous
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def dtypes_of(operator: Operator) -> dict[str, torch.dtype]:
    """What an operator is checked in, by short names."""
    floating = {name: dtype for name, dtype in DTYPES.items() if dtype in operator.dtypes}
    return floating or {str(dtype).removeprefix("torch."): dtype for dtype in operator.dtypes}


def backends(operator: Operator, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The kernels that serve tensors here, and why those that do not run here do not (empty: they run)."""
    found = {}
    for name in operator.backends:
        if name == "native" and device.type not in operator.native_devices:
            continue
        reason = operator.unavailable(name, device.type, dtype) or ""
        if not reason and name == "triton" and device.type == "cpu" and dtype is torch.bfloat16:
            reason = "no CUDA device, and Triton's interpreter truncates bfloat16"
        found[name] = reason
    return found


@contextmanager
def recorded(operator: Operator, implementation: Implementation) -> Iterator[dict[str, list[tuple[Any, ...]]]]:
    """Inside, calls of ``operator`` go to ``implementation``, and the arguments of its raw functions are kept."""
    calls: dict[str, list[tuple[Any, ...]]] = {"fwd": [], "bwd": []}

    def keeping(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            calls[kind].append(arguments)
            return function(*arguments)

        return run

    bwd = None if implementation.bwd is None else keeping("bwd", implementation.bwd)
    pair = Implementation(implementation.backend, keeping("fwd", implementation.fwd), bwd)
    operator.select = lambda *_: pair  # type: ignore[method-assign]  # hides the class's method
    try:
        yield calls
    finally:
        del operator.select  # type: ignore[method-assign]


def operator_named(name: str) -> Operator:
    return dispatch.FUNCTIONS[name]
