"""Records, images and tokenizers for the tests of the data layer."""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from m4ov.data.records import Record, assistant, image, user
from m4ov.data.tokenizer import train_tokenizer

WORDS = (
    *("the", "red", "circle", "is", "left", "of", "a", "blue", "triangle", "and", "how", "many", "digits"),
    *("can", "you", "see", "here"),
)


def random(offset: int = 0) -> np.random.Generator:
    return np.random.default_rng([int(os.environ["M4OV_TEST_SEED"]), offset])


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS), "user\nassistant\nsystem\n"], 320)


def said(draw: np.random.Generator, most: int = 12) -> str:
    return " ".join(draw.choice(WORDS, int(draw.integers(1, most + 1))))


def picture(draw: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def draw_images(folder: Path, draw: np.random.Generator, count: int = 12) -> list[str]:
    """PNGs and JPEGs of many sizes in ``folder/images``."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        height, width = (int(side) for side in draw.integers(9, 90, 2))
        name = f"images/{number}.{'jpg' if number % 3 == 0 else 'png'}"
        picture(draw, height, width).save(folder / name)
        names.append(name)
    return names


def draw_record(draw: np.random.Generator, id: str, names: list[str], turns: int = 3, images: int = 2) -> Record:
    """A conversation of some turns, each with some images."""
    messages = []
    for _ in range(int(draw.integers(1, turns + 1))):
        shown = [image(str(draw.choice(names))) for _ in range(int(draw.integers(0, images + 1)))] if names else []
        messages += [user(*shown, said(draw)), assistant(said(draw))]
    return Record(id, messages)


def draw_records(draw: np.random.Generator, names: list[str], count: int = 60, **options) -> list[Record]:
    return [draw_record(draw, f"r{number:04d}", names, **options) for number in range(count)]


def one(**changes) -> dict:
    """A line that is right, with changes."""
    return {"id": "a", "messages": [user(image("a.png"), "what?"), assistant("this")], **changes}
