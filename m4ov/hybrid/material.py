"""What the start is trained on and arms are asked: pools, held-out records, prompts with their images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from m4ov import sft
from m4ov.data import DataError, Encoder, Pool, digits, easy_vqa, encoder_of, patchify
from m4ov.data.chains import Chains, Problem, chains
from m4ov.data.recorded import divide
from m4ov.data.tokenizer import prompt
from m4ov.hybrid_recipe import START, HybridConfig
from m4ov.models.qwen3_vl import config_of
from m4ov.rl import Prompt
from m4ov.sft.task import DTYPES, Task
from m4ov_kernels.packing import Patches, Sample


@dataclass(frozen=True)
class Asked:
    """Chains as prompts.

    Attributes:
        prompts: one of each problem; prompts on one grid share its patches.
        blank: the same, on a white image.
        images: uint8 ``[N, size, size, 3]``; ``image_of``: of each prompt, which of them it asks about.
        kinds: of each prompt.
    """

    prompts: list[Prompt]
    blank: list[Prompt]
    images: np.ndarray
    image_of: list[int]
    kinds: list[str]


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
    parts = (("train", made.grids, 0), ("train", made.policy_grids, 1), ("test", made.held_out, 0))
    imitated, training, held_out = (
        chains(
            part,
            data.image_size,
            grids=grids,
            questions=made.questions,
            held_out_digits=data.held_out_digits,
            split_seed=data.split_seed,
            seed=made.seed + other,
            easy_vqa_folder=data.easy_vqa,
        )
        for part, grids, other in parts
    )
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
    return Material(material, _asked(training, encoder, dtype), _asked(held_out, encoder, dtype, limit))


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


def _asked(made: Chains, encoder: Encoder, dtype: torch.dtype, limit: int = 0) -> Asked:
    problems: Sequence[Problem] = made.problems
    if limit and limit < len(problems):
        problems = [problems[place * len(problems) // limit] for place in range(limit)]
    geometry = encoder.geometry
    white = np.full_like(made.images[:1], 255)
    blank = Patches(torch.from_numpy(patchify(white, geometry)).to(dtype), geometry.grid_thw)
    patches: dict[int, Patches] = {}
    sides: tuple[list[Prompt], list[Prompt]] = [], []
    for problem in problems:
        if problem.image not in patches:
            pixels = torch.from_numpy(patchify(made.images[problem.image][None], geometry)).to(dtype)
            patches[problem.image] = Patches(pixels, geometry.grid_thw)
        ids = torch.tensor(encoder.tokenizer.encode(prompt(problem.question, geometry.tokens)).ids)
        for prompts, image in zip(sides, (patches[problem.image], blank), strict=True):
            prompts.append(Prompt(Sample(ids, images=[image]), problem.question, problem.truth))
    return Asked(*sides, made.images, [problem.image for problem in problems], [problem.kind for problem in problems])


def start_of(home: Path) -> Path:
    """The start's model in a run's folder."""
    return home / START / "model"
