"""Checkpoints that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_PREFIX, _TEMPORARY = "step-", ".writing-"
_TENSORS, _STATE = "state.safetensors", "state.json"


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; the message names it and says why."""


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int) -> Path:
    """Write ``folder/step-<step>`` and remove all but the newest ``keep`` checkpoints.

    A crash at any point leaves the earlier checkpoints as they are, and at most a folder with a temporary name, which
    the next save removes.

    Raises:
        CheckpointError: no space, no permission, or another failure to write. Nothing half-written stays.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f"{_TEMPORARY}{os.getpid()}"
    try:
        _clear_temporary(folder)
        temporary.mkdir(parents=True)
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps({**state, "step": step}, indent=1), encoding="utf-8")
        for file in (temporary / _TENSORS, temporary / _STATE, temporary):
            _sync(file)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"checkpoint {final}: cannot be written ({reason}); earlier ones are intact") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def load_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint; ``None`` if there is none.

    Raises:
        CheckpointError: it cannot be read. Nothing older is taken instead.
    """
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        state = json.loads((newest / _STATE).read_text(encoding="utf-8"))
        return load_file(newest / _TENSORS), state
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {newest}: cannot be read ({error}); remove it to go on from an earlier one"
        ) from error


def random_state() -> str:
    """PyTorch's CPU random state as text."""
    return bytes(torch.get_rng_state().tolist()).hex()


def set_random_state(text: str) -> None:
    """The reverse of :func:`random_state`."""
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8))


def _clear_temporary(folder: Path) -> None:
    for left in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
