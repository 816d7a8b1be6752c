"""Muon against PyTorch's own, and the schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from m4ov.models.qwen3_vl import build, cast_parameters
from m4ov.recipe import OptimConfig
from m4ov.train.optim import Muon, Optimizer, learning_rate_scale, orthogonalised
from tests.tiny_task import tiny_task


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_equals_torch(shape):
    """Three matrices at once as PyTorch does them one by one, within what bfloat16 rounding gives."""
    start = [torch.randn(shape) for _ in range(3)]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    one, other = Muon(ours, **options), torch.optim.Muon(theirs, **options, nesterov=True, adjust_lr_fn="original")
    for _ in range(4):
        for mine, peer in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(shape)
            peer.grad = mine.grad.clone()
        one.step()
        other.step()
    for begun, mine, peer in zip(start, ours, theirs, strict=True):
        moved = (peer - begun).norm()
        assert (mine - peer).norm() <= 0.03 * moved


@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 16, 64), (3, 64, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape) + 0.1).float())
    assert values.max() < 1.35
    assert values.median() > 0.6


def test_the_schedule_warms_up_and_falls_to_zero():
    scales = [learning_rate_scale(step, 100, 10) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert max(scales) == pytest.approx(max(scales[8:12]))
    assert scales[-1] < 0.001
    assert all(later < earlier for earlier, later in pairwise(scales[12:]))


def test_the_model_computes_with_rounded_master_weights():
    model = cast_parameters(build(tiny_task().model_config, 0), torch.bfloat16)
    optimizer = Optimizer(model, OptimConfig(), steps=10)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [weight.clone() for weight in optimizer.weights]
    optimizer.step(5)
    for old, weight, used in zip(before, optimizer.weights, optimizer.used, strict=True):
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, old)
        assert torch.equal(used, weight.bfloat16())
        assert used.grad is None


def test_restore_refuses_another_model():
    optimizer = Optimizer(nn.Linear(3, 2), OptimConfig(), steps=10)
    with pytest.raises(ValueError, match=r"weight weight: expected \[2, 3\], found nothing"):
        optimizer.restore({})
    with pytest.raises(ValueError, match=r"found \[3, 3\]"):
        optimizer.restore({"weight.weight": torch.zeros(3, 3), "weight.bias": torch.zeros(2)})
