"""`m4ov run curriculum`: arms of stages with forgetting gates, from one start, measured against each other."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from m4ov import sft
from m4ov.allocator import status as allocator_status
from m4ov.data.whole import write_whole
from m4ov.evaluate import Example, Report, accuracies, examples, html, print_table, shares
from m4ov.evaluate.arms import CURRICULUM, ArmRun, claims, sections
from m4ov.manifest import CurriculumConfig, scaled
from m4ov.models.qwen3_vl import from_pretrained
from m4ov.sft.decisions import read as read_decisions
from m4ov.train import RunFolder, World, command, ranks_started
from m4ov.train.metrics import read as read_metrics
from m4ov.train.progress import clock


def run(config: CurriculumConfig) -> None:
    """Every arm with every seed, then ``report.html`` over all of them. What was done before, in the same folder, is
    not done again.

    Started by torchrun, the ranks train together, as the recipe's ``parallel`` says; rank 0 measures, and its figures
    decide for all.

    Raises:
        LayoutError: the recipe's ``parallel`` does not fit; before the ranks join.
        RunFolderError, DataError, CheckpointError, TrainingError, RankError, MetricsError: one line says what is wrong.
        Interrupted: Ctrl-C during training; a checkpoint was written.
    """
    config = scaled(config)
    sft.check(config, ranks_started())
    world, console = command.begin(config.train, config.run.threads)
    material = sft.gather(config, console)
    for name in config.arms:
        missing = sft.missing_pools(config, name)
        if missing:
            console.print(f"[yellow]{name} is left out: pools.{missing[0]} names no data[/yellow]")
    runs = [found for seed in config.seeds for found in _run_seed(config, material, seed, console, world)]
    command.end(world)
    if world.first:
        _report(config, material, runs, console)


def _run_seed(
    config: CurriculumConfig, material: sft.Material, seed: int, console: Console, world: World
) -> list[ArmRun]:
    folder = Path(config.run.folder) / f"seed-{seed}"
    claim = world.alone("the run folder", lambda: RunFolder(folder, sft.fingerprint_of(config, seed)))
    measure = partial(
        shares,
        splits=material.gates,
        encoder=material.task.encoder,
        tokens_per_batch=config.evaluate.tokens_per_batch,
        limit=config.gates.limit,
        dtype=material.task.dtype,
    )
    try:
        runs = []
        for name, _ in sft.arms_of(config):
            end = sft.run_arm(
                config, material, name, seed=seed, folder=folder, measure=measure, console=console, world=world
            )
            figures = world.alone(f"asking {name}", partial(_final, config, material, folder / name, console))
            runs.append(ArmRun(name, seed, end.steps, end.tokens, end.seconds, world.share("figures", figures)))
        return runs
    finally:
        if claim is not None:
            claim.close()


def _final(config: CurriculumConfig, material: sft.Material, folder: Path, console: Console) -> dict[str, float]:
    """Skill → share on the records that no decision rested on; kept in ``accuracy.json``."""
    file = folder / "accuracy.json"
    if not file.exists():
        with console.status(f"asking {folder.name} the held-out questions"):
            model = from_pretrained(folder / "model", dtype=material.task.dtype)
            found = accuracies(
                model,
                material.tests,
                material.task.encoder,
                tokens_per_batch=config.evaluate.tokens_per_batch,
                limit=config.evaluate.limit,
                dtype=material.task.dtype,
            )
        numbers = {
            skill: {"share": accuracy.value, "asked": len(accuracy.right), "kinds": accuracy.kinds}
            for skill, accuracy in found.items()
        }
        write_whole(file, json.dumps(numbers, indent=1))
    return {skill: row["share"] for skill, row in json.loads(file.read_text(encoding="utf-8")).items()}


def _report(config: CurriculumConfig, material: sft.Material, runs: list[ArmRun], console: Console) -> None:
    folder, first = Path(config.run.folder), config.seeds[0]
    home = folder / f"seed-{first}"
    names = [name for name, _ in sft.arms_of(config)]
    decided = {name: read_decisions(home / name / "decisions.jsonl") for name in names}
    courses = {
        name: [(row["arm_step"], row["figures"]) for row in rows]
        for name, rows in decided.items()
        if config.arms[name].start
    }
    shown = CURRICULUM if CURRICULUM in names else names[-1]
    report = Report(
        title="m4ov curriculum: domain gain without general loss",
        facts=_facts(config, material, runs, home),
        sections=sections(runs, courses, decided.get(CURRICULUM, [])),
        examples=_examples(config, material, home / shown / "model"),
    )
    write_whole(folder / "report.html", html(report))
    numbers = {
        "facts": report.facts,
        "arms": [asdict(found) for found in runs],
        "claims": [dict(zip(("claim", "came out", "figures"), row, strict=True)) for row in claims(runs)],
        "decisions": decided.get(CURRICULUM, []),
    }
    write_whole(folder / "results.json", json.dumps(numbers, indent=1) + "\n")
    print_table(report, console)
    console.print(f"report: {folder / 'report.html'}\nmodels: {folder / 'seed-*' / '*' / 'model'}")


def _facts(config: CurriculumConfig, material: sft.Material, runs: list[ArmRun], home: Path) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in from_pretrained(home / runs[0].arm / "model").parameters())
    pools = (
        f"{name}: {len(p.split.samples):,} questions on {len(p.split.images):,} images"
        for name, p in material.pools.items()
    )
    held_out = (
        f"{name}: {len(gate.samples):,} for the gates (at most {config.gates.limit or len(gate.samples):,} asked), "
        f"{len(material.tests[name].samples):,} for the figures"
        for name, gate in material.gates.items()
    )
    seconds = sum(found.seconds for found in runs)
    return {
        "model": f"Qwen3-VL, {parameters / 1e6:.2f} M parameters, {config.train.precision}",
        "pools": "; ".join(pools),
        "held-out questions": "; ".join(held_out),
        "a step": f"{config.data.images_per_step} images; every arm has a budget of steps, and all its steps are alike",
        "training": f"{sum(f.steps for f in runs):,} steps, {clock(seconds)} minutes in all, "
        f"{clock(seconds / len(config.seeds))} a seed (without measuring)",
        "data wait": _data_wait(home),
        "threads": str(torch.get_num_threads()),
        "allocator": allocator_status().how,
    }


def _data_wait(home: Path) -> str:
    """Of the time of the steps, over all stages of a seed."""
    rows = [row for file in home.glob("*/*/metrics.jsonl") for row in read_metrics(file)]
    waited, took = (sum(row[name] for row in rows) for name in ("data_wait_seconds", "step_seconds"))
    return f"{waited / took:.1%} of a step" if took else "not measured"


def _examples(config: CurriculumConfig, material: sft.Material, folder: Path) -> list[Example]:
    """Held-out questions, answered token after token."""
    model = from_pretrained(folder, dtype=material.task.dtype)
    each = config.evaluate.examples // max(1, len(material.tests))
    return [
        example
        for split in material.tests.values()
        for example in examples(
            model, split, material.task.encoder, each, seed=config.seeds[0], dtype=material.task.dtype
        )
    ]
