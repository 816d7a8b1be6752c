"""The folder that a model is saved in: there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m4ov.models.qwen3_vl import WeightsError
from m4ov.train import CheckpointError


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to make and fill in the block, which then takes the place of ``folder``.

    Raises:
        CheckpointError: it cannot be written, as an OSError or a WeightsError of the block says. What was there before
            stays.
    """
    temporary = folder.with_name(f".writing-{os.getpid()}")
    try:
        for left in folder.parent.glob(".writing-*"):
            shutil.rmtree(left)
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except (OSError, WeightsError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"model {folder}: cannot be written ({reason})") from error
