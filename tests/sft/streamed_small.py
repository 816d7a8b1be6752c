"""Runs on records small enough for tests: conversations of a few words about noise, a model of a few thousand weights.
Importable by ranks."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from m4ov.data import PixelOptions, write_records
from m4ov.data.pretrained import write_reading
from m4ov.data.records import Record, assistant, image, user
from m4ov.models.qwen3_vl import Config, export, new, qwen3_vl_config
from m4ov.recipe import ModelConfig, ParallelConfig, RunConfig, TextConfig, TrainConfig, VisionConfig
from m4ov.sft import layout_of, streamed
from m4ov.sft.source import sizes
from m4ov.sft_recipe import SftConfig, SftDataConfig, SftModelConfig, resolved
from m4ov.train import Interrupted
from tests.data.record_files import draw_images, picture, random, said, tokenizer
from tests.tiny_task import quiet
from tests.train import small

VISION = VisionConfig(hidden_size=32, intermediate_size=64, layers=2, heads=2, deepstack_layers=[0])
TEXT = TextConfig(hidden_size=32, intermediate_size=64, layers=2, heads=4, key_value_heads=2, head_dim=16)
PIXELS = PixelOptions(patch_size=8, merge_size=2, min_pixels=1024, max_pixels=4096)  # 4 to 16 tokens
STEPS = 3


def write_data(folder: Path, count: int = 90) -> Path:
    """Records of images of many sizes, of one to three turns, with short answers. Which images a share of 0.35 holds
    out follows from their names: four of the twelve."""
    draw = random(11)
    names = draw_images(folder, draw)
    records = []
    for number in range(count):
        shown = [image(str(draw.choice(names))) for _ in range(int(draw.integers(0, 3)))]
        messages = [user(*shown, said(draw)), assistant(said(draw, 4))]
        for _ in range(int(draw.integers(0, 3))):
            messages += [user(said(draw)), assistant(said(draw, 4))]
        records.append(Record(f"r{number:03d}", messages, kind=("one", "two")[number % 2]))
    write_records(records, folder / "records.jsonl")
    return folder


def write_checkpoint(folder: Path, experts: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A model as Hugging Face writes one, with its tokenizer and processor. Experts come without their balance loss: it
    is over the rows that ranks take at a time, so it depends on their number."""
    text = replace(TEXT, num_experts=experts, moe_intermediate_size=24, router_aux_loss_coef=0.0)
    sizes = ModelConfig(vision=VISION, text=text, initializer_range=0.2)
    config = Config.from_dict(qwen3_vl_config(sizes, tokenizer(), grid=8).to_dict())
    export(config, new(config, seed=1).named_parameters(), folder, dtype=dtype)
    write_reading(folder, tokenizer(), PIXELS)
    return folder


def config(folder: Path, data: Path, path: Path | str = "", **changes: Any) -> SftConfig:
    """Three steps in float32, a checkpoint at their end; ``changes``: dotted, with ``__`` for the dot."""
    made = SftConfig(
        run=RunConfig(folder=str(folder), threads=1),
        data=SftDataConfig(
            train=str(data), capacity=128, rows=4, held_out_share=0.35, min_pixels=1024, max_pixels=4096
        ),
        model=SftModelConfig(path=str(path)) if path else SftModelConfig(vision=VISION, text=TEXT),
        train=TrainConfig(steps=STEPS, precision="fp32", checkpoint_seconds=0.0, log_every=1, peak_tflops=1.0),
    )
    made.optim.warmup_steps, made.optim.muon_lr, made.optim.lr = 1, 5e-3, 1e-3
    made.evaluate.every, made.evaluate.examples = 2, 2
    for name, value in changes.items():
        *parts, last = name.split("__")
        place: Any = made
        for part in parts:
            place = getattr(place, part)
        setattr(place, last, value)
    made.__post_init__()
    return resolved(made)


def parallel(**axes: int) -> ParallelConfig:
    return ParallelConfig(**axes)


def train(made: SftConfig, stop: tuple[int, int] | None = None) -> str | streamed.Trained:
    """The run on the ranks that there are, without a report; or how it was interrupted.

    Args:
        stop: (step, rank): SIGTERM comes to that rank while it computes that step.
    """
    torch.set_num_threads(1)
    world = small.world()
    folder = Path(made.run.folder)
    layout = layout_of(made.parallel, world.size, sizes(made))
    material = streamed.prepare(made, folder, world, quiet())
    original, seen = streamed.loss_of, 0

    def loss_of(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        rows = made.data.rows // world.data_size
        if stop is not None and world.rank == stop[1] and seen == stop[0] * rows + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    streamed.loss_of = loss_of
    try:
        return streamed.run(made, material, layout, folder, quiet(), world)
    except Interrupted as interrupt:
        return str(interrupt)
    finally:
        streamed.loss_of = original


def train_all(runs: list[tuple[SftConfig, tuple[int, int] | None]]) -> list[str]:
    """Several runs one after the other; of each, how it was interrupted, or nothing."""
    said = []
    for made, stop in runs:
        found = train(made, stop)
        said.append(found if isinstance(found, str) else "")
        if dist.is_initialized():
            dist.barrier()
    return said


def sharegpt(folder: Path, count: int = 30) -> Path:
    """The same sort of data as LLaMA-Factory has it."""
    draw = random(12)
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        picture(draw, 40, 40).save(folder / f"{number}.png")
        talk = [{"from": "human", "value": f"<image>{said(draw)}"}, {"from": "gpt", "value": said(draw, 4)}]
        rows.append({"conversations": talk, "images": [f"{number}.png"]})
    (folder / "talks.json").write_text(json.dumps(rows))
    return folder
