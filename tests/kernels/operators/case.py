"""What an operator declares so that the shared tests and the fuzzer can call it, judge it and abuse it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import m4ov_kernels
from m4ov_kernels.dispatch import KERNEL_DTYPES

from .. import draws
from ..draws import Draw
from ..numerics import assert_accurate
from .corruptions import Corruption


class Call(NamedTuple):
    """Valid arguments of an operator, the gradients of its results that are handed in (none: forward only), and the
    arguments whose gradients are wanted."""

    arguments: dict[str, Any]
    grads: dict[str, Tensor]
    wanted: tuple[str, ...]

    def __repr__(self) -> str:
        parts = [f"{name}={draws.describe(value)}" for name, value in self.arguments.items()]
        parts += [f"grad of {name}: {draws.describe(grad)}" for name, grad in self.grads.items()]
        return f"({', '.join(parts)}; gradients of {', '.join(self.wanted) or 'nothing'})"


def _no_terms(call: Call) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class OperatorCase:
    """One of ``dispatch.FUNCTIONS``.

    ``function``: the public function. ``arguments``: draws valid keyword arguments. ``results``: of such arguments,
    the name, shape and dtype of each result. ``differentiable``: the arguments that have a gradient. ``corruptions``:
    every single fault that must be refused. ``terms``: see ``numerics.assert_accurate``; by the name of a result, or
    ``grad_<argument>``. ``definition``: what to judge by, under the reference backend; the function itself if it need
    not be said. ``bitwise``: of a dtype, whether threads and alignment leave the bits as they are. ``settings``: of
    the arguments, a context to call it in, such as a smaller block size. ``share``: of the fuzzer's calls.
    ``gradient_values``: kinds of values (``draws.VALUES``) of the gradients that are handed in.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[[Draw], dict[str, Any]]
    results: Callable[..., Mapping[str, tuple[Sequence[int], torch.dtype]]]
    differentiable: tuple[str, ...]
    corruptions: tuple[Corruption, ...]
    terms: Callable[[Call], dict[str, Tensor]] = _no_terms
    definition: Callable[..., Any] | None = None
    bitwise: Callable[[torch.dtype], bool] = lambda dtype: True
    share: int = 4
    settings: Callable[[Draw, dict[str, Any]], AbstractContextManager[Any]] = lambda draw, arguments: nullcontext()
    gradient_values: Sequence[str] = draws.GRADIENT_VALUES

    def __repr__(self) -> str:
        return self.name

    def kernel_dtype(self, arguments: Mapping[str, Any]) -> torch.dtype | None:
        """The dtype whose kernels serve such a call; ``None``: the reference does."""
        dtypes = {arguments[name].dtype for name in self.differentiable if arguments.get(name) is not None}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(KERNEL_DTYPES) else None

    def call(self, draw: Draw) -> Call:
        """A valid call: mostly with a backward, sometimes with a frozen tensor or a result that nothing uses."""
        arguments = self.arguments(draw)
        present = [name for name in self.differentiable if arguments.get(name) is not None]
        wanted = tuple(name for name in present if not draw.one_in(6)) if not draw.one_in(5) else ()
        results = self.results(**arguments)
        used = [name for name, (_, dtype) in results.items() if dtype.is_floating_point]
        if len(used) > 1 and draw.one_in(6):
            used.remove(draw.choice(used))
        grads = {}
        if wanted:
            kind = draws.kinds(draw, self.gradient_values)
            grads = {name: draws.tensor(draw, *results[name], kind()) for name in used}
        return Call(arguments, grads, wanted)

    def evaluate(
        self, call: Call, dtype: torch.dtype | None = None, function: Callable[..., Any] | None = None
    ) -> dict[str, Tensor]:
        """Results, and gradients as ``grad_<argument>``; with every floating tensor converted, if a dtype is given."""
        arguments = dict(call.arguments)
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                copy = value.detach() if dtype is None else value.detach().to(dtype)
                arguments[name] = copy.requires_grad_(name in call.wanted)
        returned = (function or self.function)(**arguments)
        expected = self.results(**arguments)
        results = dict(zip(expected, returned if isinstance(returned, tuple) else (returned,), strict=True))
        for name, (shape, kind) in expected.items():
            found = results[name]
            assert (tuple(found.shape), found.dtype) == (tuple(shape), kind), f"{name}: {draws.describe(found)}"
        if not call.wanted:
            return results
        inputs = [arguments[name] for name in call.wanted]
        # What a result does not depend on has no gradient from it in plain PyTorch, and zeros in ours.
        outputs = [name for name in call.grads if results[name].requires_grad]
        grads = [call.grads[name].to(results[name].dtype) for name in outputs]
        gradients: Sequence[Tensor] = [torch.zeros_like(value) for value in inputs]
        if outputs:
            gradients = torch.autograd.grad([results[name] for name in outputs], inputs, grads, materialize_grads=True)
        for name, value, gradient in zip(call.wanted, inputs, gradients, strict=True):
            assert (gradient.shape, gradient.dtype) == (value.shape, value.dtype), f"grad_{name}"
        return {name: result.detach() for name, result in results.items()} | {
            f"grad_{name}": gradient for name, gradient in zip(call.wanted, gradients, strict=True)
        }

    def judge(self, call: Call, got: Mapping[str, Tensor]) -> None:
        """The numerics rule for every result and gradient, against plain PyTorch and against float64. Says nothing of
        calls that plain PyTorch serves."""
        if self.kernel_dtype(call.arguments) is None:
            return
        with m4ov_kernels.backend("reference"):
            plain, exact = (self.evaluate(call, dtype, self.definition) for dtype in (None, torch.float64))
        terms = self.terms(call)
        given = [*call.grads.values(), *(call.arguments[name] for name in self.differentiable)]
        endless = any(tensor is not None and tensor.isinf().any() for tensor in given)
        for name, tensor in got.items():
            if not tensor.is_floating_point():
                assert torch.equal(tensor, plain[name]), name
                continue
            if endless and name.startswith("grad_"):  # inf · 0 is NaN and inf · 1e-40 is inf: both say overflow
                tensor = torch.where(tensor.isfinite(), tensor, torch.nan)
                plain[name] = torch.where(plain[name].isfinite(), plain[name], torch.nan)
            assert_accurate(name, tensor, plain[name], exact[name], terms.get(name))

    def refuse(self, arguments: dict[str, Any], corruption: Corruption, draw: Draw) -> bool:
        """Call it with one argument corrupted; it must say so. False: there is no such fault in this call."""
        changed = corruption.change(arguments, draw)
        if changed is None:
            return False
        changes, came = changed
        refused: Exception | None = None
        try:
            self.function(**(arguments | changes))
        except (TypeError, ValueError) as error:
            refused = error
        assert refused is not None, f"{corruption} was not refused: {came}"
        kind = type(refused).__name__
        assert type(refused) is corruption.error, f"{kind} instead of {corruption.error.__name__}: {refused}"
        said = re.fullmatch(
            rf"{self.name}: {corruption.argument}(?:"
            r" must be (?P<expected>.+?); got (?P<came>.+)|\[\d+\] is (?P<value>.+?): expected (?P<range>.+))",
            str(refused),
            re.DOTALL,
        )
        assert said, f"the message does not say operator, argument, what was expected and what came: {refused}"
        assert came in (said["came"] or said["value"]), f"the message does not say that {came} came: {refused}"
        return True


@dataclass(frozen=True)
class IndexCase(OperatorCase):
    """An operator that makes integers of integers: nothing is differentiable, and the definition is met to the bit."""

    def __repr__(self) -> str:
        return self.name

    def kernel_dtype(self, arguments: Mapping[str, Any]) -> torch.dtype | None:
        return torch.int64

    def judge(self, call: Call, got: Mapping[str, Tensor]) -> None:
        with m4ov_kernels.backend("reference"):
            expected = self.evaluate(call)
        for name, tensor in got.items():
            assert torch.equal(tensor, expected[name]), name
