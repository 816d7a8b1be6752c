"""The parts of the SFT benchmark; end to end it runs with the other families (test_bench.py)."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import torch

from m4ov.recipe import OptimConfig
from m4ov.sft.training import loss_of, model_of
from m4ov.train import Optimizer
from m4ov_bench import cases, machine, sft, sft_sides
from m4ov_bench.peers import trainers
from m4ov_bench.session import Session
from m4ov_bench.turns import Side, by_turns

from ..tiny_task import mixture_batch, tiny_config, tiny_material, tiny_task
from . import loops


def test_padded_samples_are_the_packed_ones():
    batch = mixture_batch(0)
    samples = trainers.samples_of(batch)
    padded = trainers.Padded(samples, pad_token=0)([{"place": place} for place in range(len(samples))])
    kept = padded["attention_mask"].bool()
    for name in ("input_ids", "labels", "mm_token_type_ids"):
        assert torch.equal(padded[name][kept], getattr(batch, name))
    assert padded["labels"][~kept].eq(-100).all()
    assert not padded["mm_token_type_ids"][~kept].any()
    assert padded["input_ids"].shape == (len(batch), batch.max_seqlen)
    assert batch.images.shared
    assert len(padded["image_grid_thw"]) == len(batch) > len(batch.images.grids)
    again = trainers.samples_of(mixture_batch(0)[[2]])[0]
    assert all(torch.equal(samples[2][name], again[name]) for name in again)


def test_both_models_have_the_same_loss():
    batch, task = mixture_batch(0), tiny_task()
    model = model_of(tiny_config(), task, seed=3).train()
    samples = trainers.samples_of(batch)
    padded = trainers.Padded(samples, pad_token=0)([{"place": place} for place in range(len(samples))])
    theirs = sft_sides.hugging_face(task, dict(model.named_parameters()), torch.float32)
    total, labels = loss_of(model, batch)
    assert labels == int((padded["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(theirs(**padded).loss, total / labels, rtol=2e-5, atol=0)


def test_weights_of_another_model_are_refused():
    weights = dict(model_of(tiny_config(), tiny_task(), seed=3).named_parameters())
    del weights["model.language_model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"parameters differ: \['model.language_model.norm.weight'\]"):
        sft_sides.hugging_face(tiny_task(), weights, torch.float32)


def test_adamw_has_every_weight():
    model = model_of(tiny_config(), tiny_task(), seed=3)
    kinds = [type(part).__name__ for part in Optimizer(model, OptimConfig(), 10).parts]
    assert kinds == ["Muon", "AdamW"]
    optimizer = Optimizer(sft_sides.AllAdamW(model), OptimConfig(), 10)
    assert [type(part).__name__ for part in optimizer.parts] == ["AdamW"]
    assert sum(map(torch.numel, optimizer.weights)) == sum(map(torch.numel, model.parameters()))


def test_a_first_loss_is_judged_by_float64():
    first = sft.Loss(exact=6.0, plain=6.01)
    assert first.judge(6.02).green
    assert not first.judge(6.3).green
    assert not first.judge(float("nan")).green


def test_an_absent_trainer_says_why(monkeypatch):
    monkeypatch.setattr(trainers.importlib.util, "find_spec", lambda name: None if name == "trl" else name)
    assert trainers.absent(trainers.TRL) == "trl is not installed"
    assert trainers.absent(trainers.TRAINER) is None


def test_without_the_recipes_data_the_row_says_so(monkeypatch):
    session = Session(replace(machine.describe(), seed=1), quick=True)
    monkeypatch.setattr(sft.importlib.util, "find_spec", lambda name: None if name == "easy_vqa" else name)
    (row,) = sft.benchmark(session)
    assert row.green
    assert row.seconds is None
    assert "easy_vqa is not installed" in row.note
    assert not list(sft.benchmark(replace(session, only="no such case")))


def test_a_step_has_as_many_samples_as_its_case_says():
    for case in cases.SFT:
        config, material = sft.configuration(case), tiny_material()
        pools = tuple(replace(p, questions=case.questions if n == "general" else 1) for n, p in material.pools.items())
        work = sft_sides.Work(config, material.task, pools, {"general": case.images, "domain": case.digits}, seed=5)
        batch = work.mixture().batch(7)
        assert len(batch) == case.images * case.questions + case.digits
        assert batch.images.shared == (case.questions > 1)


def test_sides_step_by_turns_and_a_failure_is_told(tmp_path):
    log = tmp_path / "log"
    sides = {
        "a": Side("a", loops.counting, "a", log),
        "b": Side("b", loops.counting, "b", log),
        "failing": Side("failing", loops.failing),
        "dying": Side("dying", loops.dying),
    }
    try:
        times, ends, failed = by_turns(sides, warm=1, rounds=4)
    finally:
        for side in sides.values():
            side.close()
    assert ends == {"a": 5, "b": 5}
    assert log.read_text() == "ab" + "ba" + "ab" * 3
    assert all(len(taken.rounds) == 4 and taken.seconds > 0 for taken in times.values())
    assert failed["failing"] == "ValueError: no more of this"
    assert "ended without an answer" in failed["dying"]
    assert not multiprocessing.active_children()
