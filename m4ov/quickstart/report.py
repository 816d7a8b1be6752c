"""What the quickstart tells at its end: held-out questions, the two ways of a step, the operators, and how it came."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

from m4ov import sft
from m4ov.allocator import status as allocator_status
from m4ov.data import read_records
from m4ov.data.density import AXES
from m4ov.data.labels import LabelTree, coverage, coverage_map
from m4ov.data.production import report as production_report
from m4ov.data.production.steps import read_rows
from m4ov.data.whole import write_whole
from m4ov.evaluate import Accuracy, Report, SideBySide, exact_match, examples, html, plots, print_table
from m4ov.evaluate.arms import decided
from m4ov.evaluate.report import Section
from m4ov.models.qwen3_vl import cast_parameters
from m4ov.quickstart.data import Produced
from m4ov.quickstart.policy import FOLDER, Learnt
from m4ov.quickstart_recipe import QuickstartConfig
from m4ov.sft.decisions import read as read_decisions
from m4ov.sft.stage import first_replay, images_of
from m4ov.train.metrics import read as read_metrics
from m4ov.train.progress import clock
from m4ov_kernels.patches import patch


def write(
    config: QuickstartConfig,
    material: sft.Material,
    produced: Produced,
    end: sft.ArmEnd,
    policy: Learnt | None,
    folder: Path,
    console: Console,
) -> None:
    """Evaluate the trained model, compare, measure; ``report.html`` and ``results.json``."""
    began = time.perf_counter()
    task = material.task
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    patch(model)
    cast_parameters(model, task.dtype)
    options = config.evaluate
    results: list[Accuracy] = []
    with console.status("evaluating on the held-out splits") as status:
        for split in material.tests.values():
            status.update(f"evaluating on the {len(split.samples):,} held-out questions of {split.name}")
            capacity, limit = options.tokens_per_batch, options.limit
            results.append(
                exact_match(model, split, task.encoder, tokens_per_batch=capacity, limit=limit, dtype=task.dtype)
            )
        shown = [
            example
            for split, share in zip(material.tests.values(), (2, 1), strict=True)
            for example in examples(
                model, split, task.encoder, options.examples * share // 3, seed=config.run.seed, dtype=task.dtype
            )
        ]
        evaluated = time.perf_counter()
        status.update(f"{config.compare.steps} steps patched against {config.compare.steps} unpatched")
        first = next(iter(config.stages.values()))
        images = images_of(first, first_replay(first), config.compare.images_per_step)
        comparison = _side_by_side(sft.compare(config, task, material.pools, images))
        compared = time.perf_counter()
        rows, machine = _operators(status.update) if config.operators else ([], "")
    spent = (evaluated - began, compared - evaluated, time.perf_counter() - compared)
    decisions = read_decisions(folder / "decisions.jsonl")
    report = Report(
        title="m4ov quickstart: a tiny Qwen3-VL on real images",
        facts=_facts(config, model, end, material)
        | {"time of evaluation, comparison, operators": ", ".join(map(clock, spent))},
        sections=[*_of_stages(decisions), *_of_policy(policy, config, folder), *_of_production(produced, config)],
        metrics=_metrics(folder),
        accuracies=results,
        examples=shown,
        comparison=comparison,
        operators=rows,
        machine=machine,
    )
    write_whole(folder / "report.html", html(report))
    numbers = {
        "produced": produced.production.to_json() | {"seconds": produced.seconds},
        **_numbers(results, comparison, end),
        "decisions": decisions,
        "reinforcement": None if policy is None else asdict(policy),
    }
    write_whole(folder / "results.json", json.dumps(numbers, indent=1) + "\n")
    print_table(report, console)
    console.print(
        f"report: {folder / 'report.html'}\ndata: {produced.production.folder / 'report.html'}\n"
        f"model: {folder / 'model'}\nlogs: tensorboard --logdir {folder}"
    )


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of all stages, with the arm's steps."""
    rows: list[dict[str, Any]] = []
    files = sorted(folder.glob("[0-9]*-*/metrics.jsonl"), key=lambda file: int(file.parent.name.partition("-")[0]))
    for file in files:
        before = rows[-1]["step"] if rows else 0
        rows += [{**row, "step": before + row["step"]} for row in read_metrics(file)]
    return rows


def _of_stages(decisions: list[dict[str, Any]]) -> list[Section]:
    """Where each stage ended, how the skills went, and every decision."""
    last = {row["stage"]: row for row in decisions}
    rows = [
        [row["name"], str(row["arm_step"]), row["action"], "; ".join(_shares(row["figures"]))] for row in last.values()
    ]
    note = "Measured after every round on produced questions about images that were held back; none is in the figures."
    course = {"quickstart": [(row["arm_step"], row["figures"]) for row in decisions]}
    return [
        Section("Stages", ["stage", "ended at step", "because", "measured"], rows, note=note),
        Section("Skills along the training", figure=plots.courses(course)),
        decided(decisions, "Decisions of the stages"),
    ]


def _of_policy(policy: Learnt | None, config: QuickstartConfig, folder: Path) -> list[Section]:
    """The questions that were held back, before and after reinforcement learning, and how that went."""
    if policy is None:
        return []
    k = config.reinforcement.samples
    forms = (
        ("pass@1", "pass_1", "{:.1%}"),
        (f"pass@{k}", "pass_k", "{:.1%}"),
        ("right on a blank image too", "survival", "{:.1%}"),
        ("general", "general", "{:.1%}"),
        ("domain", "domain", "{:.1%}"),
    )
    rows = [
        [name, *(form.format(getattr(of, key)) for _, key, form in forms)]
        for name, of in (("before", policy.before), ("after", policy.after))
    ]
    log = read_metrics(folder / FOLDER / "rl.jsonl")
    watched = (("pass@1", "pass@1 of the rollout"), ("entropy", "entropy (nats a token)"))
    courses = {
        title: {"quickstart": [(row["step"], row[name]) for row in log if name in row]} for name, title in watched
    }
    note = (
        f"{policy.steps} updates of {config.reinforcement.policy.algorithm.name} in {clock(policy.seconds)} minutes, "
        f"on questions of the stages. Measured on those that were held back for the gates, {k} answers drawn to each; "
        "general and domain: the likeliest answers. Several objectives, arm against arm: m4ov run hybrid-rl."
    )
    return [
        Section("Reinforcement learning", ["", *(title for title, _, _ in forms)], rows, note=note),
        Section("Along the reinforcement learning", figure=plots.curves(courses), printed=False),
    ]


def _shares(figures: Mapping[str, float]) -> list[str]:
    return [f"{skill} {share:.1%}" for skill, share in figures.items()]


def _of_production(produced: Produced, config: QuickstartConfig) -> list[Section]:
    """Counts, coverage and density of the data; the whole of it is in the report of its own."""
    made = produced.production
    steps = [
        [
            row["step"],
            "" if row["out"] is None else f"{row['out']:,}",
            f"{row['rejected']:,}" if row["rejected"] else "",
        ]
        for row in production_report.steps(made)
    ]
    took = "was there" if produced.seconds is None else f"took {produced.seconds:.0f} s"
    why = "; ".join(
        f"{reason} {count:,}" for (_, reason), count in sorted(made.reasons.items(), key=lambda one: -one[1])
    )
    note = f"It {took}. Rejected: {why or 'nothing'}. Samples, with scores: data/report.html."
    trees = [LabelTree.load(made.folder / "labels" / f"{name}.yaml") for name in ("topics", "capabilities")]
    covered = coverage(read_records(made.records), *trees)
    table = [row for row in covered.table() if row["sum"]]
    audits = list(read_rows(made.folder / "audit.jsonl"))
    means = ", ".join(f"{axis} {sum(row['scores'][axis] for row in audits) / len(audits):.2f}" for axis in AXES)
    density = [
        [f"{row['low']:.1f} to {row['low'] + 0.1:.1f}", f"{row['images']:,}", f"{row['per_image']:.1f}"]
        for row in production_report.histogram(audits)
        if row["images"]
    ]
    picture = base64.b64encode(coverage_map(covered)).decode()
    return [
        Section("Data: what each step made", ["step", "made", "rejected"], steps, note=note, printed=False),
        Section(
            "Data: records by topic and capability",
            list(table[0]),
            [[str(value or "") for value in row.values()] for row in table],
            figure=f'<img src="data:image/svg+xml;base64,{picture}" alt="Records by topic and capability">',
            note=f"Topics without a record are left out. Records in neither tree: {sum(covered.refused.values())}.",
            printed=False,
        ),
        Section(
            "Data: information density of the images",
            ["density", "images", "questions an image"],
            density,
            note=f"Means: {means}. Images of one source are much alike, and so are their shares.",
            printed=False,
        ),
    ]


def _facts(config: QuickstartConfig, model: torch.nn.Module, end: sft.ArmEnd, material: sft.Material) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = "m4ov's own" if config.model.implementation == "m4ov" else "transformers' class, "
    if config.model.implementation == "transformers":
        kind += "patched" if config.train.patch else "unpatched"
    pools = (
        f"{name}: {len(pool.split.samples):,} questions on {len(pool.split.images):,} images"
        for name, pool in material.pools.items()
    )
    return {
        "model": f"Qwen3-VL ({kind}), {parameters / 1e6:.2f} M parameters, random initialisation "
        f"(seed {config.run.seed})",
        "training data": "; ".join(pools),
        "training": f"{end.steps:,} steps, {end.tokens:,} tokens, {clock(end.seconds)} minutes, "
        f"{config.train.precision}",
        "threads": str(torch.get_num_threads()),
        "allocator": allocator_status().how,
    }


def _side_by_side(comparison: sft.Comparison) -> SideBySide:
    return SideBySide(
        patched_seconds=comparison.patched.seconds,
        unpatched_seconds=comparison.unpatched.seconds,
        patched_step=comparison.patched.step_seconds,
        unpatched_step=comparison.unpatched.step_seconds,
        patched_peak_mib=comparison.patched.peak_mib,
        unpatched_peak_mib=comparison.unpatched.peak_mib,
        loss_differences=comparison.loss_differences,
        samples=comparison.samples,
        tokens=comparison.tokens,
        patch=comparison.patch,
    )


def _operators(say: Any) -> tuple[list[dict[str, Any]], str]:
    """A short run of the operators' benchmark: rows as dictionaries, and the machine in words."""
    import m4ov_bench
    from m4ov_bench.measure import Effort

    families = ("norm", "activation", "rope")  # the head takes minutes
    # One case an operator, of 1,024 rows, in half a second each: the main cases take two minutes.
    effort, how = Effort(seconds=0.5, each=0.25, fewest=3, most=15), allocator_status().how
    rows = m4ov_bench.run(families, quick=True, say=say, allocator=how, only="1024, ", effort=effort)
    if not rows:
        return [], ""
    machine = rows[0].machine
    return [asdict(row) for row in rows], f"{machine.cpu}, {machine.threads} threads, {machine.isa}, {machine.date}"


def _numbers(results: list[Accuracy], comparison: SideBySide, end: sft.ArmEnd) -> dict[str, Any]:
    return {
        "accuracy": {found.split: found.value for found in results},
        "kinds": {found.split: {kind: list(pair) for kind, pair in found.kinds.items()} for found in results},
        "steps": end.steps,
        "training_seconds": end.seconds,
        "tokens": end.tokens,
        "step_seconds": {"patched": comparison.patched_step, "unpatched": comparison.unpatched_step},
        "peak_mib": {"patched": comparison.patched_peak_mib, "unpatched": comparison.unpatched_peak_mib},
        "loss_differences": list(comparison.loss_differences),
    }
