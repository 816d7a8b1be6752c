"""A quickstart's model of a few thousand weights, trained for a moment, in a folder; and a few images to calibrate."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from m4ov.data import Split
from m4ov.models.qwen3_vl import build, forward
from m4ov.sft.training import save_model
from tests.tiny_task import tiny_mixture, tiny_splits, tiny_task


@cache
def weights() -> dict[str, torch.Tensor]:
    """Of :func:`trained`, by parameter."""
    task = tiny_task()
    model = build(task.model_config, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mixture = tiny_mixture(images=8)
    for step in range(40):
        forward(model, mixture.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained(folder: Path) -> Path:
    """The model's folder, as the quickstart writes one."""
    save_model(tiny_task(), weights(), folder / "model")
    return folder / "model"


def questions(folder: Path, images: int = 24) -> Path:
    """A folder laid out as easy-vqa's data, with its first images' questions."""
    split = tiny_splits()[0][0]
    (folder / "data/train/images").mkdir(parents=True)
    for place in range(images):
        Image.fromarray(split.images[place]).save(folder / f"data/train/images/{place}.png")
    rows = [[s.question, s.answer, s.image] for s in split.samples if s.image < images]
    (folder / "data/train/questions.json").write_text(json.dumps(rows))
    return folder / "data"


def held_out(count: int = 300) -> Split:
    """Some questions that training has not seen."""
    split = tiny_splits()[1][0]
    return Split(split.name, split.images, split.samples[:count])
