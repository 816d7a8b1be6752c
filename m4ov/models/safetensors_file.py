"""One safetensors file (https://github.com/huggingface/safetensors, "Format"): the length of a header in eight bytes,
the header in JSON, values. What a header says is checked here, tensor by tensor, so that an error can name the one."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The format's name of a dtype → PyTorch's. (F4 and F6, less than a byte each, are read nowhere here.)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_WRITTEN_BYTES = 4 << 20  # converted and written at once


class WeightsError(ValueError):
    """A file or folder of weights is not what it must be, or cannot be written; the message names it and the tensor."""


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor; ``begin`` and ``end`` are bytes behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Name → entry of every tensor of a file, in the order of their values; no value is read.

    Raises:
        WeightsError: the file cannot be read, is cut off, or its header contradicts itself; names file and tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
            if not 0 < length <= min(size - 8, _MAX_HEADER):
                said = f"a header of {length} bytes" if length >= 0 else "nothing of a header"
                raise _unreadable(path, f"{said} in a file of {size}: it is cut off, or no such file")
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: unique(pairs, "tensor"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _unreadable(path, f"its header: {error}") from None
    if not isinstance(header, dict):
        raise _unreadable(path, f"its header: expected an object, got {type(header).__name__}")
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, value, size - 8 - length) for name, value in header.items()}
    found = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for name, entry in found.items():
        if entry.begin != end:
            raise _unreadable(path, f"{name}: expected its values to begin at byte {end}, got {entry.begin}")
        end = entry.end
    if end != size - 8 - length:
        raise _unreadable(path, f"{size - 8 - length - end} bytes behind the last tensor")
    return found


def _entry(path: Path, name: str, value: Any, size: int) -> Entry:
    def refuse(what: str, expected: str, got: Any) -> WeightsError:
        return _unreadable(path, f"{name}: {what}: expected {expected}, got {got!r}")

    if not isinstance(value, dict):
        raise refuse("its entry", "an object", value)
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse("dtype", f"one of {', '.join(DTYPES)}", dtype)
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise refuse("shape", "a list of sizes", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise refuse("data_offsets", "[begin, end]", offsets)
    begin, end = offsets
    taken = math.prod(shape) * DTYPES[dtype].itemsize
    if not 0 <= begin <= end <= size:
        raise refuse("data_offsets", f"inside the file's {size} bytes of values (is it cut off?)", offsets)
    if end - begin != taken:
        raise refuse("data_offsets", f"{taken} bytes for {dtype} {shape}", offsets)
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    """A JSON object's pairs as a mapping; a name that is there twice is a ``ValueError``."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{what} {twice} is there twice")
    return made


def _unreadable(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path}: cannot be read as a safetensors file ({reason})")


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], stream: Iterator[Tensor]
) -> None:
    """One file of tensors that come one after the other, in the order of ``shapes``, each converted to its dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [begin, end]}
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
            tensor = tensor.detach() if shape else tensor.detach().reshape(1)
            taken = tensor.numel() * dtypes[name].itemsize
            for part in tensor.split(max(1, _WRITTEN_BYTES * tensor.shape[0] // max(1, taken))):
                values = part.to("cpu", dtypes[name]).contiguous().flatten().view(torch.uint8)
                file.write(values.numpy().data)
            del tensor, part, values
        file.flush()
        os.fsync(file.fileno())
