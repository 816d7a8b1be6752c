"""What a run on records trains: a checkpoint's folder, or a new model; how its weights come to the ranks, and leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from m4ov.data import PLAIN, DataError, PixelOptions, read_records, train_tokenizer
from m4ov.data.pretrained import Reading, copy_reading, reading_of, write_reading
from m4ov.data.records import text_of
from m4ov.data.tokenizer import IMAGE, VIDEO, VISION_END, VISION_START, token_id
from m4ov.data.whole import write_whole
from m4ov.models.qwen3_vl import (
    Config,
    Qwen3VL,
    WeightsError,
    configuration,
    export,
    new,
    qwen3_vl_config,
    read,
)
from m4ov.models.sharded import stored
from m4ov.parallel.mesh import Layout, Mesh, ModelSizes
from m4ov.parallel.parallelize import load
from m4ov.sft import lora
from m4ov.sft.folder import replacing
from m4ov.sft.layout import is_split, sizes_of, spread
from m4ov.sft.parts import freeze
from m4ov.sft.task import DTYPES
from m4ov.sft.training import fill
from m4ov.sft_recipe import SftConfig, SftDataConfig
from m4ov.train import World

_AROUND = 16  # tokens of a record beside those of an image, at the least: turns, a word of question and answer
_TEXTS = 50_000  # records that a new tokenizer is trained on, at most
_NEW_PIXELS = (64 * 64, 256 * 256)


@dataclass(frozen=True)
class Source:
    """A model before training.

    Attributes:
        reading: how it reads conversations, with the run's budgets of pixels.
        folder: of the checkpoint; ``None``: it is new, with random weights that depend on ``seed`` alone.
    """

    config: Config
    reading: Reading
    folder: Path | None
    seed: int

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every parameter, in the model's order; a checkpoint's are mapped from its files."""
        if self.folder is not None:
            return read(self.folder, self.config)
        return ((name, value.detach()) for name, value in new(self.config, seed=self.seed).named_parameters())


def sizes(config: SftConfig) -> ModelSizes:
    """What of the model must be divisible; says at once if ``model.path`` is none that can be trained.

    Raises:
        WeightsError: it is no whole checkpoint of a Qwen3-VL.
    """
    if not config.model.path:
        return sizes_of(config.model.text)
    folder = Path(config.model.path)
    try:
        if not folder.is_dir():
            raise WeightsError(f"{folder}: no such folder")
        found = configuration(folder)
        read(folder, found)  # checks what the headers say
    except WeightsError as error:
        raise WeightsError(f"model.path: {error}") from None
    return ModelSizes.of(found)


def checkpoint(config: SftConfig) -> Source:
    """The model in ``model.path``.

    Raises:
        WeightsError, DataError: it has no tokenizer or processor, or they do not fit its configuration.
        ValueError: ``data.min_pixels`` or ``data.max_pixels`` do not fit.
    """
    folder = Path(config.model.path)
    found = configuration(folder)
    try:
        reading = reading_of(folder, config.data.chat)
        _check_fit(folder, found, reading)
    except DataError as error:
        raise DataError(f"model.path: {error}") from None
    return Source(found, replace(reading, pixels=budgets(config.data, reading.pixels)), folder, config.run.seed)


def fresh(config: SftConfig, records: Path, run: Path, world: World) -> Source:
    """A new model for records: of their texts its tokenizer is made, once, in ``run/tokenizer.json``. Collective.

    Raises:
        ValueError: ``data.min_pixels`` or ``data.max_pixels`` do not fit.
    """
    vision, file = config.model.vision, run / "tokenizer.json"
    least, most = _NEW_PIXELS
    pixels = budgets(config.data, PixelOptions(vision.patch_size, vision.merge_size, least, most))

    def make() -> None:
        if not file.exists():
            found = islice(read_records(records, on_error=lambda error: None), _TEXTS)
            texts = (text_of(turn) for record in found for turn in record.messages)
            write_whole(file, train_tokenizer(texts, config.data.vocabulary).to_str())

    world.alone("the tokenizer", make)
    tokenizer = Tokenizer.from_file(str(file))
    grid = math.isqrt(pixels.max_pixels) // vision.patch_size
    made = Config.from_dict(qwen3_vl_config(config.model, tokenizer, grid=grid).to_dict())
    longest = max(made.text.max_position_embeddings, config.data.capacity)
    made = replace(made, text=replace(made.text, max_position_embeddings=longest))
    return Source(made, Reading(tokenizer, PLAIN, pixels), None, config.run.seed)


def budgets(data: SftDataConfig, pixels: PixelOptions) -> PixelOptions:
    """The run's budgets of an image, of those that a processor has.

    Raises:
        ValueError: they contradict each other, or an image of that many pixels does not fit into a row.
    """
    area = (pixels.patch_size * pixels.merge_size) ** 2  # pixels of a token
    least = data.min_pixels or pixels.min_pixels
    most = data.max_pixels or max(least, min(pixels.max_pixels, data.capacity // 2 * area))
    if least > most:
        raise ValueError(f"data.min_pixels: expected at most {most}, the most pixels of an image; got {least}")
    room = data.capacity - _AROUND
    if most // area > room:
        name = "data.max_pixels" if data.max_pixels else "data.min_pixels"
        raise ValueError(
            f"{name}: expected at most {max(0, room) * area}: an image of {most} pixels has {most // area} tokens, "
            f"and a row data.capacity={data.capacity}"
        )
    return replace(pixels, min_pixels=least, max_pixels=most)


def build(
    source: Source, config: SftConfig, layout: Layout, world: World
) -> tuple[Qwen3VL, Mesh | None, Mapping[str, Tensor]]:
    """The model on this rank, what is frozen frozen, with its adapters if there are any. Collective.

    A checkpoint whose ranks have parts of it is read part by part: no rank ever holds it whole (with adapters each
    does, at first).

    Returns:
        The model, its mesh (see :func:`m4ov.sft.layout.spread`), and the weights to begin with where those of the model
        are rounded.

    Raises:
        LayoutError: ``parallel.tp`` does not divide the vocabulary.
        ValueError: there is nothing that LoRA could be put on; see :func:`m4ov.sft.lora.targets`.
    """
    split, adapters = is_split(layout), config.lora.rank > 0
    with torch.device("meta"):
        model = Qwen3VL(source.config)
    if split and not adapters and source.folder is not None:
        freeze(model, config.freeze)
        mesh = spread(model, layout, world, config.train)
        model.to_empty(device="cpu")
        load(model, source.folder)
        return model, mesh, {}
    dtype = torch.float32 if split else DTYPES[config.train.precision]
    start = dict(source.weights())
    fill(model.to(dtype).to_empty(device="cpu"), start)
    freeze(model, config.freeze)
    if adapters:
        lora.attach(model, config.lora, config.freeze, seed=config.run.seed)
    return model, spread(model, layout, world, config.train), {} if adapters or split else start


def save(source: Source, config: SftConfig, trained: Mapping[str, Tensor | None], folder: Path) -> None:
    """A folder that ``from_pretrained`` loads: trained weights, the others as they were, and the checkpoint's own
    tokenizer and processor (a new model's: those it was trained with).

    Args:
        trained: float32, by name; of adapters, which are merged.

    Raises:
        CheckpointError: it cannot be written. What was there before stays.
    """
    changed = {name: value for name, value in trained.items() if value is not None}
    if config.lora.rank:
        with torch.device("meta"):
            plain = Qwen3VL(source.config)
        fill(plain.to(torch.float32).to_empty(device="cpu"), dict(source.weights()))
        lora.attach(plain, config.lora, config.freeze, seed=config.run.seed)
        before = {name for name, parameter in plain.named_parameters() if not parameter.requires_grad}
        adapted = {name.replace(".base_layer.", ".") for name in before if ".base_layer." in name}
        merged = lora.merged(plain, changed)
        changed = {name: merged[name] for name in adapted}
    with replacing(folder) as temporary:
        tensors = ((name, changed.get(name, value)) for name, value in source.weights())
        export(source.config, tensors, temporary, dtype=_written_dtype(source, config))
        if source.folder is not None:
            copy_reading(source.folder, temporary)
        else:
            write_reading(temporary, source.reading.tokenizer, source.reading.pixels)


def _written_dtype(source: Source, config: SftConfig) -> torch.dtype:
    if config.dtype != "auto" or source.folder is None:
        return DTYPES["fp32" if config.dtype == "auto" else config.dtype]
    dtypes = [part.dtype for part in stored(source.folder).values()]
    widest = dtypes[0]
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _check_fit(folder: Path, config: Config, reading: Reading) -> None:
    """That tokenizer and processor are the model's."""
    tokens = max(reading.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if tokens > config.text.vocab_size:
        raise DataError(f"{folder}: its tokenizer has {tokens} tokens, its model embeds {config.text.vocab_size}")
    for name, token in (
        ("image_token_id", IMAGE),
        ("video_token_id", VIDEO),
        ("vision_start_token_id", VISION_START),
        ("vision_end_token_id", VISION_END),
    ):
        there, ours = getattr(config, name), token_id(reading.tokenizer, token)
        if there != ours:
            raise DataError(f"{folder}: its configuration has {name} {there}, its tokenizer {token} as {ours}")
    for name, there in (
        ("patch_size", config.vision.patch_size),
        ("temporal_patch_size", config.vision.temporal_patch_size),
        ("merge_size", config.vision.spatial_merge_size),
    ):
        found = getattr(reading.pixels, name)
        if there != found:
            raise DataError(f"{folder}: its processor has {name} {found}, its vision tower {there}")
