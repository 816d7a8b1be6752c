"""`m4ov run hybrid-rl`, whole and small: start, arms, figures, report; stopped between arms, again, on two ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from m4ov import hybrid
from m4ov.evaluate.policies import ArmRun, Figures
from m4ov.hybrid import flow, material, report, training
from m4ov.parallel import ranks
from m4ov.train import RunFolderError, command
from m4ov.train.metrics import read
from tests.hybrid import small
from tests.quickstart.small import digest

ARMS = ("start", "seed-0/accuracy", "seed-0/all")
KEPT = ("**/model/*", "**/figures.json", "**/answers.jsonl", "**/samples.jsonl", "**/rl.jsonl")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def said(config) -> str:
    """What a run prints."""
    console = Console(record=True, width=200, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "Console", lambda quiet: console)
        hybrid.run(config)
    return console.export_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("hybrid")
    return folder, said(small.load(folder))


def test_from_data_to_the_report(whole):
    folder, text = whole
    home = folder / "run"
    results = json.loads((home / "results.json").read_text())
    assert [(arm["arm"], arm["seed"], arm["steps"]) for arm in results["arms"]] == [
        ("start", 0, 2),
        ("accuracy", 0, 2),
        ("all", 0, 2),
    ]
    assert len(results["claims"]) == 5
    assert "all, seed 0: accuracy, pass_at_k, perception, conciseness, 2 updates" in text
    page = (home / "report.html").read_text()
    for title in ("Arms", "What is kept", "Along the training", "Rewards by component"):
        assert f"<h2>{title}</h2>" in page, title
    assert page.count('<div class="viewer">') == 2
    weights = [load_file(home / arm / "model" / "model.safetensors") for arm in ARMS]
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    rows = read(home / "seed-0" / "all" / "rl.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0].keys() >= {"reward_accuracy", "reward_concise", "pass@2", "length_mean", "perception_kl"}
    assert all(row["mismatch_max_abs"] == 0 for row in rows)  # the sampler computes as the trainer does
    assert "perception_kl" not in read(home / "seed-0" / "accuracy" / "rl.jsonl")[0]


def test_figures_are_those_of_the_answers(whole):
    config, home = small.load(whole[0]), whole[0] / "run"
    found = material.gather(config, Console(quiet=True))
    some = 0
    for arm in ARMS:
        figures = json.loads((home / arm / "figures.json").read_text())
        rows = read(home / arm / "answers.jsonl")
        assert [row["question"] for row in rows] == [prompt.question for prompt in found.held_out.prompts]
        pairs = [pair for row in rows for pair in zip(row["answers"], row["on_blank"], strict=True)]
        assert len(pairs) == 3 * len(rows)
        right = [(one, blank) for one, blank in pairs if one["right"]]
        some += len(right)
        assert figures["pass_1"] == pytest.approx(len(right) / len(pairs))
        assert figures["pass_k"] == pytest.approx(
            sum(any(one["right"] for one in row["answers"]) for row in rows) / len(rows)
        )
        assert figures["length"] == pytest.approx(sum(one["tokens"] for one, _ in pairs) / len(pairs))
        assert all(1 <= one["tokens"] <= 6 and (one["finished"] or one["tokens"] == 6) for one, _ in pairs)
        if right:
            assert figures["survival"] == pytest.approx(sum(blank["right"] for _, blank in right) / len(right))
        page = (home / "report.html").read_text()
        assert f"{figures['pass_1']:.1%}" in page
    assert some


def test_what_is_done_is_not_done_again(whole):
    home = whole[0] / "run"

    def stamps() -> dict[Path, int]:
        made = {file for file in home.glob("**/*") if file.is_file()}
        anew = {home / name for name in (".lock", "report.html", "results.json")}
        return {file: file.stat().st_mtime_ns for file in made - anew}

    before, results = stamps(), (home / "results.json").read_text()
    again = said(small.load(whole[0]))
    began, reported, _ = again.partition("m4ov hybrid-rl")
    assert reported
    assert "updates" not in began
    assert stamps() == before
    assert (home / "results.json").read_text() == results
    with pytest.raises(RunFolderError, match=r"policy\.rollout\.samples \(4 there, 2 now\)"):
        hybrid.run(small.load(whole[0], "policy.rollout.samples=2"))


def test_stopped_between_arms_it_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch):
    train, arms = training.train_policy, 0

    def stopping(*arguments, **options):
        nonlocal arms
        arms += 1
        if arms == 2:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    home, config = tmp_path / "run", small.load(tmp_path)
    monkeypatch.setattr(flow, "write", lambda *_: reported.append(home))
    reported: list[Path] = []
    with monkeypatch.context() as patched:
        patched.setattr(training, "train_policy", stopping)
        with pytest.raises(KeyboardInterrupt):
            hybrid.run(config)
    assert (home / "seed-0" / "accuracy" / "figures.json").exists()
    assert not (home / "seed-0" / "all" / "model").exists()
    assert not reported
    hybrid.run(config)
    assert reported
    made = digest(home, *KEPT)
    assert len(made) > 20
    assert made == digest(whole[0] / "run", *KEPT)


def test_on_two_ranks(whole, tmp_path):
    small.load(tmp_path)
    assert ranks.run(small.run_on_ranks, 2, tmp_path, timeout=120, collective_timeout=60) == [0, 1]
    home = tmp_path / "run"
    for arm in ("start", "seed-0/all"):
        assert json.loads((home / arm / "arm.json").read_text())["steps"] == 2
        assert (home / arm / "figures.json").exists()
    start, alone = (
        load_file(folder / "run" / "start" / "model" / "model.safetensors") for folder in (tmp_path, whole[0])
    )
    for name, weight in alone.items():
        # AdamW divides gradients by their size, those of the keys' biases too, which are nothing but rounding.
        far = 1e-1 if name.endswith("attn.qkv.bias") else 1e-4
        assert (start[name] - weight).norm() <= far * weight.norm(), name


def test_certificates_are_shown(whole, tmp_path):
    config = small.load(whole[0])
    results = json.loads((whole[0] / "run" / "results.json").read_text())
    runs = [ArmRun(**{**arm, "figures": Figures(**arm["figures"])}) for arm in results["arms"]]
    rows = [
        {"weights": "model", "tokens": 400, "max_abs": 0.0, "effective": 1.0, "sequence_effective_truncated": 1.0},
        {"weights": "int4", "tokens": 401, "max_abs": 0.12345, "effective": 0.876, "sequence_effective_truncated": 0.5},
    ]
    console = Console(record=True, width=200, file=io.StringIO())
    home = tmp_path / "run"
    for arm in ARMS:
        (home / arm).parent.mkdir(parents=True, exist_ok=True)
        (home / arm).symlink_to(whole[0] / "run" / arm)
    report.write(config, material.gather(config, Console(quiet=True)), runs, home, console, rows)
    page, text = (home / "report.html").read_text(), console.export_text()
    for found in ("int4", "401", "0.123", "87.6%", "50.0%"):
        assert f"<td>{found}</td>" in page
        assert found in text
    for column in ("largest |Δ|", "tokens: worth", "answers: worth, TIS"):
        assert f"<th>{column}</th>" in page
    assert json.loads((home / "results.json").read_text())["certificates"] == rows
