"""What a supervised run reads and trains: tokenizer and model configuration, made from its recipe and texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

from m4ov.data import Encoder, ImageGeometry, train_tokenizer
from m4ov.models.qwen3_vl import Config, qwen3_vl_config
from m4ov.recipe import DataConfig, ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Task:
    """The tokenizer, how it makes samples of questions about images of one size, and the model.

    Attributes:
        model_config: transformers'.
        dtype: that the model computes in.
    """

    tokenizer: Tokenizer
    encoder: Encoder
    model_config: Qwen3VLConfig | Qwen3VLMoeConfig
    dtype: torch.dtype

    @property
    def geometry(self) -> ImageGeometry:
        return self.encoder.geometry

    @property
    def config(self) -> Config:
        """Our own model's."""
        return Config.from_dict(self.model_config.to_dict())


def task_of(data: DataConfig, model: ModelConfig, precision: str, texts: Iterable[str]) -> Task:
    """A function of the recipe and of the texts, on which the tokenizer is trained.

    Args:
        precision: a key of :data:`DTYPES`.
    """
    tokenizer = train_tokenizer(texts, data.vocabulary)
    geometry = ImageGeometry(data.image_size, model.vision.patch_size, model.vision.merge_size)
    return Task(
        tokenizer=tokenizer,
        encoder=Encoder(tokenizer, geometry),
        model_config=qwen3_vl_config(model, tokenizer, grid=geometry.grid_thw[1]),
        dtype=DTYPES[precision],
    )
