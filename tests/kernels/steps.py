"""A training step of a model, and what it is compared by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = tuple[Tensor, dict[str, Tensor]]  # the loss, and gradients by name


def step(model: Any, batch: dict[str, Any], **options: Any) -> Step:
    """The loss of one call in training mode, and the gradient of every parameter that the loss depends on."""
    model.train()
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {name: grad for name, grad in grads.items() if grad is not None}


def in_float64(model: Any, batch: dict[str, Any], **options: Any) -> Callable[[], Step]:
    """The same step of a copy of ``model`` in float64, made when it is asked for."""

    def made() -> Step:
        wide = copy.deepcopy(model).double()
        if hasattr(wide.config.get_text_config(), "num_experts"):
            wide.set_experts_implementation("eager")  # PyTorch's grouped product knows no float64
        return step(wide, as_dtype(batch, torch.float64), **options)

    return made


def assert_same_step(ours: Step, theirs: Step, exact: Callable[[], Step] | None = None) -> None:
    """Loss and every gradient, to 1e-5 of its norm. A gradient that is nothing but rounding (of a key's bias: softmax
    ignores it) is judged by a hundredth of the largest.

    Two float32 runs of one model may differ by more, since each has an error of its own. Then ``exact``, if given, is
    the judge, by the numerics rule: ours may be no more than twice as far from it as theirs.
    """
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    floor = 1e-2 * max(float(gradient.norm()) for gradient in theirs[1].values())
    distances = {
        name: float((ours[1][name] - expected).norm()) / max(float(expected.norm()), floor)
        for name, expected in theirs[1].items()
    }
    far = {name: distance for name, distance in distances.items() if not distance <= 1e-5}
    if far and exact is not None:
        truth = exact()[1]
        far = {
            name: distance
            for name, distance in far.items()
            if not (ours[1][name] - truth[name]).norm()
            <= 2 * (theirs[1][name] - truth[name]).norm() + 2**-23 * max(float(truth[name].norm()), floor)
        }
    assert not far, far


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the norm."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    error = float((ours - theirs).norm() / theirs.norm())
    assert error <= 1e-5, f"{error:.2e}"


def logits_of(model: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    """In eval mode, without labels."""
    return model.eval()(**{**batch, "labels": None}, **options).logits.detach()


def as_dtype(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
