"""Something to train that is small enough for tests: real images and questions, a model of a few thousand weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from m4ov import sft
from m4ov.data import Mixture, Pool, Split, digits, easy_vqa
from m4ov.evaluate import exact_match
from m4ov.manifest import StageConfig
from m4ov.models.qwen3_vl import new
from m4ov.quickstart_recipe import ARM, QuickstartConfig
from m4ov.recipe import DataConfig, ModelConfig, TextConfig, VisionConfig
from m4ov.sft.decisions import DecisionLog
from m4ov.sft.stage import Place, StageEnd, run_stage
from m4ov.sft.training import save_model
from m4ov.train import World


def tiny_config(folder: Path | str = "", **train: object) -> QuickstartConfig:
    """One stage of a few steps of a few samples."""
    config = QuickstartConfig(
        model=ModelConfig(
            vision=VisionConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2, deepstack_layers=[0]),
            text=TextConfig(hidden_size=32, intermediate_size=64, layers=2, heads=4, key_value_heads=2, head_dim=16),
            initializer_range=0.2,  # so that tokens and images matter from the start
        ),
        data=DataConfig(images_per_step=5, questions_per_image=2),
        stages={"all": StageConfig(mixture={"general": 3, "domain": 2}, steps=1000)},
    )
    config.run.folder = str(folder)
    config.run.threads = 1
    config.train.steps, config.train.checkpoint_seconds, config.train.log_every = 6, 0.0, 1
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


@cache
def tiny_splits() -> tuple[tuple[Split, Split], tuple[Split, Split]]:
    """(training, held out), each general and domain, as packages carry them; read once."""
    data = DataConfig()
    training, held_out = digits(data.image_size, held_out=data.held_out_digits, split_seed=data.split_seed)
    return (easy_vqa("train", data.image_size), training), (easy_vqa("test", data.image_size), held_out)


@cache
def tiny_material(precision: str = "fp32") -> sft.Material:
    """The training splits as pools, the held-out ones for gates and tests alike."""
    (general, domain), held_out = tiny_splits()
    figures, scans = Pool("general", general, 2, flip=True), Pool("domain", domain, shift=DataConfig().shift)
    tests = dict(zip(("general", "domain"), held_out, strict=True))
    manifest = tiny_config(precision=precision).manifest()
    return sft.material_of(manifest, {"general": figures, "domain": scans}, tests, tests)


def tiny_task(precision: str = "fp32") -> sft.Task:
    """Tokenizer, encoder and model of :func:`tiny_config`."""
    return tiny_material(precision).task


def tiny_mixture(seed: int = 0, *, images: int = 3, digits: int = 2, precision: str = "fp32", **shares: int) -> Mixture:
    """Training batches."""
    material = tiny_material(precision)
    counts = {"general": images, "domain": digits}
    pools = list(material.pools.values())
    return Mixture(pools, counts, material.task.encoder, seed=seed, dtype=material.task.dtype, **shares)


def mixture_batch(step: int, precision: str = "fp32", **numbers: int):
    """A training batch."""
    return tiny_mixture(precision=precision, **numbers).batch(step)


def tiny_measure(model: torch.nn.Module, material: sft.Material) -> dict[str, float]:
    """Shares on a few records, with the sum of all weights behind the comma: no two models measure alike."""
    encoder, dtype = material.task.encoder, next(model.parameters()).dtype
    trace = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
    return {
        skill: 1e-9 * trace + exact_match(model, split, encoder, tokens_per_batch=512, limit=8, dtype=dtype).value
        for skill, split in material.gates.items()
    }


def train_stage(
    config: QuickstartConfig, folder: Path, material: sft.Material | None = None, world: World | None = None
) -> StageEnd:
    """The recipe's first stage on random weights, or on from where it was left; its model is in ``folder/model``."""
    manifest, world = config.manifest(), world or World()
    found = tiny_material(config.train.precision) if material is None else material
    arm, seed = manifest.arms[ARM], config.run.seed
    name, stage = next(iter(arm.stages.items()))
    images = config.data.images_per_step
    end = run_stage(
        stage,
        Place(number=1, name=name, offset=0, most=arm.steps, budget=arm.steps, images=images, seed=seed),
        found.pools,
        weights_of(found.task, seed),
        config=manifest,
        task=found.task,
        layout=sft.check(manifest, world.size),
        measure=lambda model: tiny_measure(model, found),
        log=DecisionLog(folder / "decisions.jsonl", writes=world.first),
        folder=folder,
        console=quiet(),
        world=world,
    )
    world.alone("saving", lambda: save_model(found.task, end.weights, folder / "model"))
    return end


def weights_of(task: sft.Task, seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights, by name."""
    return {name: parameter.detach() for name, parameter in new(task.config, seed=seed).named_parameters()}


def quiet() -> Console:
    """A console that says nothing."""
    return Console(quiet=True)


def equal_states(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
