"""What a supervised run is about: data, tokenizer and model, made from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

from m4ov.data import DataError, Encoder, ImageGeometry, Mixture, Pool, Split, digits, easy_vqa, train_tokenizer
from m4ov.models.qwen3_vl import qwen3_vl_config
from m4ov.recipe import DataConfig, QuickstartConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Task:
    """Training and held-out splits, the tokenizer trained on the training text, and the model's configuration."""

    training: tuple[Split, ...]  # of the quickstart: general, domain
    held_out: tuple[Split, ...]
    tokenizer: Tokenizer
    encoder: Encoder
    model_config: Qwen3VLConfig | Qwen3VLMoeConfig
    dtype: torch.dtype

    @property
    def geometry(self) -> ImageGeometry:
        return self.encoder.geometry

    def mixture(
        self,
        data: DataConfig,
        seed: int,
        *,
        images: int = 0,
        digits: int = 0,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
    ) -> Mixture:
        """Training batches; ``images`` and ``digits``: other numbers per step than the configuration's."""
        general, domain = self.training
        pools = [
            Pool("general", general, data.questions_per_image, flip=data.flip),
            Pool("domain", domain, shift=data.shift),
        ]
        return Mixture(
            pools,
            {"general": images or data.images_per_step, "domain": digits or data.digits_per_step},
            self.encoder,
            seed=seed,
            dtype=self.dtype,
            rank=rank,
            ranks=ranks,
            accumulate=accumulate,
        )


def prepare(config: QuickstartConfig, console: Console) -> Task:
    """Read the data and train the tokenizer: a function of the configuration alone.

    Raises:
        DataError: data is missing or broken, and is not to be skipped.
    """
    data, model = config.data, config.model
    options = {"folder": data.easy_vqa, "on_bad_image": data.on_bad_image}
    general = [easy_vqa(split, data.image_size, **options) for split in ("train", "test")]
    domain = digits(data.image_size, held_out=data.held_out_digits, split_seed=data.split_seed)
    for split in general:
        say_left_out(split, console)
    training = (general[0], domain[0])
    if len(training[0].images) < data.images_per_step or len(training[1].images) < data.digits_per_step:
        raise DataError(
            f"a step wants {data.images_per_step} + {data.digits_per_step} images; "
            f"there are {len(training[0].images)} + {len(training[1].images)}"
        )
    texts = [text for split in training for sample in split.samples for text in (sample.question, sample.answer)]
    tokenizer = train_tokenizer(texts, data.vocabulary)
    geometry = ImageGeometry(data.image_size, model.vision.patch_size, model.vision.merge_size)
    return Task(
        training=training,
        held_out=(general[1], domain[1]),
        tokenizer=tokenizer,
        encoder=Encoder(tokenizer, geometry),
        model_config=qwen3_vl_config(model, tokenizer, grid=geometry.grid_thw[1]),
        dtype=DTYPES[config.train.precision],
    )


def say_left_out(split: Split, console: Console) -> None:
    """Which images a split is without, the first five by name."""
    for line in split.left_out[:5]:
        console.print(f"[yellow]left out: {line}[/yellow]")
    if len(split.left_out) > 5:
        console.print(f"[yellow]left out: {len(split.left_out) - 5} more[/yellow]")
