"""A head in shards over gloo ranks, each with one thread: results and gradients of one rank with the whole head."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from m4ov_kernels.head import linear_logprob

from .numerics import EPS

ROWS, WIDTH, VOCAB = 37, 24, 320


def run(values: dict[str, Any], grads: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    tensors = [values[name].detach().requires_grad_() for name in ("hidden_states", "weight", "bias")]
    hidden, weight, bias = tensors
    found = linear_logprob(
        hidden, weight, values["targets"], bias=bias, entropy=True, top_k_logprobs=7, temperature=0.7, **options
    )
    outputs = [found.logprob, found.logsumexp, found.entropy]
    gradients = torch.autograd.grad(outputs, tensors, [grad.to(found.logprob.dtype) for grad in grads])
    return [*(x.detach() for x in (*outputs, found.top_logprobs, found.top_indices)), *gradients]


def _rank(rank: int, size: int, port: int, folder: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    values, grads = torch.load(folder / "inputs.pt")
    name = dist.group.WORLD.group_name
    own = values | {key: values[key].chunk(size)[rank] for key in ("weight", "bias")}
    refused = ""
    found = run(own, grads, group_name=name)
    try:
        uneven = own | {key: own[key][: len(own[key]) - rank] for key in ("weight", "bias")}
        uneven["targets"] = own["targets"].clamp(max=VOCAB // 2)
        run(uneven, grads, group_name=name)
    except ValueError as error:
        refused = str(error)
    torch.save((found, refused), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_as_with_the_whole_head(tmp_path, size, dtype):
    targets = torch.randint(VOCAB, (ROWS,))
    targets[torch.rand(ROWS) < 0.3] = -100
    values = {
        "hidden_states": torch.randn(ROWS, WIDTH).to(dtype),
        "weight": (torch.randn(VOCAB, WIDTH) * 0.6).to(dtype),
        "bias": torch.randn(VOCAB).to(dtype),
        "targets": targets,
    }
    grads = [torch.randn(ROWS) for _ in range(3)]
    torch.save((values, grads), tmp_path / "inputs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", __name__])
    ranks = [context.Process(target=_rank, args=(rank, size, port, tmp_path), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    parts, refusals = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(size)), strict=True)
    plain = run(values, grads)
    exact = run({key: value.double() if value.is_floating_point() else value for key, value in values.items()}, grads)
    for part in parts[1:]:
        for a, b in zip(part[:5], parts[0][:5], strict=True):
            assert torch.equal(a, b)
    got = [
        *parts[0][:5],
        torch.stack([part[5].float() for part in parts]).sum(0).to(dtype),
        *(torch.cat([part[i] for part in parts]) for i in (6, 7)),
    ]
    names = (
        "logprob",
        "logsumexp",
        "entropy",
        "top_logprobs",
        "top_indices",
        "grad_hidden",
        "grad_weight",
        "grad_bias",
    )
    for name, ours, theirs, truth in zip(names, got, plain, exact, strict=True):
        if name == "top_indices":
            assert torch.equal(ours, theirs)
            continue
        # Each rank's share of the hidden states' gradient is rounded to their dtype; logits are below 10.
        shares = torch.stack([part[5].double() for part in parts]).norm() if name == "grad_hidden" else truth.norm()
        allowed = (
            2 * (theirs.double() - truth).norm() + EPS[ours.dtype] * shares + 20 * EPS[torch.float32] * truth.norm()
        )
        assert (ours.double() - truth).norm() <= allowed, name
    for refused in refusals:
        assert refused.startswith("linear_logprob: weight must be of as many rows on every rank of the group")


def test_an_unknown_group_is_refused():
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match="linear_logprob: group_name must be the name of a process group; got 'no'"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), group_name="no")
    with pytest.raises(TypeError, match="linear_logprob: group_name must be the name of a process group; got int 3"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), group_name=3)
