"""Muon against PyTorch's own, of stacks and of shards; and the schedule."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from m4ov.models.qwen3_vl import build, cast_parameters
from m4ov.parallel import ranks
from m4ov.recipe import OptimConfig
from m4ov.train import World
from m4ov.train.muon import Muon, orthogonalised
from m4ov.train.optim import Optimizer, learning_rate_scale
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


OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "dtype": torch.float32}


def drawn(shape: Sequence[int], steps: int = 3) -> list[torch.Tensor]:
    """A weight and its gradients, the same in every process."""
    generator = torch.Generator().manual_seed(int(os.environ["M4OV_TEST_SEED"]))
    return [torch.randn(*shape, generator=generator) for _ in range(1 + steps)]


def expert_by_expert(shape: Sequence[int]) -> torch.Tensor:
    """A stack of matrices (or one), each trained by an optimizer of its own."""
    experts = []
    for start, *grads in zip(*(part.reshape(-1, *shape[-2:]).unbind(0) for part in drawn(shape)), strict=True):
        expert = nn.Parameter(start.clone())
        optimizer = Muon([expert], **OPTIONS)
        for grad in grads:
            expert.grad = grad.clone()
            optimizer.step()
        experts.append(expert.detach())
    return torch.stack(experts).view(*shape)


@pytest.mark.parametrize("shape", [(3, 24, 16), (2, 16, 40), (1, 8, 8)])
def test_muon_takes_every_expert_by_itself(shape):
    start, *grads = drawn(shape)
    stack = nn.Parameter(start.clone())
    optimizer = Muon([stack], **OPTIONS)
    for grad in grads:
        stack.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(stack.detach(), expert_by_expert(shape), rtol=1e-4, atol=1e-5)


def test_muon_takes_a_convolution_of_patches_as_one_matrix():
    start, *grads = drawn((6, 2, 3, 4))
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1))
    one, other = Muon([kernel], **OPTIONS), Muon([matrix], **OPTIONS)
    for grad in grads:
        kernel.grad, matrix.grad = grad.clone(), grad.flatten(1)
        one.step()
        other.step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


# How weights lie on four ranks: experts, unevenly, fewer than ranks, matrices cut as well; and a matrix cut twice.
LAID_OUT = [
    ((4,), (Shard(0),), (6, 24, 16)),
    ((4,), (Shard(0),), (2, 24, 16)),
    ((4,), (Shard(1),), (3, 24, 16)),
    ((2, 2), (Shard(1), Shard(0)), (3, 24, 16)),
    ((2, 2), (Shard(2), Shard(0)), (1, 24, 16)),
    ((2, 2), (Replicate(), Shard(0)), (5, 24, 16)),
    ((2, 2), (_StridedShard(0, split_factor=2), Shard(0)), (8, 24, 16)),
    ((2, 2), (Shard(1), Shard(0)), (24, 16)),
    ((2, 2), (_StridedShard(0, split_factor=2), Shard(0)), (24, 16)),
]


def laid_out() -> list[torch.Tensor]:
    return [_laid_out(*case) for case in LAID_OUT]


def _laid_out(mesh_shape: tuple[int, ...], placements: tuple, shape: tuple[int, ...]) -> torch.Tensor:
    mesh = init_device_mesh("cpu", mesh_shape)
    start, *grads = (distribute_tensor(part, mesh, placements) for part in drawn(shape))
    optimizer = Muon([start, start.clone()], **OPTIONS, world=World(dist.get_rank(), 4))
    shards = optimizer.param_groups[0]["params"]
    for grad in grads:
        for shard in shards:
            shard.grad = grad.to_local().clone()
        optimizer.step()
    return start.full_tensor()


def test_muon_takes_every_expert_by_itself_wherever_it_lies():
    found = ranks.run(laid_out, 4)
    for place, case in enumerate(LAID_OUT):
        wanted = expert_by_expert(case[2])
        for rank in range(4):
            torch.testing.assert_close(found[rank][place], wanted, rtol=1e-4, atol=1e-5, msg=str(case))
            assert torch.equal(found[rank][place], found[0][place]), case


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


def test_the_sum_of_the_gradients_is_divided_before_it_is_clipped():
    """As the mean's gradient would be clipped; and parts of a step add up."""
    whole, parts = (nn.Linear(3, 2) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    config = OptimConfig(max_grad_norm=0.5)
    one, other = Optimizer(whole, config, steps=10), Optimizer(parts, config, steps=10)
    inputs = torch.randn(6, 3)
    whole(inputs).square().sum(-1).mean().backward()
    norm = one.step(3)
    for part in inputs.split([1, 3, 2]):
        parts(part).square().sum().backward()
        other.accumulate()
    torch.testing.assert_close(other.step(3, 6), norm)
    assert norm > 0.5
    for first, second in zip(one.weights, other.weights, strict=True):
        torch.testing.assert_close(first, second)


def test_float32_weights_are_not_held_twice():
    model = nn.Linear(3, 2)
    optimizer = Optimizer(model, OptimConfig(), steps=10)
    assert [weight.data_ptr() for weight in optimizer.weights] == [p.data_ptr() for p in model.parameters()]


def test_the_state_is_there_before_the_first_step():
    """A checkpoint has the same names at every step, so that it can be loaded into a fresh optimizer."""
    model = nn.ModuleDict({"text": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 2)])})})
    names = {
        "weight.text.layers.0.weight",
        "weight.text.layers.0.bias",
        "AdamW.step.text.layers.0.bias",
        "AdamW.exp_avg.text.layers.0.bias",
        "AdamW.exp_avg_sq.text.layers.0.bias",
        "Muon.momentum_buffer.text.layers.0.weight",
    }
    assert Optimizer(model, OptimConfig(), steps=10).tensors().keys() == names
