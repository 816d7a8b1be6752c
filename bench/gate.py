"""The correctness gate in front of every speed: the numerics rule, per output and gradient.

Judged against float64, in RMS and in max-norm: error(ours) ≤ 2 · error(plain PyTorch in the same dtype) + eps(dtype) ·
size of the exact tensor. Outputs are filled with NaN before the call, so an element that is not written is red. Where
plain PyTorch overflows, ours may; where it is finite, ours must be, and a NaN of its must be one of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """``errors``: tensor name → our error over the allowed one, the worse of RMS and max-norm; 1 or less is green."""

    errors: dict[str, float]
    problem: str = ""

    @property
    def green(self) -> bool:
        return not self.problem

    def __add__(self, other: Gate) -> Gate:
        return Gate({**self.errors, **other.errors}, "; ".join(filter(None, (self.problem, other.problem))))


def compare(name: str, ours: Tensor, plain: Tensor, exact: Tensor, terms: Tensor | None = None) -> Gate:
    """``plain``: PyTorch in the dtype of ``ours``; ``exact``: the same in float64. All of one shape.

    ``terms``: where the result is a difference of larger terms that nearly cancel (the gradient of a norm of narrow
    rows), those terms in float64, shaped as the result. The eps is then of them, and each may carry four float32
    roundings of its own: PyTorch's error in such an element says nothing, it can be 0 by chance.
    """
    if not ours.shape == plain.shape == exact.shape or ours.dtype != plain.dtype:
        return Gate({name: float("inf")}, f"{name}: {describe(ours)} instead of {describe(plain)}")
    if not ours.is_floating_point():
        different = int((ours != exact).sum())
        problem = f"{name}: {different} integers differ" if different else ""
        return Gate({name: float("inf") if different else 0.0}, problem)
    finite = plain.isfinite() & exact.isfinite()
    lost = (finite & ~ours.isfinite()) | (plain.isnan() & exact.isnan() & ~ours.isnan())
    if bool(lost.any()):
        first = lost.nonzero()[0].tolist()
        problem = f"{name}: {int(lost.sum())} elements are not finite, or NaN, where PyTorch's are; first {first}"
        return Gate({name: float("inf")}, problem)
    size_of_terms = torch.zeros_like(exact) if terms is None else terms.double().abs()
    scale = torch.maximum(exact.abs(), size_of_terms) * torch.finfo(ours.dtype).eps
    scale = (scale + size_of_terms * (4 * torch.finfo(torch.float32).eps))[finite]
    our_error, plain_error = (ours.double() - exact)[finite], (plain.double() - exact)[finite]
    worst, problem = 0.0, ""
    for size, title in ((_max, "max-norm"), (_rms, "RMS")):
        error, allowed = size(our_error), 2 * size(plain_error) + size(scale)
        if not error <= allowed:
            problem = f"{name}: {title} error {error:.3e}, allowed {allowed:.3e}"
            worst = max(worst, error / allowed) if error == error and allowed else float("inf")
        elif allowed:
            worst = max(worst, error / allowed)
    return Gate({name: worst}, problem)


def compare_all(
    names: Sequence[str],
    ours: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    terms: Mapping[str, Tensor] | None = None,
) -> Gate:
    gate = Gate({})
    for name, tensors in zip(names, zip(ours, plain, exact, strict=True), strict=True):
        gate += compare(name, *tensors, terms=(terms or {}).get(name))
    return gate


def poisoned(*likes: Tensor) -> tuple[Tensor, ...]:
    """Contiguous outputs of these shapes and dtypes, full of NaN, or of a number that nothing makes."""
    return tuple(torch.full_like(like, poison_of(like), memory_format=torch.contiguous_format) for like in likes)


def poison_of(tensor: Tensor) -> float | int:
    return float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _max(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


def differentiated(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor] | None
) -> list[Tensor]:
    """Outputs, then the gradients of those inputs that require one (integer inputs pass through unchanged)."""
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [tensor for tensor in leaves if tensor.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, grads) if wanted else ()
    return [tensor.detach() for tensor in outputs] + list(gradients)


class Truth:
    """What a function of ``inputs`` should give: by plain PyTorch in their dtype, and in float64. For judging peers.

    ``definition``: plain PyTorch, of the inputs; ``grads``: of its outputs, ``None`` for a scalar.
    """

    def __init__(
        self, definition: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor] | None
    ) -> None:
        self.inputs, self.grads, self.dtype = inputs, grads, inputs[0].dtype
        self.plain = differentiated(definition, inputs, grads)
        doubled = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
        doubled = [new.detach().requires_grad_(old.requires_grad) for new, old in zip(doubled, inputs, strict=True)]
        self.exact = differentiated(definition, doubled, None if grads is None else [grad.double() for grad in grads])

    def judge(self, function: Callable[..., Any], backward: bool) -> Gate:
        """The numerics rule, with the dtype of the inputs as that of the results: eager PyTorch's bf16 loss is bf16."""
        if backward:
            results = differentiated(function, self.inputs, self.grads)
        else:
            with torch.no_grad():
                outputs = function(*self.inputs)
            results = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        names = [f"result {place}" for place in range(len(results))]
        results, plain = ([tensor.to(self.dtype) for tensor in tensors] for tensors in (results, self.plain))
        return compare_all(names, results, plain[: len(results)], self.exact[: len(results)])
