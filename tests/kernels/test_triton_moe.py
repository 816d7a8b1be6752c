"""The Triton kernels of the mixture-of-experts operators, on the GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m4ov_kernels
from m4ov_kernels import configs, grouped_linear, permute, unpermute
from m4ov_kernels.configs import Row
from m4ov_kernels.gpu import Config

from . import strategies
from .operators.moe import GROUPED_LINEAR, PERMUTE, ROUTE_TOPK, UNPERMUTE
from .triton_blocks import DEVICE, DTYPES


@pytest.fixture(autouse=True)
def small_blocks():
    """So that small shapes have several blocks and tails."""
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    rows = [Row(name, "any", None, Config(tiles)) for name in ("grouped_linear", "grouped_linear_weight")]
    names = ("permute_fwd", "unpermute_fwd", "unpermute_bwd", "unpermute_weights")
    rows += [Row(name, "any", None, Config({"BLOCK_ROWS": 2, "BLOCK_D": 64})) for name in names]
    for name in ("route_topk_fwd", "route_topk_bwd"):
        rows += [Row(name, "any", width, Config({"BLOCK_T": 4, "BLOCK_E": width})) for width in (32, 512)]
    with configs.override(*rows):
        yield


@pytest.mark.parametrize("case", [ROUTE_TOPK, PERMUTE, UNPERMUTE, GROUPED_LINEAR], ids=str)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_shared_cases(case, data):
    """As the shared cases draw and judge them."""
    call = data.draw(strategies.drawn(case.call))
    if case.kernel_dtype(call.arguments) not in DTYPES:
        return
    if sum(value.numel() for value in call.arguments.values() if isinstance(value, Tensor)) > 20000:
        return  # interpreted, a tile takes a millisecond
    arguments = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in call.arguments.items()
    }
    call = call._replace(arguments=arguments, grads={name: grad.to(DEVICE) for name, grad in call.grads.items()})
    with m4ov_kernels.backend("triton"):
        got = case.evaluate(call)
    case.judge(call, got)
    m4ov_kernels.check()


def refused(match: str) -> None:
    with pytest.raises(ValueError, match=match):
        m4ov_kernels.check()
    m4ov_kernels.check()  # once


def test_what_only_the_device_sees():
    """NaN where it matters, and an error that names operator, argument and position when it is asked for."""
    rows = torch.randn(6, 20, device=DEVICE, requires_grad=True)
    with m4ov_kernels.backend("triton"):
        experts = torch.tensor([[1, 0], [7, 2], [0, -1]], dtype=torch.int32, device=DEVICE)
        taken, _, offsets = permute(rows[:3], experts, 3)
        assert offsets.tolist() == [0, 2, 3, 4]
        assert taken[:4].isfinite().all()
        assert taken[4:].isnan().all()
        refused(r"permute: experts\[2\] is not in \[0, num_experts\)")

        wrong = torch.tensor([[0, 1], [2, 9], [4, 5]], dtype=torch.int32, device=DEVICE)
        summed = unpermute(rows, wrong)
        assert summed[1].isnan().all()
        assert summed[[0, 2]].isfinite().all()
        refused(r"unpermute: order\[3\] is no row, or is there twice")

        weights = torch.ones(3, 2, device=DEVICE, requires_grad=True)
        twice = torch.tensor([[0, 1], [2, 3], [4, 4]], dtype=torch.int32, device=DEVICE)
        grads = torch.autograd.grad(unpermute(rows, twice, weights).sum(), (rows, weights))
        assert grads[0][5].isnan().all()
        assert grads[0][:4].isfinite().all()
        assert int(grads[1].isnan().sum()) == 1
        refused(r"unpermute: order\[[45]\] is no row, or is there twice")

        weight = torch.randn(2, 8, 20, device=DEVICE, requires_grad=True)
        for bounds, position in (([1, 3, 6], 0), ([0, 4, 3], 2), ([0, 2, 5], 2), ([0, 2**30, 6], 2)):
            out = grouped_linear(rows, weight, torch.tensor(bounds, device=DEVICE))
            assert out.isnan().all()
            assert all(grad.isnan().all() for grad in torch.autograd.grad(out.sum(), (rows, weight)))
            refused(rf"grouped_linear: offsets\[{position}\] is not 0 at the start")


def test_more_experts_than_any_table_has():
    with m4ov_kernels.backend("triton"), pytest.raises(RuntimeError, match="at most 2048 experts; got 600"):
        m4ov_kernels.route_topk(torch.randn(2, 600, device=DEVICE), top_k=2)
