"""Runs on records over many ranks: every layout trains as one process does, and goes on at the exact sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m4ov.parallel import ranks
from m4ov.train.metrics import read as read_metrics
from tests.sft import streamed_small as small

AXES = {
    "dp2": {},
    "fsdp2": {"dp_shard": 2},
    "tp2-ep2": {"tp": 2, "ep": 2},
}
#: name → (experts, changes of the recipe, layout on two ranks)
RUNS = {
    "new": (-1, {}, "dp2"),
    "sharded": (0, {"average__kind": "ema", "average__decay": 0.5, "freeze": ["vision", "embeddings"]}, "fsdp2"),
    "adapters": (0, {"lora__rank": 2}, "fsdp2"),
    "experts": (4, {}, "tp2-ep2"),
}
PAUSED = "sharded"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Every run on one rank and on two, from the same checkpoints. One of those on two ranks is interrupted, and goes
    on on one."""
    folder = tmp_path_factory.mktemp("ranks")
    data = small.write_data(folder / "records")
    sources = {count: small.write_checkpoint(folder / f"model-{count}", count) for count in (0, 4)}
    threads = torch.get_num_threads()

    def made(name: str, where: str, layout: str = "1"):
        experts, changes, _ = RUNS[name]
        axes = AXES.get(layout, {})
        path = sources.get(experts, "")
        return small.config(folder / where / name, data, path, parallel=small.parallel(**axes), **changes)

    try:
        for name in RUNS:
            small.train(made(name, "one"))
        many = [
            (made(name, "two", layout), (1, 1) if name == PAUSED else None) for name, (_, _, layout) in RUNS.items()
        ]
        said = ranks.run(small.train_all, 2, many, timeout=150)
        (folder / "said").write_text("\n".join(each[list(RUNS).index(PAUSED)] for each in said))
        small.train(made(PAUSED, "two"))
    finally:
        torch.set_num_threads(threads)
    return folder


def columns(folder: Path) -> list[tuple[int, float, float]]:
    return [
        (row["step"], row["loss"], row["tokens_per_second"] * row["step_seconds"])
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def alike(one: Path, other: Path) -> None:
    """Samples, losses, held-out losses and weights."""
    wanted, found = columns(one), columns(other)
    assert [step for step, _, _ in found] == [step for step, _, _ in wanted] == list(range(1, small.STEPS + 1))
    assert [round(tokens) for _, _, tokens in found] == [round(tokens) for _, _, tokens in wanted]
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in wanted], rel=1e-5)
    measured = [[row["loss"] for row in read_metrics(folder / "held_out.jsonl")] for folder in (one, other)]
    assert len(measured[0]) == 3
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        # Of the keys' biases, whose gradients are zero but for rounding, AdamW makes steps of ±lr.
        limit = 1e-1 if name.endswith("attn.qkv.bias") else 1e-4
        difference, size = (second[name] - weight).norm(), weight.norm()
        assert difference <= limit * size, f"{name}: {difference:.1e} of {size:.1e}"


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one(trained, name):
    alike(trained / "one" / name, trained / "two" / name)


def test_one_was_interrupted_on_two_ranks_and_went_on_on_one(trained):
    said = (trained / "said").read_text().splitlines()
    assert said == ["stopped after step 2; the same command goes on from there"] * 2
