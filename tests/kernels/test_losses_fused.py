"""The losses over ``linear_logprob``: gradients of hidden states and weight as with an unfused head and padded loops;
over two ranks; in 20 steps without learning; compiled; without a look at a value on the device."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from m4ov.parallel.ranks import PRELOAD
from m4ov_kernels import device_errors
from m4ov_kernels.head import RewardMean, linear_logprob, mpo_loss, policy_loss

from . import losses_plain as plain
from .losses_plain import KINDS
from .numerics import assert_accurate

LENGTHS = [6, 11, 0, 17, 3, 8, 14, 5]
WIDTH, VOCAB = 24, 157
LOSSES = (*KINDS, "mpo")
RESULTS = ("loss", "grad_hidden", "grad_weight")
# Far from every bound of a ratio, so that a rounding decides nothing.
STEPS = torch.tensor([-0.7, -0.4, -0.1, -0.05, 0.0, 0.05, 0.1, 0.4, 0.8, 2.0])


def problem(dtype: torch.dtype) -> dict[str, Any]:
    total = sum(LENGTHS)
    hidden = torch.randn(total, WIDTH).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH) * WIDTH**-0.5).to(dtype)
    targets = torch.randint(VOCAB, (total,))
    targets[torch.rand(total) < 0.2] = -100
    now = linear_logprob(hidden.double(), weight.double(), targets).logprob.float()

    def near() -> torch.Tensor:
        return now - STEPS[torch.randint(len(STEPS), (total,))] + 1e-3 * torch.randn(total)

    constants = {name: near() for name in ("old_logprob", "ref_logprob", "rollout_logprob")}
    advantages = torch.randn(len(LENGTHS))
    return {"hidden": hidden, "weight": weight, "targets": targets, "advantages": advantages, **constants}


def part_of(values: dict[str, Any], first: int, last: int) -> tuple[dict[str, Any], list[int]]:
    start, end = sum(LENGTHS[:first]), sum(LENGTHS[:last])
    cut = {name: value[start:end] for name, value in values.items() if name not in ("weight", "advantages")}
    advantages = values["advantages"][first:last]
    return {**cut, "weight": values["weight"], "advantages": advantages}, LENGTHS[first:last]


def fused(kind: str, values: dict[str, Any], lengths: list[int], normalizer: Any, delta: Any = 0.2, **options: Any):
    """Loss, gradients of hidden states and weight, metrics."""
    hidden, weight = (values[name].detach().requires_grad_() for name in ("hidden", "weight"))
    found = linear_logprob(hidden, weight, values["targets"], entropy=True, **options)
    mask = values["targets"] != -100
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    if kind == "mpo":
        loss, metrics = mpo_loss(
            found.logprob, values["ref_logprob"], bounds, normalizer=normalizer, delta=delta, mask=mask
        )
    else:
        loss, metrics = policy_loss(
            found.logprob,
            values["old_logprob"],
            values["advantages"],
            bounds,
            normalizer=normalizer,
            kind=kind,
            mask=mask,
            ref_logprob=values["ref_logprob"],
            kl_coef=0.05,
            entropy=found.entropy,
            entropy_coef=0.02,
            rollout_logprob=values["rollout_logprob"],
            correction="tis",
        )
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, metrics


def unfused(kind: str, values: dict[str, Any], normalizer: float, wide: torch.dtype):
    """Logits and softmax in memory in ``wide``, and padded loops; also how large the terms of each sum are."""
    hidden, weight = (values[name].detach().requires_grad_() for name in ("hidden", "weight"))
    if wide is torch.float64:
        hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = hidden.to(wide) @ weight.to(wide).T
    logits.retain_grad()
    log_p = logits.log_softmax(-1)
    mask = values["targets"] != -100
    rows = {name: values[name].to(wide) for name in ("old_logprob", "ref_logprob", "rollout_logprob")}
    rows["logprob"] = log_p.gather(1, values["targets"].clamp(min=0)[:, None])[:, 0]
    rows["entropy"] = -(log_p.exp() * log_p).sum(-1)
    rows = {name: plain.padded(value, LENGTHS) for name, value in rows.items()}
    keep = plain.padded(mask, LENGTHS)
    if kind == "mpo":
        loss = plain.preference(rows, keep, normalizer, 0.1, (0.8, 0.2, 1.0), 0.2)
        size = loss.detach().double()  # a sum of positive terms
    else:
        advantages = values["advantages"].to(wide)
        options = {"kl_coef": 0.05, "entropy_coef": 0.02, "correction": "tis"}
        loss, _, size = plain.policy(rows, keep, advantages, normalizer, kind, **options)
    loss.backward()
    of_logits = logits.grad.abs()
    terms = (size, of_logits @ weight.detach().to(wide).abs(), of_logits.T @ hidden.detach().to(wide).abs())
    return (loss.detach(), hidden.grad, weight.grad), terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LOSSES)
def test_fused_is_unfused(kind, dtype):
    values = problem(dtype)
    ours = fused(kind, values, LENGTHS, 7.0)
    (theirs, _), (exact, terms) = (unfused(kind, values, 7.0, wide) for wide in (torch.float32, torch.float64))
    for name, *each in zip(RESULTS, ours[:3], theirs, exact, terms, strict=True):
        assert_accurate(name, *each)


@pytest.mark.parametrize("kind", LOSSES)
def test_micro_batches_add_up(kind):
    values = problem(torch.float32)
    (theirs, _), (exact, terms) = (unfused(kind, values, 7.0, wide) for wide in (torch.float32, torch.float64))
    parts = [fused(kind, *part_of(values, *cut), 7.0) for cut in ((0, 2), (2, 4), (4, 8))]
    losses, grads_hidden, grads_weight, _ = zip(*parts, strict=True)
    ours = torch.stack(losses).sum(), torch.cat(grads_hidden), torch.stack(grads_weight).sum(0)
    for name, *each in zip(RESULTS, ours, theirs, exact, terms, strict=True):
        assert_accurate(name, *each)


def _rank(rank: int, size: int, port: int, folder: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    values = torch.load(folder / "inputs.pt")
    own, lengths = part_of(values, *((0, 4), (4, 8))[rank])
    found = {}
    for kind in LOSSES:
        counts = {"token": (own["targets"] != -100).sum(), "sequence": torch.tensor(len(lengths))}
        normalizer = counts["sequence"] // 2 if kind == "mpo" else counts[plain.PAPER[kind][0]]
        dist.all_reduce(normalizer)
        loss, grad_hidden, grad_weight, metrics = fused(kind, own, lengths, normalizer)
        for tensor in (loss, grad_weight):
            dist.all_reduce(tensor)
        rewards = torch.stack([metrics.get(name, loss) for name in ("reward_sum", "reward_count")])
        dist.all_reduce(rewards)
        found[kind] = (loss, grad_hidden, grad_weight, RewardMean.start().update(*rewards).delta, normalizer)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    values = problem(torch.float32)
    torch.save(values, tmp_path / "inputs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, __name__])
    ranks = [context.Process(target=_rank, args=(rank, 2, port, tmp_path), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    tokens = int((values["targets"] != -100).sum())
    for kind in LOSSES:
        first, second = (part[kind] for part in parts)
        normalizer = first[4].item()
        assert normalizer == (4 if kind == "mpo" else tokens if plain.PAPER[kind][0] == "token" else len(LENGTHS))
        (theirs, _), (exact, terms) = (
            unfused(kind, values, normalizer, wide) for wide in (torch.float32, torch.float64)
        )
        ours = first[0], torch.cat([first[1], second[1]]), first[2]
        for name, *each in zip(RESULTS, ours, theirs, exact, terms, strict=True):
            assert_accurate(f"{kind} {name}", *each)
        assert torch.equal(first[2], second[2])
        if kind == "mpo":
            _, _, _, metrics = fused(kind, values, LENGTHS, normalizer)
            whole = RewardMean.start().update(metrics["reward_sum"], metrics["reward_count"]).delta
            assert first[3].item() == pytest.approx(whole.item(), rel=1e-5)
            assert torch.equal(first[3], second[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_without_learning_keep_every_ratio_at_one(isa, dtype):
    """Rollouts scored all at once; steps in other micro-batches: with ``invariant=True`` the same bits."""
    values = problem(dtype)
    scored = linear_logprob(values["hidden"], values["weight"], values["targets"], invariant=True).logprob
    values |= {"old_logprob": scored, "rollout_logprob": scored}
    for step in range(20):
        kind = KINDS[step % len(KINDS)]
        cut = int(torch.randint(1, len(LENGTHS), ()))
        for bounds in ((0, cut), (cut, len(LENGTHS))):
            part, lengths = part_of(values, *bounds)
            *_, metrics = fused(kind, part, lengths, 7.0, invariant=True)
            if metrics["tokens"] > 0:
                assert (metrics["ratio_min"], metrics["ratio_max"]) == (1.0, 1.0)
            for name in ("policy_kl_k3", "mismatch_max", "clip_fraction_low", "clip_fraction_high"):
                assert metrics[name] == 0.0


@pytest.mark.parametrize("kind", LOSSES)
def test_compiled_in_one_graph(kind):
    batch = plain.batch([6, 4, 0, 8], torch.float32)
    leaf = batch["logprob"].clone().requires_grad_()

    def loss(logprob: torch.Tensor, bounds: torch.Tensor):
        if kind == "mpo":
            return mpo_loss(logprob, batch["ref_logprob"], bounds, normalizer=3, delta=0.1, mask=batch.mask)
        terms = {name: batch[name] for name in ("ref_logprob", "rollout_logprob", "entropy")}
        terms |= {"kl_coef": 0.1, "entropy_coef": 0.1, "correction": "icepop", "correction_level": "sequence"}
        arguments = (logprob, batch["old_logprob"], batch.advantages, bounds)
        return policy_loss(*arguments, normalizer=3, kind=kind, mask=batch.mask, **terms)

    backend = "aot_eager" if kind in ("gspo", "mpo") else "eager"  # seconds against tenths of one
    eager, metrics = loss(leaf, batch.cu_seqlens)
    compiled, compiled_metrics = torch.compile(loss, fullgraph=True, backend=backend)(leaf, batch.cu_seqlens)
    assert torch.equal(eager, compiled)
    assert all(torch.equal(metrics[name], compiled_metrics[name]) for name in metrics)
    assert torch.equal(*(torch.autograd.grad(found, leaf)[0] for found in (eager, compiled)))


@pytest.mark.parametrize("kind", LOSSES)
def test_no_value_on_the_device_is_looked_at(kind, monkeypatch):
    """On PyTorch's ``meta`` device whatever reads a value raises."""
    monkeypatch.setattr(device_errors, "_flags", {})  # whose values cannot be read afterwards
    batch = plain.batch([6, 4, 0, 8], torch.float32)
    rows = {name: values.to("meta") for name, values in batch.rows.items()}
    leaf, mask, bounds = rows["logprob"].requires_grad_(), batch.mask.to("meta"), batch.cu_seqlens.to("meta")
    if kind == "mpo":
        loss, metrics = mpo_loss(leaf, rows["ref_logprob"], bounds, normalizer=3, delta=0.1, mask=mask)
    else:
        terms = {name: rows[name] for name in ("ref_logprob", "rollout_logprob", "entropy")}
        terms |= {"kl_coef": 0.1, "entropy_coef": 0.1, "correction": "mis", "correction_level": "geometric"}
        arguments = (leaf, rows["old_logprob"], batch.advantages.to("meta"), bounds)
        loss, metrics = policy_loss(*arguments, normalizer=torch.tensor(3), kind=kind, mask=mask, **terms)
    loss.backward()
    assert leaf.grad.shape == leaf.shape
    assert all(value.device.type == "meta" for value in metrics.values())
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        loss.item()  # the rule is one that can be broken
