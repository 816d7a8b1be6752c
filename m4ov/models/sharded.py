"""Folders of safetensors files, read and written one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_WRITTEN_BYTES = 4 << 20  # converted and written at once


class WeightsError(ValueError):
    """A folder of weights is not what it must be, or cannot be written; the message names folder and tensor."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which is read when it is asked for.

    Attributes:
        dtype: floating.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

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


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder, by name; headers are read, no values.

    Raises:
        WeightsError: there are no safetensors; a file is missing or damaged; files and index do not say the same; a
            tensor is not of a floating dtype of 16 bits or more.
    """
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, index)
    if not (folder / SINGLE).is_file():
        others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        found = f"it has {', '.join(others[:6]) or 'nothing'}" if folder.is_dir() else "there is no such folder"
        raise WeightsError(f"{folder}: expected {SINGLE} or {INDEX}; {found}")
    return _held(folder / SINGLE)


def _indexed(folder: Path, index: Path) -> dict[str, Stored]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = dict.fromkeys(weight_map.values())
        names = [Path(file).name for file in files]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: not an index of safetensors files ({type(error).__name__}: {error})") from None
    if names != list(files):
        raise WeightsError(f"{index}: expected names of files in this folder, got {list(files)[:4]}")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise WeightsError(f"{folder}: {some(missing)} of {len(files)} shards missing; {INDEX} names them")
    found: dict[str, Stored] = {}
    for file in files:
        held = _held(folder / file)
        absent = [name for name, where in weight_map.items() if where == file and name not in held]
        if absent:
            raise WeightsError(f"{folder / file}: {some(absent)} missing; {INDEX} says it is there")
        unknown = [name for name in held if weight_map.get(name) != file]
        if unknown:
            raise WeightsError(f"{folder / file}: {some(unknown)} there; {INDEX} does not say so")
        found |= held
    return found


def _held(path: Path) -> dict[str, Stored]:
    found = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                expected = ", ".join(_DTYPES)
                raise WeightsError(f"{path}: {name}: expected one of {expected}, got {part.get_dtype()}")
            found[name] = Stored(path, name, tuple(part.get_shape()), dtype)
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
    folder: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor], dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write tensors, one after the other, into as many files as are needed, and an index if these are several.

    Args:
        folder: there, without such files.
        shapes: name → shape, in the order of ``tensors``, of which each is taken when it is written.
        dtype: that they are converted to.
        shard_bytes: of a file, at most, unless one tensor is larger.
    """
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in shapes.items():
        taken = torch.Size(shape).numel() * dtype.itemsize
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
        _write_file(folder / file, shard, stream, dtype)
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], stream: Iterator[Tensor], dtype: torch.dtype
) -> None:
    """One file (https://github.com/huggingface/safetensors, "Format"): the length of a header, the header, values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, shape in shapes.items():
            tensor = next(stream)
            if tuple(tensor.shape) != tuple(shape):
                raise WeightsError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
            rows = max(1, _WRITTEN_BYTES * shape[0] // max(1, tensor.numel() * dtype.itemsize))
            for part in tensor.detach().split(rows):
                values = part.to("cpu", dtype).contiguous().flatten().view(torch.uint8)
                file.write(values.numpy().data)
            del tensor, part, values
        file.flush()
        os.fsync(file.fileno())


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
