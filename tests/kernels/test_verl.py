"""``integrations.verl``: verl's signature and results, against plain PyTorch."""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import m4ov_kernels
from m4ov.parallel.ranks import PRELOAD
from m4ov_kernels.integrations.verl import linear_cross_entropy

from .numerics import assert_accurate, leaves
from .scored import scored, terms


def plain(hidden, weight, labels, temperature, reduction):
    logprobs, entropy, *_ = scored(hidden.flatten(0, -2), weight, None, labels.flatten(), temperature)
    return {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}[reduction](logprobs), entropy


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(23,), (2, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_plain_pytorch(dtype, shape, reduction):
    hidden, weight = torch.randn(*shape, 40), torch.randn(150, 40) / 4
    labels = torch.randint(150, shape)
    tokens = labels.numel()
    grads = [torch.randn(tokens if reduction == "none" else ()), torch.randn(tokens)]

    def run(function, dtype):
        tensors = leaves(dtype, hidden.to(torch.bfloat16), weight.to(torch.bfloat16))
        found = function(*tensors, labels, 0.7, reduction)
        return [*found, *torch.autograd.grad(found, tensors, [grad.to(found[0].dtype) for grad in grads])]

    got, ordinary, exact = run(linear_cross_entropy, dtype), run(plain, dtype), run(plain, torch.float64)
    assert got[0].dtype == got[1].dtype == torch.float32
    each = (grads[0] / (tokens if reduction == "mean" else 1)).expand(tokens)
    sizes = terms(hidden.bfloat16().flatten(0, -2), weight.bfloat16(), None, labels.flatten(), (each, grads[1]), 0.7)
    sizes["hidden"] = sizes["hidden"].view_as(hidden)
    if reduction != "none":
        sizes["log_probs"] = getattr(sizes["log_probs"], reduction)()
    names = ("log_probs", "entropy", "hidden", "weight")
    for name, ours, theirs, truth in zip(names, got, ordinary, exact, strict=True):
        assert_accurate(name, ours, theirs, truth, sizes[name])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_autocast_rounds_nothing_again(backend):
    hidden, weight, labels = torch.randn(9, 40), torch.randn(150, 40), torch.randint(150, (9,))

    def both():
        return linear_cross_entropy(hidden, weight, labels)

    with contextlib.nullcontext() if backend == "auto" else m4ov_kernels.backend(backend):
        expected = both()
        with torch.autocast("cpu", torch.bfloat16):
            found = both()
    assert all(map(torch.equal, found, expected))


def test_the_signature_is_verls():
    """verl 0.9.1: ``LinearCrossEntropy.forward`` after ``ctx``, called with positions only."""
    names = ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]
    parameters = inspect.signature(linear_cross_entropy).parameters
    assert list(parameters) == names
    assert [p.default for p in parameters.values()][3:] == [1.0, "none", None]


def _rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    hidden, weight, labels, grads = torch.load(folder / "inputs.pt")
    tensors = leaves(torch.float32, hidden, weight.chunk(2)[rank])
    found = linear_cross_entropy(*tensors, labels, 1.5, "none", dist.group.WORLD)
    gradients = torch.autograd.grad(found, tensors, grads)
    dist.all_reduce(gradients[0])  # the caller's, as in verl
    torch.save([value.detach() for value in (*found, *gradients)], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_vocabulary_over_two_ranks(tmp_path):
    hidden, weight, labels, grads = torch.randn(6, 8), torch.randn(20, 8), torch.randint(20, (6,)), torch.randn(2, 6)
    torch.save((hidden, weight, labels, list(grads)), tmp_path / "inputs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, __name__])
    ranks = [context.Process(target=_rank, args=(rank, port, tmp_path), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    tensors = leaves(torch.float32, hidden, weight)
    expected = linear_cross_entropy(*tensors, labels, 1.5)
    expected = [*expected, *torch.autograd.grad(expected, tensors, list(grads))]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in range(2):
        for ours, alone in zip(found[rank][:3], expected[:3], strict=True):
            torch.testing.assert_close(ours, alone)
    torch.testing.assert_close(torch.cat([values[3] for values in found]), expected[3])


def test_refused():
    hidden, weight, labels = torch.randn(6, 8), torch.randn(20, 8), torch.randint(20, (6,))
    with pytest.raises(TypeError, match="verl: hidden must be a tensor"):
        linear_cross_entropy(None, weight, labels)
    with pytest.raises(ValueError, match="verl: reduction must be one of 'none', 'sum', 'mean'; got 'batchmean'"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "batchmean")
    with pytest.raises(TypeError, match="verl: reduction must be a string"):
        linear_cross_entropy(hidden, weight, labels, 1.0, None)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        linear_cross_entropy(hidden, weight, labels, 0.0)
    with pytest.raises(ValueError, match="targets must be"):
        linear_cross_entropy(hidden, weight, labels[:3])
