"""Folders of safetensors files, read and written one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m4ov.models.safetensors_file import NAMES, WeightsError, read_header, unique, write_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which is read when it is asked for.

    Attributes:
        nbytes: of its values.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, mapped from the file; the mapping goes with it."""
        with _opened(self.path) as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor

    def rows(self, begin: int, end: int) -> Tensor:
        """Some rows of it."""
        with _opened(self.path) as file:
            tensor: Tensor = file.get_slice(self.name)[begin:end]
        return tensor


def stored(folder: Path, dtypes: Collection[torch.dtype] = FLOATING) -> dict[str, Stored]:
    """Every tensor of a folder, by name; headers are read, no values.

    Args:
        dtypes: that a tensor may have.

    Raises:
        WeightsError: there are no safetensors; a file is missing or damaged; files and index do not say the same; a
            tensor is of another dtype.
    """
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, index, dtypes)
    if not (folder / SINGLE).is_file():
        others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        found = f"it has {', '.join(others[:6]) or 'nothing'}" if folder.is_dir() else "there is no such folder"
        raise WeightsError(f"{folder}: expected {SINGLE} or {INDEX}; {found}")
    return held(folder / SINGLE, dtypes)


def _indexed(folder: Path, index: Path, dtypes: Collection[torch.dtype]) -> dict[str, Stored]:
    try:
        text = index.read_text(encoding="utf-8")
        weight_map = json.loads(text, object_pairs_hook=lambda pairs: unique(pairs, "tensor"))["weight_map"]
        files = {file: name for name, file in reversed(weight_map.items())}  # each with its first tensor
        outside = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index}: not an index of safetensors files ({type(error).__name__}: {error})") from None
    if outside:
        where = f"got {outside[0]!r} for {files[outside[0]]}"
        raise WeightsError(f"{index}: expected names of files in this folder that end in .safetensors, {where}")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        needed = f"{files[missing[0]]} is in {missing[0]}"
        raise WeightsError(f"{folder}: {some(missing)} of {len(files)} shards missing; {INDEX} says that {needed}")
    found: dict[str, Stored] = {}
    for file in dict.fromkeys(weight_map.values()):
        there = held(folder / file, dtypes)
        absent = [name for name, where in weight_map.items() if where == file and name not in there]
        if absent:
            raise WeightsError(f"{folder / file}: {some(absent)} missing; {INDEX} says it is there")
        unknown = [name for name in there if weight_map.get(name) != file]
        if unknown:
            other = weight_map.get(unknown[0])
            instead = f": it says that {unknown[0]} is in {other}" if other else ""
            raise WeightsError(f"{folder / file}: {some(unknown)} there; {INDEX} does not say so{instead}")
        found |= there
    return found


def held(path: Path, dtypes: Collection[torch.dtype] = FLOATING) -> dict[str, Stored]:
    """:func:`stored` of a single file."""
    found = {}
    for name, entry in read_header(path).items():
        if entry.dtype not in dtypes:
            expected = ", ".join(NAMES[dtype] for dtype in dtypes)
            raise WeightsError(f"{path}: {name}: expected one of {expected}, got {NAMES[entry.dtype]}")
        found[name] = Stored(path, name, entry.shape, entry.dtype)
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: cannot be read as a safetensors file ({error})") from None


def some(names: Iterable[str]) -> str:
    """A few names of many."""
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def write(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[Tensor],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    shard_bytes: int,
) -> None:
    """Write tensors, one after the other, into as many files as are needed, and an index if these are several.

    Args:
        folder: there, without such files.
        shapes: name → shape, in the order of ``tensors``, of which each is taken when it is written.
        dtype: that they are converted to: one for all, or one for each name.
        shard_bytes: of a file, at most, unless one tensor is larger.
    """
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in shapes.items():
        taken = math.prod(shape) * dtypes[name].itemsize
        if shards[-1] and size + taken > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + taken, total + taken
    stream = iter(tensors)
    count = len(shards)
    files = [
        f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE for number in range(1, count + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard, dtypes, stream)
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` at the end of the block and is gone after an error.

    Raises:
        WeightsError: ``folder`` is there already and not empty, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: exists already; remove it, or choose another")
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WeightsError(f"{folder}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
