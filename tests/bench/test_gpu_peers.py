"""How GPU peers that exist as modules, or in another shape than ours, are called. The libraries need a GPU: stand-ins
with their interfaces, computed by PyTorch, show that arguments, results and gradients are the right ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench.gpu import peers
from m4ov_bench.peers import Absent


class RMSNorm(torch.nn.Module):
    """As ``transformer_engine.pytorch.RMSNorm``: gradients go to what :meth:`parameters` gives."""

    def __init__(self, normalized_shape, eps=1e-5, *, device=None, dtype=None):
        super().__init__()
        self.eps, self.weight = eps, torch.nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))

    def forward(self, x):
        (weight,) = self.parameters()
        return F.rms_norm(x, weight.shape, weight, self.eps)


def test_a_module_takes_each_calls_weight():
    norm = peers._with_weight(RMSNorm, 1e-3)
    for _ in range(2):
        x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
        grad = torch.randn(5, 8)
        got = torch.autograd.grad(norm(x, weight), (x, weight), grad)
        expected = torch.autograd.grad(F.rms_norm(x, (8,), weight, 1e-3), (x, weight), grad)
        torch.testing.assert_close(got, expected)
    normed, total = peers._added(norm)(x, weight, torch.ones(5, 8))
    torch.testing.assert_close(normed, F.rms_norm(x + 1, (8,), weight, 1e-3))
    assert torch.equal(total, x + 1)


def test_the_gate_comes_first():
    gate, up = torch.randn(2, 3, 8)

    def swiglu(x: Tensor) -> Tensor:  # as transformer_engine.pytorch.ops.SwiGLU
        a, b = x.chunk(2, -1)
        return F.silu(a) * b

    torch.testing.assert_close(peers._of_one_tensor(swiglu)(gate, up), F.silu(gate) * up)


def test_ignored_rows_are_masked_afterwards():
    def linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none"):  # as verl.utils.kernel's
        assert labels.min() >= 0
        log_probabilities = (hidden @ weight.t() / temperature).log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        return log_probabilities.gather(-1, labels[:, None])[:, 0], entropy

    input, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target = torch.tensor([3, -100, 10, 0, -100, 7])
    loss = peers._masked(linear_cross_entropy)(input, weight, target)
    expected = F.cross_entropy(F.linear(input, weight), target)
    torch.testing.assert_close(loss, expected)
    for got, right in zip(
        torch.autograd.grad(loss, (input, weight)), torch.autograd.grad(expected, (input, weight)), strict=True
    ):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize(
    ("made", "name", "root"),
    [
        (peers.rms_norm(1e-6, False), "transformer-engine", "transformer_engine"),
        (peers.rms_norm(1e-6, True), "transformer-engine", "transformer_engine"),
        (peers.swiglu(), "transformer-engine, with cat", "transformer_engine"),
        (peers.linear_cross_entropy(), "verl", "verl"),
    ],
)
def test_one_that_is_not_there_says_so(made, name, root):
    if peers.importlib.util.find_spec(root):
        assert callable(made[name]) or isinstance(made[name], Absent)
    else:
        assert made[name].startswith(f"{root} is not installed")
