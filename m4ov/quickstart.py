"""`m4ov run quickstart`: train a tiny Qwen3-VL on real images, evaluate it, compare patched and unpatched, report."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText
from transformers import logging as transformers_logging

from m4ov import sft
from m4ov.allocator import status as allocator_status
from m4ov.evaluate import Accuracy, Report, SideBySide, exact_match, examples, html, print_table
from m4ov.models.qwen3_vl import cast_parameters
from m4ov.recipe import QuickstartConfig
from m4ov.train import RunFolder, TrainResult, World, ranks_started, write_text
from m4ov.train.metrics import check, read
from m4ov.train.progress import clock
from m4ov_kernels.patches import patch


def run(config: QuickstartConfig) -> None:
    """Everything, from the data to ``report.html``. What was done before, in the same folder, is not done again.

    Started by torchrun, the ranks train together, as the recipe's ``parallel`` says; the rest is rank 0's.

    Raises:
        LayoutError: the recipe's ``parallel`` does not fit; before the ranks join.
        RunFolderError, DataError, CheckpointError, TrainingError, RankError, MetricsError: one line says what is wrong.
        Interrupted: Ctrl-C during training; a checkpoint was written.
    """
    check(config.train.wandb)
    sft.layout_of(config.parallel, ranks_started(), sft.sizes_of(config.model.text), whole=sft.whole_of(config))
    world = World.start(config.train.timeout_seconds)
    console = Console(quiet=not world.first)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(config.run.threads or usable_cpus())
    folder = world.alone("the run folder", lambda: RunFolder(config.run.folder, sft.fingerprint(config)))
    try:
        task = sft.prepare(config, console)
        result = sft.run(config, task, Path(config.run.folder), console, world)
        world.close()
        if world.first:
            # torchrun gives each rank one thread; the others' cores are free now
            torch.set_num_threads(torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            _report(config, task, result, Path(config.run.folder), console)
    finally:
        if folder is not None:
            folder.close()


def _report(config: QuickstartConfig, task: sft.Task, result: TrainResult, folder: Path, console: Console) -> None:
    began = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    patch(model)
    cast_parameters(model, task.dtype)
    options = config.evaluate
    results: list[Accuracy] = []
    with console.status("evaluating on the held-out splits") as status:
        for split in task.held_out:
            status.update(f"evaluating on the {len(split.samples):,} held-out questions of {split.name}")
            results.append(
                exact_match(
                    model,
                    split,
                    task.encoder,
                    tokens_per_batch=options.tokens_per_batch,
                    limit=options.limit,
                    dtype=task.dtype,
                )
            )
        shown = [
            example
            for split, share in zip(task.held_out, (2, 1), strict=True)
            for example in examples(
                model, split, task.encoder, options.examples * share // 3, seed=config.run.seed, dtype=task.dtype
            )
        ]
        evaluated = time.perf_counter()
        status.update(f"{config.compare.steps} steps patched against {config.compare.steps} unpatched")
        comparison = _side_by_side(sft.compare(config, task))
        compared = time.perf_counter()
        rows, machine = _operators(status.update) if config.operators else ([], "")
    report = Report(
        title="m4ov quickstart: a tiny Qwen3-VL on real images",
        facts=_facts(config, model, result, task)
        | {
            "time of evaluation, comparison, operators": f"{clock(evaluated - began)}, {clock(compared - evaluated)}, "
            f"{clock(time.perf_counter() - compared)}"
        },
        metrics=read(folder / "metrics.jsonl"),
        accuracies=results,
        examples=shown,
        comparison=comparison,
        operators=rows,
        machine=machine,
    )
    write_text(folder / "report.html", html(report))
    write_text(folder / "results.json", json.dumps(_numbers(results, comparison, result), indent=1))
    print_table(report, console)
    console.print(
        f"report: {folder / 'report.html'}\nmodel: {folder / 'model'}\n"
        f"logs: tensorboard --logdir {folder / 'tensorboard'}"
    )


def usable_cpus() -> int:
    """Cores this process may run on, not more than the machine's physical share given to PyTorch by default."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def _facts(config: QuickstartConfig, model: torch.nn.Module, result: TrainResult, task: sft.Task) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    general, domain = task.training
    kind = "m4ov's own" if config.model.implementation == "m4ov" else "transformers' class, "
    if config.model.implementation == "transformers":
        kind += "patched" if config.train.patch else "unpatched"
    return {
        "model": f"Qwen3-VL ({kind}), {parameters / 1e6:.2f} M parameters, random initialisation "
        f"(seed {config.run.seed})",
        "training data": f"{len(general.samples):,} easy-vqa questions on {len(general.images):,} images; "
        f"{len(domain.images):,} scanned digits",
        "training": f"{result.steps:,} steps, {result.tokens:,} tokens, {clock(result.seconds)} minutes, "
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

    families = ("norm", "activation", "rope", "head")
    rows = m4ov_bench.run(families, quick=True, say=say, allocator=allocator_status().how)
    if not rows:
        return [], ""
    machine = rows[0].machine
    return [asdict(row) for row in rows], f"{machine.cpu}, {machine.threads} threads, {machine.isa}, {machine.date}"


def _numbers(results: list[Accuracy], comparison: SideBySide, result: TrainResult) -> dict[str, Any]:
    return {
        "accuracy": {found.split: found.value for found in results},
        "kinds": {found.split: {kind: list(pair) for kind, pair in found.kinds.items()} for found in results},
        "steps": result.steps,
        "training_seconds": result.seconds,
        "tokens": result.tokens,
        "step_seconds": {"patched": comparison.patched_step, "unpatched": comparison.unpatched_step},
        "peak_mib": {"patched": comparison.patched_peak_mib, "unpatched": comparison.unpatched_peak_mib},
        "loss_differences": list(comparison.loss_differences),
    }
