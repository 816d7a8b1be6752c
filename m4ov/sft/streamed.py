"""A supervised run on records from files, which are read, encoded and packed while the model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from m4ov.data import Ahead, ChatEncoder, DataError, RecordError, RecordStream
from m4ov.data.adopt import adopt
from m4ov.data.formats import FormatError
from m4ov.data.rows import RecordRows
from m4ov.models.qwen3_vl import Config, config_of, training_flops
from m4ov.parallel.checkpoint import checkpoints, full_tensors
from m4ov.parallel.mesh import Layout
from m4ov.sft.along import Along
from m4ov.sft.material import flat
from m4ov.sft.source import Source, build, checkpoint, fresh, save
from m4ov.sft.task import DTYPES
from m4ov.sft.training import loss_of
from m4ov.sft_recipe import SftConfig
from m4ov.train import TrainResult, World, train

_TRIED = 64  # records that are encoded before anything is trained


@dataclass(frozen=True)
class Material:
    """What a run is made of.

    Attributes:
        records: to train on.
        held_out: packed, at most ``evaluate.limit`` of them; ``None``: nothing is measured.
        dtype: that is computed in.
    """

    source: Source
    records: Path
    held_out: RecordRows | None
    encoder: ChatEncoder
    dtype: torch.dtype

    @property
    def config(self) -> Config:
        return self.source.config


@dataclass(frozen=True)
class Trained:
    """What a run did.

    Attributes:
        losses: (step, loss) on the held-out records.
        stream: :meth:`RecordStream.statistics` of rank 0, since the process began.
        records: to train on, usable or not.
        epochs: how often they were read.
        parameters: of the model, and those that were trained.
    """

    result: TrainResult
    losses: list[tuple[int, float]]
    stream: dict[str, float]
    records: int
    epochs: float
    parameters: tuple[int, int]


def prepare(config: SftConfig, folder: Path, world: World, console: Console) -> Material:
    """Everything that is needed before a step, made or checked: records, model, tokenizer, held-out rows. Collective.

    Args:
        folder: of the run, claimed by the caller.

    Raises:
        DataError, WeightsError, WriteError, ValueError: an argument does not fit; the message names it.
    """
    data = config.data
    source = checkpoint(config) if config.model.path else None
    quarantine = folder / "quarantine.jsonl"

    def records() -> tuple[Path, Path | None]:
        options: dict[str, Any] = {"format": data.format, "max_bad": data.max_bad, "quarantine": quarantine}
        options["fixed"] = bool(checkpoints(folder / "checkpoints"))
        share = 0.0 if data.held_out else data.held_out_share
        with _naming("data.train"):
            training, rest = adopt(data.train, folder / "data", share=share, **options)
        if data.held_out:
            if Path(data.held_out).resolve() == Path(data.train).resolve():
                raise DataError(f"data.held_out: expected other records than those of data.train, got {data.held_out}")
            with _naming("data.held_out"):
                rest, _ = adopt(data.held_out, folder / "data-held-out", **options)
        return training, rest

    with console.status("looking at the records"):
        training, rest = world.share("the records", world.alone("the records", records))
    source = source or fresh(config, training, folder, world)
    reading = source.reading
    encoder = ChatEncoder(reading.tokenizer, reading.pixels, reading.chat)
    dtype = DTYPES[config.train.precision]
    with _naming("data.train"):
        RecordRows(training, encoder, capacity=data.capacity, limit=_TRIED)
    held_out = None
    if rest is not None:
        with _naming("data.held_out" if data.held_out else "data.held_out_share"):
            held_out = RecordRows(
                rest,
                encoder,
                capacity=data.capacity,
                limit=config.evaluate.limit,
                dtype=dtype,
                quarantine=quarantine if world.first else None,
            )
    return Material(source, training, held_out, encoder, dtype)


def run(config: SftConfig, material: Material, layout: Layout, folder: Path, console: Console, world: World) -> Trained:
    """Train, or go on training, and write ``folder/model`` when done. Collective.

    Args:
        config: with its learning rates (:func:`m4ov.sft_recipe.resolved`).
        layout: of all ranks; ``data.rows`` is a multiple of those that have samples of their own.

    Raises:
        Interrupted, CheckpointError, TrainingError, RankError: see :func:`m4ov.train.train`.
        DataError, StreamError, WriteError: see :class:`m4ov.data.RecordStream`; the records have changed since.
        LayoutError, ValueError: see :func:`m4ov.sft.source.build`.
    """
    data = config.data
    model, mesh, start = build(material.source, config, layout, world)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    console.print(
        f"Qwen3-VL, {parameters / 1e6:.2f} M parameters, {trains / 1e6:.2f} M trained, {config.train.precision}, "
        f"{f'{world.size} ranks ({layout}), each ' * (world.size > 1)}{torch.get_num_threads()} threads"
    )
    torch.manual_seed(config.run.seed)  # dropout of adapters
    stream = RecordStream(
        material.records,
        material.encoder,
        capacity=data.capacity,
        rows=data.rows,
        seed=config.run.seed,
        rank=world.data_rank,
        ranks=world.data_size,
        too_long=data.too_long,  # type: ignore[arg-type] # checked with the recipe
        shuffle=data.shuffle,
        window=data.window,
        dtype=material.dtype,
        workers=data.workers,
        quarantine=folder / "quarantine.jsonl",
        max_bad=data.max_bad,
    )
    along = Along(config, model, material.held_out, folder, world, console)
    ahead = Ahead(stream, depth=data.ahead)
    sized = config_of(material.config.to_dict())
    loss: Any = loss_of if mesh is None else partial(loss_of, mesh=mesh)
    try:
        result = train(
            model,
            ahead,
            loss,
            config=config.train,
            optim=config.optim,
            folder=folder,
            console=console,
            world=world,
            flops_of=lambda batch: training_flops(sized, batch),
            start=start,
            callback=along,
        )
    finally:
        ahead.close()
        stream.close()
    found = result.weights if along.average is None else along.average.averages
    with world.watched("gathering the weights"):
        weights = dict(full_tensors(found, keep=world.first))
    world.alone("saving the model", lambda: save(material.source, config, weights, folder / "model"))
    count = len(stream.index)
    return Trained(result, along.losses, stream.statistics(), count, stream.packed.read / count, (parameters, trains))


def fingerprint_of(config: SftConfig) -> dict[str, Any]:
    """What the training depends on, flat: see :func:`m4ov.sft.training.fingerprint`."""
    tree = dataclasses.asdict(config)
    for name in ("workers", "ahead", "max_bad", "held_out"):
        del tree["data"][name]
    if config.data.held_out:
        tree["data"]["held_out_share"] = 0.0
    trained = {name: tree["train"][name] for name in ("steps", "precision")}
    parts = {name: tree[name] for name in ("data", "model", "optim", "freeze", "lora", "average")}
    return flat({**parts, "run": {"seed": config.run.seed}, "train": trained})


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """What is wrong with data is said with the argument that named them."""
    try:
        yield
    except (DataError, FormatError, RecordError) as error:
        raise DataError(f"{argument}: {error}") from error
