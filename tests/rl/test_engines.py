"""Engines in processes of their own: the bits of the embedded one, whatever their number, and whatever becomes of them;
no call hangs, no process is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from m4ov.generate.weights import WEIGHTS
from m4ov.recipe import OptimConfig, TrainConfig
from m4ov.rl.engine_handover import portable
from m4ov.rl.engines import EngineError
from m4ov.rl.trainer import train_policy
from m4ov.rl_recipe import SAMPLER_WEIGHTS, RolloutConfig
from m4ov_kernels.packing import Sample
from tests.rl import online, small
from tests.rl.drawing import SEEDS, Deadly, drawer, drawn, moved
from tests.tiny_task import quiet


@pytest.fixture(autouse=True)
def _nobody_is_left(tmp_path):
    before = set(multiprocessing.active_children())
    yield
    left = set(multiprocessing.active_children()) - before
    assert not [process for process in left if process.name.startswith("m4ov engine")]
    assert not list(tmp_path.glob("engines-*"))


def embedded(model, folder, **options):
    with drawer(model, folder, **options) as made:
        return drawn(made)


@contextmanager
def after(seconds, number, pid):
    """A signal to a process while the block runs."""
    timer = threading.Timer(seconds, os.kill, (pid, number))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def pid_of(made, engine):
    return made.links[engine].process.pid


@pytest.mark.parametrize("engines", [1, 2])
def test_they_draw_what_the_embedded_engine_does(tmp_path, engines):
    """Also with new weights, and every one of them has them; what is left of older ones is removed."""
    model = online.policy()
    first = embedded(model, tmp_path)
    with drawer(model, tmp_path, engines=engines) as made:
        assert len({pid_of(made, engine) for engine in range(engines)} - {os.getpid()}) == engines
        assert drawn(made) == first
        for _ in range(2):
            moved(model)
            expected = embedded(model, tmp_path)
            assert drawn(made) == expected != first
        (folder,) = tmp_path.glob("engines-*")
        assert sorted(path.name for path in folder.iterdir()) == ["start.pt", "weights-2.safetensors"]
        assert drawn(made) == expected  # no new version without a change
        assert made.handover.version == 2
    assert not made.deaths
    with pytest.raises(EngineError, match="the engines are closed"):
        drawn(made)


def test_they_pack_weights_anew(tmp_path):
    for weights in ("int8", "int4"):
        model = small.model(dtype=torch.float32, intermediate_size=64)
        with drawer(model, tmp_path, engines=1, weights=weights) as made:
            first = drawn(made)
            assert first == embedded(model, tmp_path, weights=weights) != embedded(model, tmp_path)
            moved(model)
            assert drawn(made) == embedded(model, tmp_path, weights=weights) != first


def test_more_engines_than_prompts(tmp_path):
    model = online.policy()
    prompts = [prompt.sample for prompt in online.prompts()[:1]]
    with drawer(model, tmp_path) as alone, drawer(model, tmp_path, engines=2) as made:
        ((one, *_),), ((other, *_),) = alone.draw(prompts, SEEDS[:1]), made.draw(prompts, SEEDS[:1])
        assert torch.equal(one.tokens, other.tokens)
        assert made.draw([], []) == []


def test_one_that_is_killed_is_replaced_and_the_bits_are_the_same(tmp_path, caplog):
    """Between two draws; in the middle of one; and one that only stands still."""
    model = online.policy()
    moved(model)  # weights that the start has not
    with drawer(model, tmp_path, engines=2) as made:
        expected = drawn(made)
        moved(model)
        expected = embedded(model, tmp_path)
        dead = pid_of(made, 1)
        os.kill(dead, signal.SIGKILL)
        assert drawn(made) == expected
        assert pid_of(made, 1) != dead
        stopped = pid_of(made, 0)
        os.kill(stopped, signal.SIGSTOP)  # so that it is killed before it answers
        with after(0.3, signal.SIGKILL, stopped):
            assert drawn(made) == expected
        assert [
            f"engine {engine} (process {pid})" in text
            for engine, pid, text in zip((1, 0), (dead, stopped), made.deaths, strict=True)
        ] == [True, True]
        assert all("with 3 prompts to draw: it died of signal 9" in text for text in made.deaths)
        assert "it is started again" in caplog.text
        made.stall_seconds = 0.5
        os.kill(pid_of(made, 0), signal.SIGSTOP)
        assert drawn(made) == expected
        assert "it has made no step for 0.5 s" in made.deaths[2]


def test_a_second_death_in_a_draw_is_an_error(tmp_path):
    with drawer(online.policy(), tmp_path, tokenizer=Deadly(), engines=1) as made:
        with pytest.raises(
            EngineError, match=r"engine 0 .* with 6 prompts to draw: it ended with exit status 3; it had"
        ):
            drawn(made)
        assert len(made.deaths) == 2


def test_an_engine_that_raises_and_ctrl_c_leave_it_usable(tmp_path):
    model = online.policy()
    expected = embedded(model, tmp_path)
    with drawer(model, tmp_path, engines=2) as made:
        bad = Sample(torch.tensor([small.IMAGE]))  # without an image
        samples = [prompt.sample for prompt in online.prompts()]
        with pytest.raises(EngineError, match=r"(?s)engine 0 .*RequestError: prompts\[0\]"):
            made.draw([bad, *samples[1:]], SEEDS)
        assert drawn(made) == expected
        os.kill(pid_of(made, 1), signal.SIGSTOP)
        with pytest.raises(KeyboardInterrupt), after(0.3, signal.SIGINT, os.getpid()):
            drawn(made)
        assert drawn(made) == expected


def test_they_end_with_a_learner_that_is_killed(tmp_path):
    code = f"from tests.rl.drawing import wait_to_be_killed; wait_to_be_killed({str(tmp_path)!r})"
    learner = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    pids = tmp_path / "pids"
    try:
        until(lambda: pids.exists() and pids.read_text().count(" ") == 1)
        drawing = [int(pid) for pid in pids.read_text().split()]
        assert all(map(alive, drawing))
    finally:
        learner.kill()
        learner.wait()
    until(lambda: not any(map(alive, drawing)))
    for folder in tmp_path.glob("engines-*"):  # nobody was there to do it
        folder.rename(tmp_path / "left")


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_with_them_has_the_same_weights(tmp_path):
    """Updates by the optimizer are seen: three rollouts, each with what the one before has taught."""
    weights = {}
    for name, count in (("embedded", 0), ("apart", 2)):
        model, folder = online.policy(), tmp_path / name
        given = online.config(engines=count, shared=True, rescore=False)
        with drawer(model, folder, samples=4, max_tokens=5, engines=count, shared=True) as made:
            result = train_policy(
                model,
                online.prompts(),
                made,
                config=given,
                train_config=TrainConfig(steps=3, checkpoint_seconds=0.0, precision="fp32"),
                optim=OptimConfig(muon_lr=1e-2, lr=1e-2, warmup_steps=1),
                folder=folder,
                console=quiet(),
                schedule=lambda step: 1.0,
            )
        weights[name] = result.weights
    for name, weight in weights["embedded"].items():
        assert torch.equal(weights["apart"][name], weight), name


def test_prompts_travel_without_what_they_are_views_of():
    first, second = (prompt.sample for prompt in online.prompts()[1:4:2])
    wide = torch.cat([first.input_ids, torch.zeros(1000, dtype=torch.int64)])
    view = type(first)(wide[: len(first.input_ids)], first.labels, first.images)
    one, other = portable([view, second])
    assert one.input_ids.untyped_storage().nbytes() == 8 * len(first.input_ids)
    assert torch.equal(one.input_ids, first.input_ids)
    assert first.images[0] is second.images[0]
    assert one.images[0] is other.images[0]  # seen once


def test_a_tokenizer_that_cannot_travel_is_refused(tmp_path):
    class Local:
        def decode(self, tokens):
            return ""

    with (
        pytest.raises(TypeError, match=r"model and a tokenizer that can be pickled, for rollout\.engines above 0"),
        drawer(online.policy(), tmp_path, tokenizer=Local(), engines=1),
    ):
        pass


def test_kinds_of_weights_are_the_engines():
    assert SAMPLER_WEIGHTS == WEIGHTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engines": -1}, "rollout.engines: expected at least 0, got -1"),
        ({"engine_kind": "threads"}, "rollout.engine_kind: expected processes or ray, got 'threads'"),
        ({"engine_kind": "ray"}, "rollout.engines: expected at least 1 with engine_kind = ray, got 0"),
        ({"weights": "int2"}, "rollout.weights: expected model, int8, int4, fp8, got 'int2'"),
        ({"weights": "int8", "rescore": False}, "rollout.rescore: expected true with weights = int8"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**options)


def test_ray_draws_the_same_and_replaces_an_actor(tmp_path):
    pytest.importorskip("ray")
    model = online.policy()
    with drawer(model, tmp_path, engines=1, engine_kind="ray") as made:
        assert drawn(made) == embedded(model, tmp_path)
        moved(model)
        made.host.ray.kill(made.links[0].actor)
        assert drawn(made) == embedded(model, tmp_path)
        assert len(made.deaths) == 1
