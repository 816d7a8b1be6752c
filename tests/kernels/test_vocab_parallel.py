"""A head in shards over gloo ranks, each with one thread: results and gradients of one rank with the whole head."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from m4ov.parallel.ranks import PRELOAD
from m4ov_kernels.head import linear_cross_entropy, linear_logprob

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


def run_loss(values: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Loss and gradients of ``linear_cross_entropy``, with everything that a shard cannot know alone."""
    tensors = [values[name].detach().requires_grad_() for name in ("hidden_states", "weight", "bias")]
    hidden, weight, bias = tensors
    given = {"linear_bias": bias, "weight": values["classes"], "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 5.0}
    loss = linear_cross_entropy(hidden, weight, values["targets"], **given, **options)
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def _rank(rank: int, size: int, port: int, folder: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    values, grads = torch.load(folder / "inputs.pt")
    name = dist.group.WORLD.group_name
    own = values | {key: values[key].chunk(size)[rank] for key in ("weight", "bias")}
    refused = ""
    found = [*run(own, grads, group_name=name), *run_loss(own, group_name=name)]
    try:
        uneven = own | {key: own[key][: len(own[key]) - rank] for key in ("weight", "bias")}
        uneven["targets"] = own["targets"].clamp(max=VOCAB // 2)
        run(uneven, grads, group_name=name)
    except ValueError as error:
        refused = str(error)
    torch.save((found, refused), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (4, torch.bfloat16), (2, torch.float64)])
def test_as_with_the_whole_head(tmp_path, size, dtype):
    targets = torch.randint(VOCAB, (ROWS,))
    targets[torch.rand(ROWS) < 0.3] = -100
    values = {
        "hidden_states": torch.randn(ROWS, WIDTH).to(dtype),
        "weight": (torch.randn(VOCAB, WIDTH) * 0.6).to(dtype),
        "bias": torch.randn(VOCAB).to(dtype),
        "targets": targets,
        "classes": torch.rand(VOCAB).to(dtype),
    }
    grads = [torch.randn(ROWS) for _ in range(3)]
    torch.save((values, grads), tmp_path / "inputs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, __name__])
    ranks = [context.Process(target=_rank, args=(rank, size, port, tmp_path), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    parts, refusals = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(size)), strict=True)
    wide = {key: value.double() if value.is_floating_point() else value for key, value in values.items()}
    plain = [*run(values, grads), *run_loss(values)]  # float64: the reference, in shards too
    exact = [*run(wide, grads), *run_loss(wide)]
    for part in parts[1:]:
        for a, b in zip((*part[:5], part[8]), (*parts[0][:5], parts[0][8]), strict=True):
            assert torch.equal(a, b)
    got = [
        *parts[0][:5],
        torch.stack([part[5].float() for part in parts]).sum(0).to(dtype),
        *(torch.cat([part[i] for part in parts]) for i in (6, 7)),
        parts[0][8],
        torch.stack([part[9].float() for part in parts]).sum(0).to(dtype),
        *(torch.cat([part[i] for part in parts]) for i in (10, 11)),
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
        "loss",
        "grad_input",
        "grad_linear_weight",
        "grad_linear_bias",
    )
    for name, ours, theirs, truth in zip(names, got, plain, exact, strict=True):
        if name == "top_indices":
            assert torch.equal(ours, theirs)
            continue
        # Each rank's share of the hidden states' gradient is rounded to their dtype; logits are below 10.
        place = {"grad_hidden": 5, "grad_input": 9}.get(name)
        shares = truth.norm() if place is None else torch.stack([part[place].double() for part in parts]).norm()
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
    with pytest.raises(ValueError, match="linear_cross_entropy: group_name must be the name of a process"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), group_name="no")
    with pytest.raises(TypeError, match="linear_logprob: group_name must be the name of a process group; got int 3"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), group_name=3)
