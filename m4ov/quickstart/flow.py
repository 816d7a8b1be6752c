"""The quickstart from its data to its report; what was done before, in the same folder, is not done again."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from m4ov import sft
from m4ov.evaluate import shares
from m4ov.quickstart.data import Produced, gather, produce
from m4ov.quickstart.policy import learn
from m4ov.quickstart.report import write
from m4ov.quickstart_recipe import ARM, QuickstartConfig
from m4ov.train import RunFolder, World, command, ranks_started


def run(config: QuickstartConfig) -> None:
    """Everything, from images to ``report.html``.

    Started by torchrun, the ranks train together, as the recipe's ``parallel`` says; the rest is rank 0's.

    Raises:
        LayoutError: the recipe's ``parallel`` does not fit; before the ranks join.
        RunFolderError, BuildError, DataError, CheckpointError, TrainingError, RankError, MetricsError: one line says
            what is wrong.
        Interrupted, KeyboardInterrupt: Ctrl-C; what was done is kept.
    """
    manifest, home = config.manifest(), Path(config.run.folder)
    sft.check(manifest, ranks_started())
    world, console = command.begin(config.train, config.run.threads)
    folder = world.alone("the run folder", lambda: RunFolder(home, fingerprint(config)))

    def data() -> Produced:
        assert folder is not None
        produced = produce(config, console)
        [digest] = sft.digests([produced.production.folder / "records"]).values()
        folder.claim({"records": digest}, "data.json")
        return produced

    try:
        produced = world.alone("producing the data", data)
        material = gather(config, console)
        _say(material, config, console, world)
        measure = partial(
            shares,
            splits=material.gates,
            encoder=material.task.encoder,
            tokens_per_batch=config.evaluate.tokens_per_batch,
            limit=config.gates.limit,
            dtype=material.task.dtype,
        )
        end = sft.run_arm(
            manifest,
            material,
            ARM,
            seed=config.run.seed,
            folder=home.parent,
            measure=measure,
            console=console,
            world=world,
            home=home,
        )
        command.end(world)
        if produced is not None:
            policy = learn(config, material, home, console) if config.updates else None
            write(config, material, produced, end, policy, home, console)
    finally:
        if folder is not None:
            folder.close()


def fingerprint(config: QuickstartConfig) -> dict[str, Any]:
    """What the data and the training depend on, flat: key → value. Another folder, other ranks and other ways of
    looking at it are not in it; the records that came out are told apart by their content."""
    tree = asdict(config)
    names = ("scale", "pools", "data", "model", "optim", "gates", "stages", "production", "reinforcement")
    parts = {name: tree[name] for name in names}
    parts["production"].pop("engine")
    trained = {name: tree["train"][name] for name in ("steps", "precision", "patch", "fp8")}
    return sft.flat({**parts, "run": {"seed": config.run.seed}, "train": trained})


def _say(material: sft.Material, config: QuickstartConfig, console: Console, world: World) -> None:
    text = material.task.config.text
    pools = ", ".join(f"{name} {len(p.split.samples):,} questions" for name, p in material.pools.items())
    console.print(
        f"Qwen3-VL, {text.num_hidden_layers} layers of {text.hidden_size}, "
        f"{material.task.tokenizer.get_vocab_size()} tokens in the vocabulary, {config.train.precision}, "
        f"{f'{world.size} ranks, each ' * (world.size > 1)}{torch.get_num_threads()} threads; to train on: {pools}"
    )
