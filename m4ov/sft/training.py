"""A supervised run: a model from scratch, trained on packed batches, saved as Hugging Face saves one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from m4ov.data import image_processor, to_hugging_face
from m4ov.models.qwen3_vl import (
    Config,
    Qwen3VL,
    WeightsError,
    build,
    cast_parameters,
    export,
    forward,
    new,
    shapes,
    training_flops,
)
from m4ov.parallel.checkpoint import full_tensors
from m4ov.recipe import QuickstartConfig
from m4ov.sft.task import Task
from m4ov.train import CheckpointError, TrainingError, TrainResult, World, train
from m4ov_kernels.integrations import transformer_engine
from m4ov_kernels.packing import PackedBatch
from m4ov_kernels.patches import patch


def model_of(config: QuickstartConfig, task: Task, seed: int) -> torch.nn.Module:
    """What is trained, with random weights that depend on ``seed`` alone, in the dtype that it computes in."""
    if config.model.implementation == "m4ov":
        return new(Config.from_dict(task.model_config.to_dict()), seed=seed, dtype=task.dtype)
    model = build(task.model_config, seed)
    if config.train.patch:
        patch(model)
    return cast_parameters(model, task.dtype)


def loss_of(model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
    """Cross entropy of the answers' tokens, summed, and their number."""
    if isinstance(model, Qwen3VL):
        loss = model.loss(batch)
        return loss.total, loss.num_labels
    return forward(model, batch).loss * batch.num_labels, batch.num_labels


def loss_in_fp8(model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
    """The same, transformer-engine's linears multiplying in fp8."""
    with transformer_engine.autocast():
        return loss_of(model, batch.to("cuda"))


def run(
    config: QuickstartConfig, task: Task, folder: Path, console: Console, world: World | None = None
) -> TrainResult:
    """Train, or go on training, and write ``folder/model`` when done. Collective.

    Args:
        folder: of the run, claimed by the caller (:class:`m4ov.train.RunFolder`).
        world: the ranks, over which a step's images are spread and on which the model is replicated.

    Raises:
        Interrupted, CheckpointError, TrainingError, RankError: see :func:`m4ov.train.train`. TrainingError also where
            ``train.fp8`` asks for what this machine has not.
    """
    in_fp8 = config.train.fp8 == "transformer_engine"
    if in_fp8 and (reason := transformer_engine.unavailable()) is not None:
        raise TrainingError(f"train.fp8: {reason}")
    world = world or World()
    model = model_of(config, task, config.run.seed)
    if isinstance(model, Qwen3VL):
        model.always_vision = world.size > 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"Qwen3-VL, {parameters / 1e6:.2f} M parameters, {task.tokenizer.get_vocab_size()} tokens in the vocabulary, "
        f"{config.train.precision}, {f'{world.size} ranks, each ' * (world.size > 1)}{torch.get_num_threads()} threads"
    )
    mixture = task.mixture(
        config.data,
        config.run.seed,
        rank=world.data_rank,
        ranks=world.data_size,
        accumulate=config.train.accumulate,
    )
    if in_fp8:
        torch.nn.Module.to(model, "cuda")
        console.print(f"fp8: {len(transformer_engine.install(model))} linear layers of transformer-engine")
    result = train(
        model,
        mixture,
        loss_in_fp8 if in_fp8 else loss_of,
        config=config.train,
        optim=config.optim,
        folder=folder,
        console=console,
        world=world,
        flops_of=lambda batch: training_flops(task.model_config, batch),
    )
    weights = dict(full_tensors(result.weights, keep=world.first))
    world.alone("saving the model", lambda: save_model(task, weights, folder / "model"))
    return result


def fingerprint(config: QuickstartConfig) -> dict[str, Any]:
    """What the training depends on, flat: key → value. Another folder and other ways of looking at it are not in it."""
    tree = dataclasses.asdict(config)
    trained = {name: tree["train"][name] for name in ("steps", "precision", "patch", "fp8")}
    parts = {name: tree[name] for name in ("data", "model", "optim")}
    return flat({**parts, "run": {"seed": config.run.seed}, "train": trained})


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one: dotted key → value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def save_model(task: Task, weights: Mapping[str, Tensor | None], folder: Path) -> None:
    """A folder that ``from_pretrained`` loads: weights (float32), configuration, tokenizer, processor.

    Raises:
        CheckpointError: it cannot be written. What was there before stays.
    """
    config = Config.from_dict(task.model_config.to_dict())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes(config):
            value = weights[name]
            assert value is not None, name
            yield name, value

    temporary = folder.with_name(f".writing-{os.getpid()}")
    try:
        for left in folder.parent.glob(".writing-*"):
            shutil.rmtree(left)
        export(config, tensors(), temporary, dtype=torch.float32)
        tokenizer, processor = to_hugging_face(task.tokenizer), image_processor(task.geometry)
        tokenizer.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        # Qwen3VLProcessor needs torchvision, for videos; these two files let it load where torchvision is.
        size = {"shortest_edge": task.geometry.size**2, "longest_edge": task.geometry.size**2}
        video = {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "processor_class": "Qwen3VLProcessor",
            "patch_size": task.geometry.patch_size,
            "temporal_patch_size": task.geometry.temporal_patch_size,
            "merge_size": task.geometry.merge_size,
            "image_mean": list(processor.image_mean),
            "image_std": list(processor.image_std),
            "size": size,
        }
        for name, content in (
            ("video_preprocessor_config.json", video),
            ("processor_config.json", {"processor_class": "Qwen3VLProcessor"}),
        ):
            (temporary / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except (OSError, WeightsError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"model {folder}: cannot be written ({reason})") from error
