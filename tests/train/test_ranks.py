"""Many ranks train as one does: the same losses and weights, whoever has which samples, and whoever stops or dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from m4ov.parallel import ranks
from m4ov.parallel.checkpoint import checkpoints, read
from m4ov.train import World
from m4ov.train.metrics import read as read_metrics
from tests.tiny_task import mixture_batch, tiny_config, tiny_mixture, train_stage
from tests.train import killing, small


def close(one: Path, other: Path, *, steps: int, within: float = 1e-6, of: str = "") -> None:
    """Losses, weights and the optimizer's states of two runs, each tensor by ‖Δ‖ / ‖reference‖."""
    losses = [{row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl")} for folder in (one, other)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, steps + 1))
    assert losses[1] == pytest.approx(losses[0], rel=within)
    states = [dict(read(checkpoints(folder / "checkpoints")[-1], prefix=of)) for folder in (one, other)]
    for name, reference in states[0].items():
        if not name.startswith("random."):
            difference = (states[1][name] - reference).norm()
            assert difference <= within * reference.norm(), f"{name}: {difference / reference.norm():.1e}"


@pytest.mark.parametrize(("size", "mesh"), [(2, None), (2, (2,)), (4, (2, 2))])
def test_ranks_train_as_one_does(tmp_path, size, mesh):
    one = small.train_small(tmp_path / "one", always=mesh is not None)
    for weights in ranks.run(small.train_small, size, tmp_path / "many", mesh):
        for name, reference in one.items():
            assert (weights[name] - reference).norm() <= 1e-6 * reference.norm(), name
    close(tmp_path / "one", tmp_path / "many", steps=8)
    rows = read_metrics(tmp_path / "many" / "metrics.jsonl")
    assert all(row["communication_seconds"] > 0 and row["peak_memory_mib"] > 50 for row in rows)
    assert [row["imbalance"] for row in rows] == pytest.approx(imbalances(size, len(rows)))


def imbalances(size: int, steps: int) -> list[float]:
    """Of each step, the most tokens of a rank over the mean of all."""
    loaders = [small.loader(World(rank, size)) for rank in range(size)]
    found = []
    for step in range(steps):
        tokens = [sum(batch.tokens for batch in loader.batches(step)) for loader in loaders]
        found.append(max(tokens) * size / sum(tokens))
    assert max(found) > 1
    return found


def test_a_run_goes_on_on_other_layouts(tmp_path):
    """One rank, two replicas, four with shards, one: each is told to stop by a signal to one of its ranks."""
    small.train_small(tmp_path / "whole", always=True)
    folder = tmp_path / "moved"
    assert "stopped after step 2;" in str(small.train_small(folder, None, (1, 0), True))
    for said in ranks.run(small.train_small, 2, folder, None, (3, 1), True):
        assert "stopped after step 4;" in str(said)
    for said in ranks.run(small.train_small, 4, folder, (2, 2), (5, 2)):
        assert "stopped after step 6;" in str(said)
    small.train_small(folder, always=True)
    close(tmp_path / "whole", folder, steps=8)


def test_what_is_accumulated_is_the_same_step(tmp_path):
    """Parts of a step of a stage, one after the other, and spread over ranks as well."""
    train_shares(tmp_path / "whole", 1)
    train_shares(tmp_path / "parts", 2)
    ranks.run(train_shares, 2, tmp_path / "ranks", 2)
    for name in ("parts", "ranks"):
        close(tmp_path / "whole", tmp_path / name, steps=3, of="Muon.")


def train_shares(folder: Path, accumulate: int) -> None:
    config = tiny_config(folder, precision="fp32", steps=3, accumulate=accumulate)
    train_stage(config, folder, world=small.world())


def test_shares_of_a_step_are_its_samples():
    """The same questions and the same pixels, moved and mirrored alike, whichever share they come in."""
    whole = mixture_batch(3)
    mixture = tiny_mixture()
    for shares in (2, 3, 5):
        parts = [mixture.batch(3, share, shares) for share in range(shares)]
        assert sum(part.tokens for part in parts) == whole.tokens
        assert sorted(sample for part in parts for sample in contents(part)) == sorted(contents(whole))
    with pytest.raises(ValueError, match=r"a step has 3 \+ 2 images .* fewer than 3 ranks x 2 parts"):
        tiny_mixture(ranks=3, accumulate=2)


def contents(batch) -> list[tuple]:
    """Each sample's tokens, labels and pixels."""
    return [
        (tuple(one.input_ids.tolist()), tuple(one.labels.tolist()), one.images.pixel_values.numpy().tobytes())
        for one in (batch[place] for place in range(len(batch)))
    ]


@pytest.mark.parametrize("sharded_over", [None, (2,)])
def test_a_rank_that_dies_is_named(tmp_path, sharded_over):
    """In a collective of the loop, or of the model's forward."""
    with pytest.raises(ranks.RankError, match="rank 1 died: exit status -9"):
        ranks.run(small.die_in_the_second_step, 2, tmp_path, sharded_over)
    error = (tmp_path / "error").read_text()
    assert "ranks 1 did not come" in error
    assert error.startswith("step ")


def test_kill_9_of_ranks_at_random_moments(tmp_path):
    seed = int(os.environ["M4OV_TEST_SEED"])
    assert "the same bits" in killing.kill_often(3, 2, tmp_path, seed)
