"""What the start is trained on and arms are asked: pools, held-out records, prompts with their images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from m4ov import sft
from m4ov.data import DataError, Pool, digits, easy_vqa, encoder_of
from m4ov.data.recorded import divide
from m4ov.hybrid.asked import Asked, asked_of, grids_of
from m4ov.hybrid_recipe import START, HybridConfig
from m4ov.models.qwen3_vl import config_of
from m4ov.sft.task import DTYPES, Task


@dataclass(frozen=True)
class Material:
    """Of the start, and of the arms."""

    start: sft.Material
    training: Asked
    held_out: Asked


def gather(config: HybridConfig, console: Console) -> Material:
    """Read and compose all of it: a function of the recipe, the packages and ``start.model`` alone.

    Raises:
        DataError: a package is missing, its data are broken, or ``start.model`` is no model that a curriculum wrote.
    """
    data, made = config.data, config.chains
    imitated, training, held_out = grids_of(data, made)
    options = {"folder": data.easy_vqa, "on_bad_image": data.on_bad_image}
    figures = {part: easy_vqa(part, data.image_size, **options) for part in ("train", "test")}
    for split in figures.values():
        sft.say_left_out(split, console)
    scans = digits(data.image_size, held_out=data.held_out_digits, split_seed=data.split_seed)
    pools = {
        "general": Pool("general", figures["train"], data.questions_per_image, flip=data.flip),
        "domain": Pool("domain", scans[0], shift=data.shift),
        "chains": Pool("chains", imitated.split("chains", made.styles, made.seed), data.questions_per_image),
    }
    divided = {
        name: divide(split, config.gates.share) for name, split in (("general", figures["test"]), ("domain", scans[1]))
    }
    gates, tests = ({name: parts[place] for name, parts in divided.items()} for place in (0, 1))
    if config.start.model:
        material = sft.Material(_task_of(Path(config.start.model), config), pools, gates, tests)
    else:
        material = sft.material_of(config.manifest(), pools, gates, tests)
    encoder, dtype = material.task.encoder, material.task.dtype
    limit = config.measure.questions
    return Material(material, asked_of(training, encoder, dtype), asked_of(held_out, encoder, dtype, limit))


def _task_of(folder: Path, config: HybridConfig) -> Task:
    """The tokenizer and the configuration of a model that is there."""
    encoder = encoder_of(folder)
    if encoder is None:
        raise DataError(f"start.model: expected a model's folder that a curriculum wrote, got {folder}")
    if encoder.geometry.size != config.data.image_size:
        size = encoder.geometry.size
        raise DataError(f"data.image_size: expected {size}, of start.model; got {config.data.image_size}")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Task(encoder.tokenizer, encoder, config_of(values), DTYPES[config.train.precision])


def start_of(home: Path) -> Path:
    """The start's model in a run's folder."""
    return home / START / "model"
