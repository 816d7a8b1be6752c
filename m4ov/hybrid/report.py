"""What ``hybrid-rl`` tells at its end: arms against each other, how their training went, and what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from m4ov.allocator import status as allocator_status
from m4ov.data.whole import write_whole
from m4ov.evaluate import Report, html, plots, print_table
from m4ov.evaluate.examples import evenly
from m4ov.evaluate.policies import ArmRun, claims, sections
from m4ov.evaluate.report import Section
from m4ov.evaluate.viewer import Card, Said, viewer
from m4ov.hybrid.asked import Asked
from m4ov.hybrid.material import Material, start_of
from m4ov.hybrid_recipe import START, HybridConfig
from m4ov.models.qwen3_vl import from_pretrained
from m4ov.train.metrics import read
from m4ov.train.progress import clock

_SAMPLES = 2  # of a held-out question and an arm, in the viewer
_CARDS = 240  # of the training, at most: of steps evenly spread
#: Of ``rl.jsonl``, beside pass@k and the rewards: name → title.
_WATCHED = {
    "length_mean": "tokens of an answer",
    "unfinished": "share of answers that do not end",
    "entropy": "entropy (nats a token)",
    "perception_kl": "perception KL (nats a token)",
    "mismatch_max_abs": "largest |Δ log-prob| of sampler and trainer",
}
#: Of a certificate's row (:meth:`m4ov.rl.Mismatch.row`): name → column.
_APART = {"identical": "identical tokens", "max_abs": "largest |Δ|", "mean_abs": "mean |Δ|"}
_WORTH = {
    f"{prefix}{name}": f"{of}: {title}"
    for prefix, of in (("", "tokens"), ("sequence_", "answers"))
    for name, title in (
        ("effective", "worth"),
        ("effective_truncated", "worth, TIS"),
        ("truncated", "truncated"),
        ("bias", "lost"),
    )
}


def write(
    config: HybridConfig,
    material: Material,
    runs: list[ArmRun],
    home: Path,
    console: Console,
    certificates: Sequence[Mapping[str, Any]] = (),
) -> None:
    """``report.html`` and ``results.json``.

    Args:
        runs: the start first, then every arm with every seed.
        home: the run's folder; what the arms of the first seed left there is shown.
        certificates: rows with the same names each, of how far a sampler and the trainer are apart.
    """
    seed, k = config.seeds[0], config.measure.samples
    folders = {START: home / START, **{name: home / f"seed-{seed}" / name for name in config.arms}}
    answers = {name: read(folder / "answers.jsonl") for name, folder in folders.items()}
    logs = {name: read(folders[name] / "rl.jsonl") for name in config.arms}
    samples = {name: read(folders[name] / "samples.jsonl") for name in config.arms}
    report = Report(
        title="m4ov hybrid-rl: several objectives at once, from one start",
        facts=_facts(config, material, runs, home),
        sections=[
            *sections(runs, k),
            *_certified(certificates),
            *_curves(logs, config, seed),
            *_held_out(answers, material.held_out, config.evaluate.examples, seed),
            *_trained(samples, material.training, seed),
        ],
    )
    write_whole(home / "report.html", html(report))
    numbers = {
        "facts": report.facts,
        "arms": [asdict(found) for found in runs],
        "claims": [dict(zip(("claim", "came out", "figures"), row, strict=True)) for row in claims(runs, k)],
        "certificates": [dict(row) for row in certificates],
    }
    write_whole(home / "results.json", json.dumps(_finite(numbers), indent=1, allow_nan=False) + "\n")
    print_table(report, console)
    console.print(f"report: {home / 'report.html'}\nmodels: {home / 'seed-*' / '*' / 'model'}")


def _facts(config: HybridConfig, material: Material, runs: list[ArmRun], home: Path) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in from_pretrained(start_of(home)).parameters())
    start = next(found for found in runs if found.arm == START)
    begins = f"from {config.start.model}" if config.start.model else f"from random weights (seed {config.start.seed})"
    asked = (
        f"{what}: {len(part.prompts):,} on {len(part.images):,} grids of real images"
        for what, part in (("that arms learn from", material.training), ("held out", material.held_out))
    )
    tests = (f"{name}: {len(split.samples):,} held out" for name, split in material.start.tests.items())
    trained = [found for found in runs if found.arm != START]
    took = (
        f"{name} " + ", ".join(clock(found.seconds) for found in trained if found.arm == name) for name in config.arms
    )
    rollout = config.policy.rollout
    return {
        "model": f"Qwen3-VL, {parameters / 1e6:.2f} M parameters, {config.train.precision}",
        "start": f"{begins}, {start.steps:,} steps of supervised training, {clock(start.seconds)} minutes",
        "arms": "; ".join(f"{name}: {', '.join(('accuracy', *parts))}" for name, parts in config.arms.items()),
        "questions": "; ".join(asked) + f"; {config.measure.samples} answers to each that is held out",
        "questions of the start's tasks": "; ".join(tests),
        "an update": f"{config.policy.algorithm.name} on {rollout.samples} answers of at most {rollout.max_tokens} "
        f"tokens to each of {rollout.prompts} questions"
        + (f", learned from {rollout.updates} times" if rollout.updates > 1 else ""),
        "training": f"{sum(found.steps for found in trained):,} updates, "
        f"{clock(sum(found.seconds for found in trained))} minutes in all (without measuring)",
        f"minutes, with seed {', '.join(map(str, config.seeds))}": "; ".join(took),
        "threads": str(torch.get_num_threads()),
        "allocator": allocator_status().how,
    }


def _certified(rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    """What a certificate says of the tokens, and what importance weights are worth, as they are and truncated."""
    if not rows:
        return []
    apart = [name for name in rows[0] if name not in _WORTH]
    table = [[_said(row[name]) for name in apart] for row in rows]
    note = (
        "The same model draws answers with weights of each kind, and scores them as the trainer does. Δ: the trainer's "
        "log-probability of a token less the sampler's (nats); k3: mean of exp(Δ) − 1 − Δ."
    )
    found = [Section("How far the sampler is from the trainer", [_APART.get(n, n) for n in apart], table, note=note)]
    worth = [name for name in _WORTH if all(name in row for row in rows)]
    if worth:
        names = ["weights", *worth] if "weights" in rows[0] else worth
        table = [[f"{row[name]:.1%}" if name in _WORTH else _said(row[name]) for name in names] for row in rows]
        note = (
            "Weights π_train/π_sampler of tokens, and of whole answers (their products). Worth: (Σw)²/(N Σw²), the "
            "share of the sample that it is worth; “TIS”: of weights that are truncated; lost: the share of the mean "
            "weight that truncation takes away."
        )
        title = "What importance weights are worth, without and with truncation"
        found.append(Section(title, [_WORTH.get(name, name) for name in names], table, note=note))
    return found


def _curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], config: HybridConfig, seed: int) -> list[Section]:
    """Of the updates before which a rollout was drawn, what it was like; of each update, what its loss was like."""
    passes = sorted({name for rows in logs.values() for row in rows for name in row if name.startswith("pass@")})
    passes.sort(key=lambda name: int(name.partition("@")[2]))
    rewards = {f"reward_{name}": f"{name}, mean" for name in config.policy.rewards.components}
    titles = {name: f"{name} of the rollout" for name in passes} | _WATCHED
    note = f"Seed {seed}; on the questions that are trained on."
    found = []
    for title, names in (("Along the training", titles), ("Rewards by component", rewards)):
        panels = {said: _courses(logs, name) for name, said in names.items()}
        panels = {said: of for said, of in panels.items() if of}
        if panels:
            found.append(Section(title, figure=plots.curves(panels), note=note))
    return found


def _courses(logs: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> dict[str, list[tuple[int, float]]]:
    courses = {
        arm: [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
        for arm, rows in logs.items()
    }
    return {arm: values for arm, values in courses.items() if values}


def _held_out(answers: Mapping[str, Sequence[Mapping[str, Any]]], asked: Asked, count: int, seed: int) -> list[Section]:
    """A few questions, an equal number of each kind, and some answers of every arm that was asked them."""
    known = {arm: {(row["image"], row["question"]): row for row in rows} for arm, rows in answers.items()}
    rows = next((rows for rows in answers.values() if rows), [])
    cards = []
    for place in evenly([row["kind"] for row in rows], [row["image"] for row in rows], count, seed):
        row = rows[place]
        said = [
            Said(arm, one["text"], one["right"], one["tokens"], (blind["text"], blind["right"]))
            for arm, found in known.items()
            if (same := found.get((row["image"], row["question"])))
            for one, blind in list(zip(same["answers"], same["on_blank"], strict=True))[:_SAMPLES]
        ]
        cards.append(Card(asked.images[row["image"]], row["question"], str(row["truth"]), row["kind"], said))
    note = (
        f"Seed {seed}; drawn at random, a kind of question at a time. “On blank”: what the same seed draws where the "
        "image is blank. All of them stand in answers.jsonl of each arm."
    )
    return [Section("Held-out questions and answers", figure=viewer(cards), note=note)] if cards else []


def _trained(samples: Mapping[str, Sequence[Mapping[str, Any]]], asked: Asked, seed: int) -> list[Section]:
    """Answers that arms learned from. Arms draw the same questions, so that they stand side by side."""
    found: dict[tuple[int, int], list[Said]] = {}
    rows: dict[tuple[int, int], Mapping[str, Any]] = {}
    for arm, of_arm in samples.items():
        for row in of_arm:
            key = (row["step"], row["prompt"])
            rows.setdefault(key, row)
            values = ", ".join(f"{name} {value:.3g}" for name, value in row["values"].items())
            notes = [values, f"advantage {row['advantage']:+.2f}", f"{row['solved']:.0%} of its group right"]
            found.setdefault(key, []).append(Said(arm, row["text"], row["correct"], row["tokens"], notes=notes))
    steps = sorted({step for step, _ in found})
    most = max(1, _CARDS // max(1, math.ceil(len(found) / max(1, len(steps)))))
    shown = {steps[place * len(steps) // most] for place in range(most)} if most < len(steps) else set(steps)
    cards = [
        Card(
            asked.images[asked.image_of[prompt]],
            rows[step, prompt]["question"],
            str(rows[step, prompt]["ground_truth"]),
            asked.kinds[prompt],
            found[step, prompt],
            step,
        )
        for step, prompt in sorted(found)
        if step in shown
    ]
    note = (
        f"Seed {seed}; of {len(shown)} of {len(steps)} rollouts, by the update before which they were drawn; all of "
        "them stand in samples.jsonl of each arm."
    )
    return [Section("Answers along the training", figure=viewer(cards), note=note)] if cards else []


def _said(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
