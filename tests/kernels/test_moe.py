"""Mixture of experts: what the operators choose, order and sum, and the block of them against plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import m4ov_kernels
from m4ov_kernels import grouped_linear, permute, route_topk, unpermute
from m4ov_kernels import nn as ours
from m4ov_kernels.moe import ExpertLoad, reference

from .numerics import assert_accurate


def backends():
    yield "reference"
    if m4ov_kernels.dispatch.native_extension()[0] is not None:
        yield "native"


@pytest.fixture(params=list(backends()))
def backend(request):
    with m4ov_kernels.backend(request.param):
        yield request.param


def test_of_equal_logits_the_lower_expert_comes_first(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, -0.0, 0.0, 3.0, 2.0], [0.0] * 7]).bfloat16()
    weights, experts, load = route_topk(logits, top_k=5)
    assert experts.tolist() == [[1, 2, 5, 6, 0], [0, 1, 2, 3, 4]]
    assert load.counts.tolist() == [2, 2, 2, 1, 1, 1, 1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    torch.testing.assert_close(weights[1], torch.full((5,), 0.2))
    torch.testing.assert_close(load.probability, logits.float().softmax(-1).mean(0))


def test_logits_that_make_equal_probabilities_are_still_ordered(backend):
    """Below the smallest float32, both exponentials are 0."""
    _, experts, _ = route_topk(torch.tensor([[0.0, -301.0, -300.0, -302.0]]), top_k=3)
    assert experts.tolist() == [[0, 2, 1]]


def test_nan_comes_first_and_infinities_choose_different_experts(backend):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[0.0, nan, inf, 1.0], [inf, 0.0, inf, 1.0], [-inf, -inf, -inf, -inf], [-inf, 0.0, 1.0, -inf]]
    )
    weights, experts, load = route_topk(logits, top_k=3)
    assert experts.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 2], [2, 1, 0]]
    assert weights[:3].isnan().all()
    torch.testing.assert_close(weights[3], torch.tensor([1.0, 0.0, -inf]).softmax(0))
    assert load.counts.sum() == 12


def test_many_experts_of_each_token(backend):
    """More than the compiled kernel holds ranks of."""
    logits = torch.randn(9, 300)
    weights, experts, _ = route_topk(logits, top_k=200, normalize=False)
    values, indices = logits.softmax(-1).sort(descending=True, stable=True)
    assert torch.equal(experts, indices[:, :200].int())
    torch.testing.assert_close(weights, values[:, :200])


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_of_the_references(normalize):
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.route_topk(x, 3, normalize)[::3], logits)
    hidden, experts = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randint(4, (5, 2)).int()
    assert torch.autograd.gradcheck(lambda x: reference.permute(x, experts, 4)[0], hidden)
    order = torch.randperm(10).view(5, 2).int()
    rows, weights = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((10, 3), (5, 2)))
    assert torch.autograd.gradcheck(lambda r, w: reference.unpermute(r, order, w), (rows, weights))
    offsets = torch.tensor([0, 3, 3, 10])
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: reference.grouped_linear(r, w, offsets), (rows, weight))


def test_rows_are_ordered_by_expert_then_token(backend):
    experts = torch.tensor([[2, 0], [0, 3], [2, 0]], dtype=torch.int32)
    hidden = torch.randn(3, 5)
    rows, order, offsets = permute(hidden, experts, 5)
    assert offsets.tolist() == [0, 3, 3, 5, 6, 6]
    assert order.tolist() == [[3, 0], [1, 5], [4, 2]]
    assert torch.equal(rows, hidden[[0, 1, 2, 0, 2, 1]])
    assert torch.equal(unpermute(rows, order, torch.tensor([[0.25, 0.75]] * 3)), hidden * 0.25 + hidden * 0.75)
    assert torch.equal(unpermute(rows, order), hidden + hidden)


def test_an_expert_chosen_twice_by_one_token(backend):
    rows, order, offsets = permute(torch.randn(2, 3), torch.tensor([[1, 1], [1, 0]], dtype=torch.int32), 2)
    assert offsets.tolist() == [0, 1, 4]
    assert order.tolist() == [[1, 2], [3, 0]]
    assert rows.shape == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_hand_nan_and_infinity_on(backend, dtype, isa):
    """Within their rows and experts, and to nobody else."""
    rows, weight = torch.randn(40, 33).to(dtype), torch.randn(3, 20, 33).to(dtype)
    rows[7, 5], rows[30, 2], weight[1, 4, 32] = torch.nan, torch.inf, -torch.inf
    offsets = torch.tensor([0, 10, 28, 40])
    expected = torch.cat([x.double() @ w.double().mT for x, w in zip(rows.split([10, 18, 12]), weight, strict=True)])
    found = grouped_linear(rows, weight, offsets).double()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found.sign()[expected.isinf()], expected.sign()[expected.isinf()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skew", ["one expert has all", "Zipf", "mostly empty"])
def test_skewed_experts(dtype, skew):
    """Sizes past every block of the kernels; the gradient of an expert without rows is written, as zeros."""
    experts, width, columns = 24, 136, 200
    if skew == "one expert has all":
        sizes = [0] * experts
        sizes[5] = 1400
    elif skew == "Zipf":
        sizes = [700 // (expert + 1) for expert in range(experts)]
    else:
        sizes = [expert % 7 == 3 for expert in range(experts)]
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    rows, weight = torch.randn(sum(sizes), width).to(dtype), torch.randn(experts, columns, width).to(dtype)
    grad = torch.randn(sum(sizes), columns).to(dtype)

    def run(kind, name):
        leaves = [x.to(kind).requires_grad_() for x in (rows, weight)]
        with m4ov_kernels.backend(name):
            out = grouped_linear(*leaves, offsets)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))]

    mine, plain, exact = run(dtype, None), run(dtype, "reference"), run(torch.float64, "reference")
    for name, a, b, c in zip(("output", "grad_rows", "grad_weight"), mine, plain, exact, strict=True):
        assert_accurate(name, a, b, c)
    empty = torch.tensor([size == 0 for size in sizes])
    assert not mine[2][empty].any()
    assert mine[2][~empty].any()


def test_a_weight_as_checkpoints_hold_it_gives_the_same_bits():
    """``[E, K, N]``, transposed: the other kernel, with sums in the same order."""
    rows, weight = torch.randn(70, 600).bfloat16(), torch.randn(3, 130, 600).bfloat16()
    offsets = torch.tensor([0, 20, 21, 70])
    across = weight.mT.contiguous().mT
    assert torch.equal(grouped_linear(rows, across, offsets), grouped_linear(rows, weight, offsets))


class Plain(nn.Module):
    """The block as a loop over experts with masks, in plain PyTorch."""

    def __init__(self, block):
        super().__init__()
        self.block = copy.deepcopy(block)

    def forward(self, x):
        router, experts = self.block.gate, self.block.experts
        flat = x.reshape(-1, x.shape[-1])
        probabilities = F.linear(flat, router.weight).softmax(-1)
        chosen, indices = probabilities.topk(router.top_k)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for expert in range(router.num_experts):
            weight = (chosen * (indices == expert)).sum(-1, keepdim=True)
            gate, up = F.linear(flat, experts.gate_up_proj[expert]).chunk(2, -1)
            out = out + weight * F.linear(F.silu(gate) * up, experts.down_proj[expert])
        counts = torch.stack([(indices == expert).sum() for expert in range(router.num_experts)])
        return out.view(x.shape), ExpertLoad(counts, probabilities.mean(0))


def test_the_block_is_the_loop_over_experts(backend):
    """Output, and the gradients of everything from it and from the balance loss."""
    block = ours.MoE(32, 24, 6, 2)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, grad = torch.randn(2, 11, 32), torch.randn(2, 11, 32)

    def run(model, dtype):
        given = [x.to(dtype).requires_grad_(), *model.parameters()]
        out, load = model(given[0])
        balance = ours.load_balancing_loss([load], tokens=22)
        grads = torch.autograd.grad([out, balance], given, [grad.to(dtype), torch.tensor(3.0, dtype=dtype)])
        return [out.detach(), balance.detach(), *grads], load.counts

    found, counts = run(block, torch.float32)
    plain, _ = run(Plain(block), torch.float32)
    exact, expected_counts = run(Plain(block).double(), torch.float64)
    assert torch.equal(counts, expected_counts)
    for name, a, b, c in zip(("output", "balance", "x", "gate", "gate_up", "down"), found, plain, exact, strict=True):
        assert_accurate(name, a, b, c)


def test_the_balance_loss_is_hugging_faces():
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    logits = tuple(torch.randn(30, 8) for _ in range(3))
    loads = [route_topk(x, top_k=2)[2] for x in logits]
    torch.testing.assert_close(ours.load_balancing_loss(loads, tokens=30), load_balancing_loss_func(logits, 8, 2))
    even = torch.eye(8).repeat(4, 1) * 20
    load = route_topk(even, top_k=1)[2]
    torch.testing.assert_close(ours.load_balancing_loss([load], tokens=32), torch.tensor(1.0))
    with pytest.raises(ValueError, match="loads must be at least one ExpertLoad; got none"):
        ours.load_balancing_loss([], tokens=3)


def test_a_block_without_tokens(backend):
    block = ours.MoE(8, 12, 4, 2)
    out, load = block(torch.randn(0, 8, requires_grad=True))
    assert out.shape == (0, 8)
    assert not load.counts.any()
    assert torch.equal(load.probability, torch.zeros(4))
    (out.sum() + load.probability.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())


def test_a_block_under_autocast(backend):
    block = ours.MoE(16, 12, 4, 2)
    x = torch.randn(5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = block(x)
    assert out.dtype is torch.float32
    out.sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in block.parameters())


def test_rows_that_weights_do_not_need_are_not_kept():
    """Without a gradient of weights, the rows of unpermute are freed: the largest tensor of a block."""
    kept = []
    rows, order = torch.randn(6, 8, requires_grad=True), torch.arange(6, dtype=torch.int32).view(3, 2)
    for weights in (None, torch.rand(3, 2), torch.rand(3, 2, requires_grad=True)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            unpermute(rows * 1, order, weights)
        assert (rows.shape in kept) is (weights is not None and weights.requires_grad)
