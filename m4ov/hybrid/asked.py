"""Questions with answers that can be verified, as prompts with their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m4ov.data import Encoder, patchify
from m4ov.data import Sample as Question
from m4ov.data.chains import Chains, chains
from m4ov.data.tokenizer import prompt
from m4ov.hybrid_recipe import ChainsConfig
from m4ov.recipe import DataConfig
from m4ov.rl import Prompt
from m4ov_kernels.packing import Patches, Sample


@dataclass(frozen=True)
class Asked:
    """Questions as prompts.

    Attributes:
        prompts: one of each question; prompts on one image share its patches.
        blank: the same, on a white image.
        images: uint8 ``[N, size, size, 3]``; ``image_of``: of each prompt, which of them it asks about.
        kinds: of each prompt.
    """

    prompts: list[Prompt]
    blank: list[Prompt]
    images: np.ndarray
    image_of: list[int]
    kinds: list[str]


def grids_of(data: DataConfig, made: ChainsConfig) -> tuple[Chains, Chains, Chains]:
    """Chains to be imitated; others, on other grids of the same images, that policies learn on; and held-out ones.

    Raises:
        DataError: a package is missing, or its data are broken.
    """
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
            on_bad_image=data.on_bad_image,
        )
        for part, grids, other in parts
    )
    return imitated, training, held_out


def asked_of(made: Chains, encoder: Encoder, dtype: torch.dtype, limit: int = 0) -> Asked:
    """Chains as prompts. ``limit``: so many of them, spread evenly; 0: all."""
    questions = [Question(problem.image, problem.question, problem.truth, problem.kind) for problem in made.problems]
    return asked_in(made.images, questions, encoder, dtype, limit)


def asked_in(
    images: np.ndarray, questions: Sequence[Question], encoder: Encoder, dtype: torch.dtype, limit: int = 0
) -> Asked:
    """Questions with short answers as prompts.

    Args:
        images: uint8 ``[N, size, size, 3]``.
        dtype: of ``pixel_values``.
        limit: so many of them, spread evenly; 0: all.
    """
    if limit and limit < len(questions):
        questions = [questions[place * len(questions) // limit] for place in range(limit)]
    geometry = encoder.geometry
    white = np.full_like(images[:1], 255)
    blank = Patches(torch.from_numpy(patchify(white, geometry)).to(dtype), geometry.grid_thw)
    patches: dict[int, Patches] = {}
    sides: tuple[list[Prompt], list[Prompt]] = [], []
    for question in questions:
        if question.image not in patches:
            pixels = torch.from_numpy(patchify(images[question.image][None], geometry)).to(dtype)
            patches[question.image] = Patches(pixels, geometry.grid_thw)
        ids = torch.tensor(encoder.tokenizer.encode(prompt(question.question, geometry.tokens)).ids)
        for prompts, image in zip(sides, (patches[question.image], blank), strict=True):
            prompts.append(Prompt(Sample(ids, images=[image]), question.question, question.answer))
    return Asked(*sides, images, [question.image for question in questions], [question.kind for question in questions])
