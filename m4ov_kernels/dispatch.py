"""Which implementation serves a call, and how a raw forward/backward pair becomes a differentiable operator.

An operator has a reference (plain PyTorch, differentiable, the definition) and raw ``fwd``/``bwd`` pairs in
``<family>/native.py`` (compiled C++ or CUDA C++) and ``<family>/triton.py``. A public function checks its arguments,
asks :meth:`Operator.select` for the pair that serves this device and dtype, and calls the operator with it. Three
roads lead from there, because they differ in cost (µs on one Zen 4 core: no_grad / grad):

* under ``torch.compile``, or for a tensor subclass: the op registered with ``torch.library`` (6 / 15);
* gradients wanted: an old-style ``autograd.Function`` (5);
* else: a direct call (1).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("native", "triton", "library", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# No GPU figure has been measured yet for CUDA C++ against Triton, so Triton, which every operator has, comes first.
_ORDER = {"cpu": ("native", "reference"), "cuda": ("library", "triton", "native", "reference")}
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

is_compiling = torch.compiler.is_compiling
_is_grad_enabled, _functorch_is_active = torch.is_grad_enabled, torch._C._are_functorch_transforms_active

_library = torch.library.Library("m4ov", "DEF")


class Implementation(NamedTuple):
    """A raw pair: ``fwd(*inputs) -> outputs`` and ``bwd``; neither records a graph. What is not differentiable has no
    ``bwd``."""

    backend: str
    fwd: Callable[..., Any]
    bwd: Callable[..., Any] | None


def _checked_backend(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


_DEFAULT_BACKEND = _checked_backend(os.environ.get("M4OV_BACKEND") or None, "M4OV_BACKEND")


class _ThreadState(threading.local):  # torch.compile can trace and guard this; a ContextVar breaks the graph
    override: str | None
    invariant: bool = False  # inside m4ov_kernels.invariant()

    def __init__(self) -> None:  # in each thread; Dynamo's guards do not see a default that the class holds
        self.override = _DEFAULT_BACKEND


_thread = _ThreadState()


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Serve every operator called in this block, on this thread, by one implementation.

    ``name``: ``"reference"``, ``"native"``, ``"triton"``, ``"library"`` (kernels of PyTorch or of an installed package,
    for operators that have no better on a GPU), or ``None`` for the automatic choice (which
    ``M4OV_BACKEND`` overrides for a whole process). A call that the named implementation cannot serve raises
    ``RuntimeError`` with the reason; it never falls back. A backward uses the implementation of its forward.
    """
    previous, _thread.override = _thread.override, _checked_backend(name, "backend()")
    try:
        yield
    finally:
        _thread.override = previous


def requested() -> str | None:
    """The implementation that :func:`backend` or ``M4OV_BACKEND`` asks for on this thread, for host functions."""
    return _thread.override


def invariance_requested() -> bool:
    """Whether this thread is inside :func:`m4ov_kernels.invariant`, for operators with an ``invariant`` option."""
    return _thread.invariant


@contextmanager
def requesting_invariance() -> Iterator[None]:
    """Only the operators' half of :func:`m4ov_kernels.invariant`."""
    previous, _thread.invariant = _thread.invariant, True
    try:
        yield
    finally:
        _thread.invariant = previous


@cache
def native_extension() -> tuple[Any, str]:
    """The compiled module ``m4ov_kernels._C``, or ``None`` and the reason why it is not there."""
    try:
        return importlib.import_module("m4ov_kernels._C"), ""
    except ModuleNotFoundError:
        return None, "the compiled extension is not installed (built with M4OV_BUILD=0, or on a machine without x86)"
    except ImportError as error:
        return None, f"the compiled extension cannot be loaded: {error}"


@cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, and so on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Operator:
    """One operator: registration with ``torch.library``, choice of implementation, differentiation.

    An operator that makes integers of integers is not differentiable: it has no backward, none of the arguments that
    describe one, and says which ``dtypes`` it serves.

    Args:
        family: the package that holds it, e.g. ``"norm"``.
        name: raw ops become ``m4ov::<name>_fwd`` and ``m4ov::<name>_bwd``; an implementation module defines functions
            of the same names, plus ``out=`` for preallocated outputs.
        fwd_schema, bwd_schema: ``torch.library`` schemas without a name.
        fwd_fake, bwd_fake: shape functions.
        results: how many of the forward's outputs, the first ones, are handed on, as a function of its inputs; the
            others are for the backward only. (Each tensor that autograd wraps costs a microsecond.)
        setup_context: ``(ctx, inputs, output)``, saves what the backward needs.
        backward: ``(ctx, needs, bwd, *grad_results)`` → one gradient (or ``None``) per forward input; ``needs`` says
            which inputs want one. ``grad_results`` may be followed by gradients of the other outputs, to be ignored.
        native: devices for which ``native.py`` has kernels.
        serves: other public functions, by name, that are made of this one and have no kernels of their own.
        public: whether there is a public function of the operator's own name.
        backends: the modules that the family has besides its reference. A ``library.py`` also defines
            ``unavailable(device_type, dtype)``: why it cannot serve such tensors, or ``None``.
        declines: ``(backend, device_type, *call)`` → why a backend that serves such tensors has no kernel for this
            call, or ``None``; ``call``: what :meth:`select` is told of it.
        usual: where there is ``declines``: of each public function a call, for ``m4ov doctor``.
    """

    def __init__(
        self,
        family: str,
        name: str,
        *,
        fwd_schema: str,
        fwd_fake: Callable[..., Any],
        bwd_schema: str | None = None,
        bwd_fake: Callable[..., Any] | None = None,
        results: Callable[..., int] | None = None,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
        native: tuple[str, ...] = ("cpu",),
        serves: tuple[str, ...] = (),
        public: bool = True,
        backends: tuple[str, ...] = ("native", "triton"),
        dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
        declines: Callable[..., str | None] | None = None,
        usual: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        self.family, self.name, self.backends, self.dtypes = family, name, backends, dtypes
        self.declines, self.usual = declines, usual or {}
        self.native_devices = native
        self._table: dict[Any, Implementation | None] = {}
        self.registered_fwd, self.registered_bwd = self._register("fwd", fwd_schema, fwd_fake), None
        self.differentiable = bwd_schema is not None
        if bwd_schema is not None:
            if bwd_fake is None or results is None or setup_context is None or backward is None:
                raise TypeError(f"{name}: a backward needs bwd_fake, results, setup_context and backward")
            self.registered_bwd = self._register("bwd", bwd_schema, bwd_fake)
            self.results, self.setup_context, self.backward = results, setup_context, backward
            torch.library.register_autograd(
                f"m4ov::{name}_fwd",
                lambda ctx, *grads: backward(ctx, ctx.needs_input_grad, self.registered_bwd, *grads),
                setup_context=setup_context,
                lib=_library,
            )
        self.functions = (name, *serves) if public else serves
        OPERATORS[name] = self
        FUNCTIONS.update(dict.fromkeys(self.functions, self))

    def _register(self, kind: str, schema: str, fake: Callable[..., Any]) -> Any:
        raw = f"{self.name}_{kind}"
        _library.define(raw + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(raw, self._registered_kernel(kind), "CompositeExplicitAutograd")
        torch.library.register_fake(f"m4ov::{raw}", fake, lib=_library)
        return getattr(torch.ops.m4ov, raw).default

    def _registered_kernel(self, kind: str) -> Callable[..., Any]:
        def kernel(*inputs: Any) -> Any:
            implementation = self.select(inputs[0].device, inputs[0].dtype)
            if implementation is None:
                raise RuntimeError(
                    f"m4ov::{self.name}_{kind} has no kernel for a {inputs[0].dtype} tensor on {inputs[0].device}; "
                    f"call m4ov_kernels.{self.family}.{self.functions[0]}, which has a plain PyTorch reference"
                )
            return getattr(implementation, kind)(*inputs)

        return kernel

    def select(self, device: torch.device, dtype: torch.dtype | None, *call: Any) -> Implementation | None:
        """The raw pair that serves tensors of this device and dtype (``None``: mixed dtypes); ``None``: reference.

        ``call``: what ``declines`` asks about. A backend that was asked for and declines it raises ``RuntimeError``;
        otherwise the next one serves.
        """
        override = _thread.override
        try:
            found = self._table[device, dtype, override, ()]
        except KeyError:
            found = self._find(device, dtype, override, ())
        if call and self.declines is not None:
            declined: tuple[str, ...] = ()
            while found is not None:
                reason = self.declines(found.backend, device.type, *call)
                if reason is None:
                    break
                if override:
                    raise RuntimeError(f"{self.name}: backend {override!r} was asked for, but {reason}")
                declined = (*declined, found.backend)
                found = self._find(device, dtype, override, declined)
        return found

    def _find(
        self, device: torch.device, dtype: torch.dtype | None, override: str | None, declined: tuple[str, ...]
    ) -> Implementation | None:
        key = (device, dtype, override, declined)
        if is_compiling():  # the registered op chooses again when it runs
            return _REGISTERED[self._name_of(*key)]
        if key not in self._table:
            self._table[key] = self._resolve(*key)
        return self._table[key]

    def _name_of(self, *key: Any) -> str:
        found = self._resolve(*key)
        return "reference" if found is None else found.backend

    # Dynamo cannot trace the imports behind the choice. As torch.compiler.assume_constant_result marks it, but without
    # its import of the whole compiler, which takes as long as all the rest.
    _name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _resolve(
        self, device: torch.device, dtype: torch.dtype | None, override: str | None, declined: tuple[str, ...]
    ) -> Implementation | None:
        for name in (override,) if override else _ORDER.get(device.type, ("reference",)):
            if name in declined:
                continue
            reason = self.unavailable(name, device.type, dtype)
            if reason is None:
                return None if name == "reference" else self.load(name)
        raise RuntimeError(f"{self.name}: backend {name!r} was asked for, but {reason}")

    def load(self, name: str) -> Implementation:
        """The raw pair of one backend, whether or not it can run here."""
        module = importlib.import_module(f"m4ov_kernels.{self.family}.{name}")
        bwd = getattr(module, f"{self.name}_bwd") if self.differentiable else None
        return Implementation(name, getattr(module, f"{self.name}_fwd"), bwd)

    def library(self) -> Any:
        """The module that calls other packages' kernels."""
        return importlib.import_module(f"m4ov_kernels.{self.family}.library")

    def unavailable(self, name: str, device_type: str, dtype: torch.dtype | None) -> str | None:
        """Why a backend cannot serve tensors of this device type and dtype; ``None`` if it can."""
        if name == "reference":
            return None
        if name not in self.backends:
            return f"it has no {name} kernels"
        if dtype is None:
            return "its tensors have different dtypes"
        if dtype not in self.dtypes:
            return f"it has no {str(dtype).removeprefix('torch.')} kernels"
        if name == "library":
            reason: str | None = self.library().unavailable(device_type, dtype)
            return reason
        if name == "triton":
            if importlib.util.find_spec("triton") is None:
                return "triton is not installed"
            if device_type != "cuda" and not (device_type == "cpu" and triton_interpreted()):
                return f"triton does not run on {device_type} tensors (TRITON_INTERPRET=1 interprets it on the CPU)"
            return None
        if device_type not in self.native_devices:
            return f"it has no {device_type} kernels"
        extension, reason = native_extension()
        if extension is None:
            return reason
        if device_type == "cuda" and not extension.cuda_targets():
            return "the extension was built without CUDA (M4OV_CUDA)"
        return None

    def __call__(self, implementation: Implementation, *inputs: Any) -> Any:
        """Run a raw forward by whichever road this call needs; inputs in the order of the forward schema.

        Returns what the raw forward returns; of a tuple, at least the first ``results`` outputs.
        """
        if is_compiling() or type(inputs[0]) not in _PLAIN_TENSORS:
            return self.registered_fwd(*inputs)
        if _functorch_is_active():
            raise RuntimeError(f"{self.name}: torch.func transforms work under m4ov_kernels.backend('reference') only")
        if self.differentiable and _is_grad_enabled():
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    return _apply(self, implementation, *inputs)
        return implementation.fwd(*inputs)


OPERATORS: dict[str, Operator] = {}
FUNCTIONS: dict[str, Operator] = {}  # every public function that has kernels, by name, and the operator that serves it


def _never_called(*_: Any, **__: Any) -> Any:
    raise AssertionError("while compiling, operators are called through torch.library")


_REGISTERED = {
    name: None if name == "reference" else Implementation(name, _never_called, _never_called) for name in BACKENDS
}


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, implementation: Implementation, *inputs: Any) -> Any:  # type: ignore[override]
        ctx.operator, ctx.implementation = operator, implementation
        outputs = implementation.fwd(*inputs)
        operator.setup_context(ctx, inputs, outputs)
        return outputs[: operator.results(*inputs)] if type(outputs) is tuple else outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        operator: Operator = ctx.operator
        grads = operator.backward(ctx, ctx.needs_input_grad[2:], ctx.implementation.bwd, *grad_outputs)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _DoubleBackward.apply(operator.name, len(grads), *grads, *ctx.saved_tensors, *grad_outputs)
        return None, None, *grads


class _DoubleBackward(torch.autograd.Function):
    """Hands gradients on, tied to what they were made from, so that a second backward meets an error with a hint."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> Any:  # type: ignore[override]
        ctx.name = name
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} is differentiable once; for a double backward run it under m4ov_kernels.backend('reference')"
        )


# Function.apply in Python also looks for torch.func transforms, which Operator.__call__ has done, and costs 2 µs.
_apply = super(torch.autograd.Function, _Differentiable).apply
