"""A small data production, and what it leaves."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from m4ov.data.production.steps import read_rows
from m4ov.data_recipe import AllotConfig, DataBuildConfig, EngineConfig, SourcesConfig
from m4ov.recipe import RunConfig

NOTHING = SourcesConfig(0, 0, 0, 0, 0, 0, files=["-"])


def sources(**counts):
    """Only the sources that are named."""
    return dataclasses.replace(NOTHING, **{"files": [], **counts})


def recipe(folder, **changes):
    """40 images of every packaged source, 160 questions, 7 shards."""
    config = DataBuildConfig(
        run=RunConfig(folder=str(folder)),
        sources=SourcesConfig(easy_vqa=12, scenes=4, digits=8, sheets=4, flags=8, photos=4),
        allot=AllotConfig(questions=160),
        engine=EngineConfig(shard_images=8),
    )
    return dataclasses.replace(config, **changes)


def digest(folder):
    """File → SHA-256, of all that a run leaves but a teacher's cache."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: value for name, value in found.items() if not name.startswith("teacher-cache/")}


def rows(folder, name):
    """The rows of a file of a run."""
    return list(read_rows(Path(folder) / name))
