"""What a supervised step is made of: the model, its loss, and the folder that it is saved in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from m4ov.data import image_processor, to_hugging_face
from m4ov.manifest import CurriculumConfig
from m4ov.models.qwen3_vl import (
    Qwen3VL,
    TokenLoss,
    build,
    cast_parameters,
    export,
    forward,
    new,
    shapes,
)
from m4ov.parallel import data, expert
from m4ov.parallel.mesh import Mesh
from m4ov.quickstart_recipe import QuickstartConfig
from m4ov.sft.folder import replacing
from m4ov.sft.task import Task
from m4ov_kernels.integrations import transformer_engine
from m4ov_kernels.nn import load_balancing_loss
from m4ov_kernels.packing import PackedBatch
from m4ov_kernels.patches import patch


def model_of(config: CurriculumConfig | QuickstartConfig, task: Task, seed: int) -> torch.nn.Module:
    """What is trained, with random weights that depend on ``seed`` alone, in the dtype that it computes in."""
    if config.model.implementation == "m4ov":
        return new(task.config, seed=seed, dtype=task.dtype)
    model = build(task.model_config, seed)
    if config.train.patch:
        patch(model)
    return cast_parameters(model, task.dtype)


@torch.no_grad()
def fill(model: torch.nn.Module, weights: Mapping[str, Tensor | None]) -> None:
    """Put weights, by name, into a model's parameters, rounded to their dtype; all of them must be there."""
    for name, parameter in model.named_parameters():
        value = weights[name]
        assert value is not None, name
        parameter.copy_(value)


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


def save_model(task: Task, weights: Mapping[str, Tensor | None], folder: Path) -> None:
    """A folder that ``from_pretrained`` loads: weights (float32), configuration, tokenizer, processor.

    Raises:
        CheckpointError: it cannot be written. What was there before stays.
    """
    config = task.config

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes(config):
            value = weights[name]
            assert value is not None, name
            yield name, value

    with replacing(folder) as temporary:
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
