"""A supervised run: a model from scratch, trained on packed batches, saved as Hugging Face saves one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from m4ov.data import image_processor, to_hugging_face
from m4ov.models.qwen3_vl import (
    Config,
    Qwen3VL,
    TokenLoss,
    WeightsError,
    build,
    cast_parameters,
    export,
    forward,
    new,
    shapes,
    training_flops,
)
from m4ov.parallel import data, expert
from m4ov.parallel.checkpoint import full_tensors
from m4ov.parallel.mesh import Mesh
from m4ov.recipe import QuickstartConfig
from m4ov.sft.layout import layout_of, sizes_of, spread
from m4ov.sft.task import Task
from m4ov.train import CheckpointError, TrainingError, TrainResult, World, train
from m4ov_kernels.integrations import transformer_engine
from m4ov_kernels.nn import load_balancing_loss
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


def loss_of(model: torch.nn.Module, batch: PackedBatch, mesh: Mesh | None = None) -> tuple[Tensor, int]:
    """Cross entropy of the answers' tokens, summed, and their number; with experts, their balance loss is in the sum,
    as often as there are labels, so that it is in the mean once. Collective where there is a mesh."""
    if isinstance(model, Qwen3VL):
        loss = model.loss(batch)
        if loss.loads and model.config.text.router_aux_loss_coef:
            return loss.total + _balance(model, loss, batch, mesh), loss.num_labels
        return loss.total, loss.num_labels
    return forward(model, batch).loss * batch.num_labels, batch.num_labels


def _balance(model: Qwen3VL, loss: TokenLoss, batch: PackedBatch, mesh: Mesh | None) -> Tensor:
    """This rank's part of the experts' balance loss over the tokens that all ranks have in this batch, weighted by the
    labels that all have."""
    text = model.config.text
    if mesh is None:
        return text.router_aux_loss_coef * loss.num_labels * load_balancing_loss(loss.loads, tokens=batch.tokens)
    labels = mesh.all_reduce(torch.tensor(float(loss.num_labels), device=loss.total.device), data.AXES)
    part = expert.balance_loss(loss.loads, mesh, top_k=text.num_experts_per_tok)
    weighted = text.router_aux_loss_coef * labels * part
    # Ranks that share samples all have the whole cross entropy, but a part of this: as the loop divides by their
    # number, the value is multiplied by it. The gradient is not, as it is a part there too.
    return weighted + (mesh.layout.world // mesh.layout.data - 1) * weighted.detach()


def loss_in_fp8(model: torch.nn.Module, batch: PackedBatch, mesh: Mesh | None = None) -> tuple[Tensor, int]:
    """The same, transformer-engine's linears multiplying in fp8."""
    with transformer_engine.autocast():
        return loss_of(model, batch.to("cuda"), mesh)


def run(
    config: QuickstartConfig, task: Task, folder: Path, console: Console, world: World | None = None
) -> TrainResult:
    """Train, or go on training, and write ``folder/model`` when done. Collective.

    Args:
        folder: of the run, claimed by the caller (:class:`m4ov.train.RunFolder`).
        world: the ranks, over which the model and a step's images are spread as ``parallel`` says.

    Raises:
        LayoutError: ``parallel`` does not fit the ranks, the model or the recipe; before anything is built.
        Interrupted, CheckpointError, TrainingError, RankError: see :func:`m4ov.train.train`. TrainingError also where
            ``train.fp8`` asks for what this machine has not.
    """
    in_fp8 = config.train.fp8 == "transformer_engine"
    if in_fp8 and (reason := transformer_engine.unavailable()) is not None:
        raise TrainingError(f"train.fp8: {reason}")
    world = world or World()
    layout = layout_of(config.parallel, world.size, sizes_of(config.model.text), whole=whole_of(config))
    model = model_of(config, task, config.run.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"Qwen3-VL, {parameters / 1e6:.2f} M parameters, {task.tokenizer.get_vocab_size()} tokens in the vocabulary, "
        f"{config.train.precision}, {f'{world.size} ranks ({layout}), each ' * (world.size > 1)}"
        f"{torch.get_num_threads()} threads"
    )
    mesh = spread(model, layout, world, config.train) if isinstance(model, Qwen3VL) else None
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
    loss: Any = loss_in_fp8 if in_fp8 else loss_of
    result = train(
        model,
        mixture,
        loss if mesh is None else partial(loss, mesh=mesh),
        config=config.train,
        optim=config.optim,
        folder=folder,
        console=console,
        world=world,
        flops_of=lambda batch: training_flops(task.model_config, batch),
    )
    with world.watched("gathering the weights"):
        weights = dict(full_tensors(result.weights, keep=world.first))
    world.alone("saving the model", lambda: save_model(task, weights, folder / "model"))
    return result


def whole_of(config: QuickstartConfig) -> list[str]:
    """What of a recipe trains whole replicas only."""
    found = {"model.implementation": config.model.implementation, "train.fp8": config.train.fp8}
    plain = {"model.implementation": "m4ov", "train.fp8": "off"}
    return [f"{name}={value}" for name, value in found.items() if value != plain[name]]


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
