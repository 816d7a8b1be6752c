"""The recipe from its data to its report; what was done before, in the same folder, is not done again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from m4ov import sft
from m4ov.data.whole import write_whole
from m4ov.evaluate import shares
from m4ov.evaluate.policies import ArmRun, Figures
from m4ov.hybrid.material import Material, gather, start_of
from m4ov.hybrid.measured import measure
from m4ov.hybrid.report import write
from m4ov.hybrid.training import train_arm
from m4ov.hybrid_recipe import START, HybridConfig
from m4ov.models.qwen3_vl import from_pretrained
from m4ov.rl import mismatch
from m4ov.rl_recipe import SAMPLER_WEIGHTS
from m4ov.train import RunFolder, World, command, ranks_started

_CERTIFIED = 32  # held-out questions that samplers of all kinds are asked


def run(config: HybridConfig) -> None:
    """The start, every arm with every seed, then ``report.html`` over all of them.

    Started by torchrun, the ranks train together, each on its share of the samples; rank 0 measures.

    Raises:
        LayoutError: the recipe's ``parallel`` does not fit; before the ranks join.
        RunFolderError, DataError, RewardError, CheckpointError, TrainingError, RankError, MetricsError: one line says
            what is wrong.
        Interrupted: Ctrl-C during training; a checkpoint was written.
    """
    home = Path(config.run.folder)
    sft.check(config.manifest(), ranks_started())
    world, console = command.begin(config.train, config.run.threads)
    claim = world.alone("the run folder", lambda: RunFolder(home, fingerprint(config)))
    try:
        material = gather(config, console)
        _start(config, material, home, console, world)
        runs = [_measured(config, material, START, config.start.seed, home / START, console, world)]
        for seed in config.seeds:
            for name in config.arms:
                folder = home / f"seed-{seed}" / name
                _arm(config, material, name, seed, folder, console, world)
                runs.append(_measured(config, material, name, seed, folder, console, world))
        command.end(world)
        if world.first:
            write(config, material, runs, home, console, _certificates(config, material, home, console))
    finally:
        if claim is not None:
            claim.close()


def fingerprint(config: HybridConfig) -> dict[str, Any]:
    """What models and figures depend on, flat: key → value. Seeds are not in it: each has a folder of its own."""
    tree = asdict(config)
    names = ("data", "chains", "model", "optim", "gates", "start", "steps", "scale", "arms", "measure")
    parts = {name: tree[name] for name in names} | {"evaluate": {"limit": config.evaluate.limit}}
    if config.start.model:
        digest = hashlib.sha256()
        for file in sorted(Path(config.start.model).glob("*.safetensors")):
            digest.update(file.read_bytes())
        parts["start"]["weights"] = digest.hexdigest()
    trained = {name: tree["train"][name] for name in ("precision", "patch", "fp8")}
    policy = {"policy": tree["policy"], "policy_optim": tree["policy_optim"]}
    return sft.flat({**parts, **policy, "train": trained})


def _start(config: HybridConfig, material: Material, home: Path, console: Console, world: World) -> None:
    task = material.start.task
    figures = partial(
        shares,
        splits=material.start.gates,
        encoder=task.encoder,
        tokens_per_batch=config.evaluate.tokens_per_batch,
        limit=config.gates.limit,
        dtype=task.dtype,
    )
    sft.run_arm(
        config.manifest(),
        material.start,
        START,
        seed=config.start.seed,
        folder=home,
        measure=figures,
        console=console,
        world=world,
        begin=Path(config.start.model) if config.start.model else None,
    )


def _arm(
    config: HybridConfig, material: Material, name: str, seed: int, folder: Path, console: Console, world: World
) -> None:
    """Train an arm, or go on with it. Collective."""
    policy, parts = config.policy_of(name, seed), ", ".join(("accuracy", *config.arms[name]))
    if not (folder / "arm.json").exists():
        console.print(f"[bold]{name}[/bold], seed {seed}: {parts}, {config.updates} updates")
    train_arm(
        material.start.task,
        material.training.prompts,
        policy,
        begin=start_of(Path(config.run.folder)),
        folder=folder,
        train_config=replace(config.train, steps=config.updates),
        optim=config.policy_optim,
        seed=seed,
        console=console,
        world=world,
    )


def _certificates(
    config: HybridConfig, material: Material, home: Path, console: Console
) -> list[dict[str, float | str]]:
    """How far a sampler of each kind of weights is from the trainer, with the last arm's model of the first seed; kept
    in ``certificates.json``."""
    folder = home / f"seed-{config.seeds[0]}" / list(config.arms)[-1]
    file = folder / "certificates.json"
    if not file.exists():
        task, prompts = material.start.task, material.held_out.prompts
        count = min(_CERTIFIED, len(prompts))
        some = [prompts[place * len(prompts) // count].sample for place in range(count)]
        with console.status("sampling with weights in 16, 8 and 4 bits"):
            model = from_pretrained(folder / "model", dtype=task.dtype)
            kinds = ("model",) if task.config.text.num_experts else SAMPLER_WEIGHTS
            ends = [task.encoder.end_token]
            found = mismatch(model, some, config.policy.rollout, weights=kinds, end_token_ids=ends)
        write_whole(file, json.dumps([one.row() for one in found], indent=1))
    rows: list[dict[str, float | str]] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def _measured(
    config: HybridConfig, material: Material, name: str, seed: int, folder: Path, console: Console, world: World
) -> ArmRun:
    """Figures of an arm's model, kept in ``figures.json`` with its answers in ``answers.jsonl``; on every rank."""
    file = folder / "figures.json"

    def ask() -> dict[str, Any]:
        if not file.exists():
            task = material.start.task
            with console.status(f"asking {name} the held-out questions"):
                found, answers = measure(
                    from_pretrained(folder / "model", dtype=task.dtype),
                    material.held_out,
                    material.start.tests,
                    task,
                    policy=config.policy,
                    samples=config.measure.samples,
                    evaluate=config.evaluate,
                    seed=config.start.seed,
                )
            write_whole(folder / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in answers))
            write_whole(file, json.dumps(asdict(found), indent=1))
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        console.print(
            f"{name}: pass@1 {figures['pass_1']:.1%}, pass@{config.measure.samples} {figures['pass_k']:.1%}, "
            f"{figures['length']:.1f} tokens, {figures['survival']:.1%} of right answers on a blank image too"
        )
        return {**figures, "arm": json.loads((folder / "arm.json").read_text(encoding="utf-8"))}

    found = world.share("figures", world.alone(f"asking {name}", ask))
    arm = found.pop("arm")
    return ArmRun(name, seed, int(arm["steps"]), float(arm["seconds"]), Figures(**found))
