"""`m4ov run sft`: post-train a Qwen3-VL on records from files, measure it on held-out ones, write it and a report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

from m4ov.allocator import status as allocator_status
from m4ov.data.whole import write_whole
from m4ov.evaluate import Accuracy, Example, Report, html, print_table
from m4ov.evaluate.answers import answered, last_answers
from m4ov.evaluate.report import Section
from m4ov.models.qwen3_vl import cast_parameters, from_pretrained
from m4ov.sft import layout_of, streamed
from m4ov.sft.source import sizes
from m4ov.sft_recipe import SftConfig, resolved
from m4ov.train import RunFolder, World, command, ranks_started
from m4ov.train.metrics import read
from m4ov.train.progress import clock
from m4ov_kernels.patches import patch


def run(config: SftConfig) -> None:
    """Everything, from the files to ``report.html``. The same command on the same folder goes on where it was.

    Started by torchrun, the ranks train together, as the recipe's ``parallel`` says; the rest is rank 0's.

    Raises:
        LayoutError, WeightsError, DataError, ValueError: an argument does not fit; before anything is trained.
        RunFolderError, CheckpointError, TrainingError, RankError, MetricsError: one line says what is wrong.
        Interrupted: Ctrl-C during training; a checkpoint was written.
    """
    config = resolved(config)
    layout = layout_of(config.parallel, ranks_started(), sizes(config))
    if config.data.rows % layout.data:
        expected = f"a multiple of {layout.data}, the ranks that have samples of their own (layout {layout})"
        raise ValueError(f"data.rows: expected {expected}; got {config.data.rows}")
    world, console = command.begin(config.train, config.run.threads)
    folder = Path(config.run.folder)
    claim = world.alone("the run folder", lambda: RunFolder(folder, streamed.fingerprint_of(config)))
    try:
        material = _prepared(config, folder, world, console)
        trained = streamed.run(config, material, layout, folder, console, world)
        command.end(world)
        if world.first:
            _report(config, material, trained, folder, console)
    finally:
        if claim is not None:
            claim.close()


def _prepared(config: SftConfig, folder: Path, world: World, console: Console) -> streamed.Material:
    """A folder in which nothing could be trained is nobody's: it may be used with other arguments."""
    try:
        return streamed.prepare(config, folder, world, console)
    except Exception:
        if world.first and not (folder / "checkpoints").exists():
            (folder / "run.json").unlink(missing_ok=True)
            (folder / "tokenizer.json").unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _Flow:
    """How steps went, over the whole run.

    Attributes:
        fill: tokens over what the rows had room for.
        data_wait: share of the steps' time that was waited for data; of the rank that waited most.
        step_seconds: mean.
    """

    fill: float
    data_wait: float
    step_seconds: float

    @classmethod
    def of(cls, config: SftConfig, trained: streamed.Trained, metrics: list[dict[str, Any]]) -> _Flow:
        ends = [0, *(row["step"] for row in metrics)]
        counts = [after - before for before, after in pairwise(ends)]
        waited, took = (
            sum(row[name] * count for row, count in zip(metrics, counts, strict=True))
            for name in ("data_wait_seconds", "step_seconds")
        )
        room = trained.result.steps * config.data.rows * config.data.capacity
        return cls(trained.result.tokens / room, waited / took, took / ends[-1])


def _report(
    config: SftConfig, material: streamed.Material, trained: streamed.Trained, folder: Path, console: Console
) -> None:
    metrics = read(folder / "metrics.jsonl")
    flow = _Flow.of(config, trained, metrics)
    bad = _quarantined(folder)
    accuracy, examples = _answers(config, material, folder, console)
    facts = _facts(config, material, trained, flow, bad)
    sections = []
    if trained.losses:
        rows = [[f"{step:,}", f"{loss:.4f}"] for step, loss in trained.losses]
        note = "Cross entropy of the answers' tokens, nats, the mean over all of them."
        sections.append(Section("Loss on the held-out records", ("step", "loss"), rows, note=note))
    if bad:
        kinds = [[kind, f"{count:,}"] for kind, count in bad.most_common()]
        note = "Each is named in quarantine.jsonl, with file, line and field."
        sections.append(Section("Records that could not be used", ("kind", "records"), kinds, note=note))
    report = Report(
        title="m4ov sft",
        facts=facts,
        metrics=metrics,
        accuracies=[accuracy] if accuracy else [],
        examples=examples,
        sections=sections,
    )
    write_whole(folder / "report.html", html(report))
    numbers = {
        "steps": trained.result.steps,
        "tokens": trained.result.tokens,
        "training_seconds": trained.result.seconds,
        "step_seconds": flow.step_seconds,
        "fill": flow.fill,
        "data_wait": flow.data_wait,
        "parameters": trained.parameters[0],
        "trained_parameters": trained.parameters[1],
        "records": trained.records,
        "epochs": trained.epochs,
        "stream": trained.stream,
        "quarantined": dict(bad),
        "held_out": {
            "records": len(material.held_out.made) if material.held_out else 0,
            "loss": [list(pair) for pair in trained.losses],
            "asked": len(accuracy.right) if accuracy else 0,
            "exact_match": accuracy.value if accuracy else None,
            "kinds": {kind: list(pair) for kind, pair in accuracy.kinds.items()} if accuracy else {},
        },
    }
    write_whole(folder / "results.json", json.dumps(numbers, indent=1) + "\n")
    print_table(report, console)
    console.print(
        f"report: {folder / 'report.html'}\nmodel: {folder / 'model'}\n"
        f"logs: tensorboard --logdir {folder / 'tensorboard'}"
    )


def _answers(
    config: SftConfig, material: streamed.Material, folder: Path, console: Console
) -> tuple[Accuracy | None, list[Example]]:
    """Of the written model, to the held-out records."""
    options, rows = config.evaluate, material.held_out
    if rows is None or not options.short:
        return None, []
    with console.status("asking the held-out questions"):
        ours = from_pretrained(folder / "model", dtype=material.dtype)
        accuracy = last_answers(ours, rows, short=options.short)
        del ours
        if accuracy is None or not options.examples:
            return accuracy, []
        theirs = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
        patch(theirs)
        cast_parameters(theirs, material.dtype).eval()
        return accuracy, answered(theirs, rows, options.examples, short=options.short, seed=config.run.seed)


def _quarantined(folder: Path) -> Counter[str]:
    """Kind → records that were passed over, on any rank."""
    bad: Counter[str] = Counter()
    for file in sorted(folder.glob("quarantine*.jsonl")):
        bad.update(json.loads(line)["kind"] for line in file.read_text(encoding="utf-8").splitlines())
    return bad


def _facts(
    config: SftConfig, material: streamed.Material, trained: streamed.Trained, flow: _Flow, bad: Counter[str]
) -> dict[str, str]:
    result, pixels = trained.result, material.encoder.pixels
    what = config.model.path or f"new, random initialisation (seed {config.run.seed})"
    kind = "all weights"
    if config.lora.rank:
        kind = f"LoRA of rank {config.lora.rank} on {', '.join(config.lora.targets)}"
    elif config.freeze:
        kind = f"all but {', '.join(config.freeze)}"
    if config.average.kind != "none":
        kind += f", averaged ({config.average.kind})"
    held_out = material.held_out
    return {
        "model": f"Qwen3-VL, {trained.parameters[0] / 1e6:.2f} M parameters: {what}",
        "trained": f"{kind}: {trained.parameters[1] / 1e6:.2f} M parameters",
        "records": f"{trained.records:,} to train on ({config.data.train}), read {trained.epochs:.2f} times; "
        f"{sum(bad.values()):,} unusable; "
        f"{len(held_out.made) if held_out else 0:,} held out",
        "images": f"{pixels.min_pixels:,} to {pixels.max_pixels:,} pixels each",
        "a step": f"{config.data.rows} rows of {config.data.capacity:,} tokens",
        "training": f"{result.steps:,} steps, {result.tokens:,} tokens, {clock(result.seconds)} minutes, "
        f"{config.train.precision}",
        "fill": f"{flow.fill:.1%} of the rows",
        "data wait": f"{flow.data_wait:.1%} of a step of {1e3 * flow.step_seconds:.0f} ms",
        "learning rates": f"{config.optim.muon_lr:g} (Muon), {config.optim.lr:g} (AdamW)",
        "threads": str(torch.get_num_threads()),
        "allocator": allocator_status().how,
    }
