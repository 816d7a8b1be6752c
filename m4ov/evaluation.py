"""``m4ov evaluate MODEL``: the quickstart's held-out questions asked of a checkpoint, quantised or not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from m4ov.data import Encoder, Split
    from m4ov.evaluate import Accuracy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="a folder that the quickstart or `m4ov quantize` wrote"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="questions of each split (default: all)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of PyTorch (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")


def checkpoint(path: Path) -> Path:
    """A checkpoint's folder; needs no torch, so that a wrong name is answered at once.

    Raises:
        ValueError: it is none; names MODEL.
    """
    if not path.is_dir():
        raise ValueError(f"MODEL: {path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")
    if not (path / "config.json").is_file():
        raise ValueError(f"MODEL: {path}: expected a checkpoint; it has no config.json")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"MODEL: {path}: expected a checkpoint; it has no .safetensors file")
    return path


def prepare(options: argparse.Namespace) -> Path:
    """MODEL, checked."""
    if options.limit < 0:
        raise ValueError(f"--limit: expected at least 0, got {options.limit}")
    return checkpoint(options.model)


def held_out(encoder: Encoder) -> tuple[Split, Split]:
    """The quickstart's held-out splits, at the size of image that the encoder is for."""
    from m4ov.data import digits, easy_vqa
    from m4ov.recipe import DataConfig

    options, size = DataConfig(), encoder.geometry.size
    _, domain = digits(size, held_out=options.held_out_digits, split_seed=options.split_seed)
    return easy_vqa("test", size), domain


def accuracies(
    model: Any,
    encoder: Encoder,
    splits: tuple[Split, ...],
    *,
    limit: int = 0,
    dtype: torch.dtype,
    done: Callable[[], object] = lambda: None,
) -> list[Accuracy]:
    """Exact match on each split; ``done`` is called after each."""
    from m4ov.evaluate import exact_match
    from m4ov.recipe import EvaluateConfig

    found = []
    for split in splits:
        capacity = EvaluateConfig().tokens_per_batch
        found.append(exact_match(model, split, encoder, tokens_per_batch=capacity, limit=limit, dtype=dtype))
        done()
    return found


def execute(options: argparse.Namespace, folder: Path) -> int:
    """Exit status 2 (``ValueError``): the model is no quickstart's."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from m4ov import quantize
    from m4ov.data import encoder_of
    from m4ov.models.qwen3_vl import cast_parameters
    from m4ov.train import command
    from m4ov_kernels.patches import patch

    command.set_up(options.threads)
    encoder = encoder_of(folder)
    if encoder is None:
        raise ValueError(f"MODEL: {folder}: expected a quickstart's model; its tokenizer and processor are others")
    console, dtype = Console(), quantize.half_dtype(folder)
    if quantize.is_quantized(folder):
        model = quantize.load(folder)
        patch(model)
    else:
        model = quantize.load_source(folder, torch.float32)
        cast_parameters(model, dtype)
    with console.status("evaluating on the held-out questions"):
        found = accuracies(model, encoder, held_out(encoder), limit=options.limit, dtype=dtype)
    table = Table(title=str(folder), title_justify="left", show_header=False)
    for result in found:
        table.add_row(f"[bold]{result.split}[/bold]", f"[bold]{result.value:.2%}[/bold] of {len(result.right):,}")
        for kind, (right, asked) in result.kinds.items():
            table.add_row(f"  {kind}", f"{right / asked:.1%} of {asked:,}")
    console.print(table)
    if options.json:
        numbers = {
            "accuracy": {result.split: result.value for result in found},
            "kinds": {result.split: {kind: list(pair) for kind, pair in result.kinds.items()} for result in found},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0
