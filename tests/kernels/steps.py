"""A training step of a model, and what it is compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def step(model: Any, batch: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one call in training mode, and the gradient of every parameter that the loss depends on."""
    model.train()
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {name: grad for name, grad in grads.items() if grad is not None}


def assert_same_step(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-5
) -> None:
    """Loss and every gradient, relative to its norm. A gradient that is nothing but rounding (of a key's bias: softmax
    ignores it) is judged by a hundredth of the largest."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    floor = 1e-2 * max(float(gradient.norm()) for gradient in theirs[1].values())
    for name, expected in theirs[1].items():
        error = float((ours[1][name] - expected).norm()) / max(float(expected.norm()), floor)
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.2e}"


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the norm."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    error = float((ours - theirs).norm() / theirs.norm())
    assert error <= tolerance, f"{error:.2e} > {tolerance:.2e}"


def logits_of(model: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    """In eval mode, without labels."""
    return model.eval()(**{**batch, "labels": None}, **options).logits.detach()


def as_dtype(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
