"""Checkpoints by PyTorch's DCP: saved on any layout, loaded on any other; whole, or not there.

``folder/step-00000100/`` holds DCP's files (``__<rank>_<n>.distcp``, ``.metadata``) and ``state.json``: the step, what
the caller wants to know again, and the size of every file, so that a missing shard is seen before anything is loaded.
The ranks write into a folder with a temporary name. When the last of them is done, rank 0 writes the list and renames
the folder, in one step of the file system: a crash before it leaves the older checkpoints, and a folder that the next
save removes. One process and many ranks write the same format. All ranks must see the same file system.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from m4ov.parallel import hang

_PREFIX, _TEMPORARY = "step-", ".writing-"
_STATE, _FORMAT = "state.json", 1
_RANDOM = "random."  # and the rank
# Said whenever one process saves or loads, which is what it was asked to do.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; the message names it and says why."""


class Checkpoints:
    """The checkpoints of a run: the newest few, each of them whole.

    Args:
        folder: one for all ranks.
        keep: how many of the newest stay.
        rank, size: of this process in the world. More than one rank: collective, in a process group of its own, so
            that a save in the background never meets the training's collectives.
        timeout_seconds: that a rank waits for the others in one step of saving or loading.
    """

    def __init__(
        self, folder: Path, *, keep: int, rank: int = 0, size: int = 1, timeout_seconds: float = 600.0
    ) -> None:
        self.folder, self.keep, self.rank, self.size = folder, keep, rank, size
        self._group = None
        if size > 1:
            with hang.named():
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._saving: tuple[Path, Future[Any]] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, wait: bool = False) -> None:
        """Write ``folder/step-<step>`` in the background, and remove all but the newest.

        Args:
            tensors: by name, the same on every rank: replicated tensors, or DTensors of any placement. Copied before
                this returns (to the CPU), so that training may go on to change them.
            state: what else the run needs: numbers, strings, lists and mappings of them. Rank 0's is kept.
            wait: return when the checkpoint stands.

        Each rank's random state (torch's, CUDA's, numpy's and Python's own) is added.

        Raises:
            CheckpointError: the *previous* save failed, or with ``wait`` this one: no space, no permission. Nothing
                half-written stays, and older checkpoints are as they were.
        """
        self.wait()
        final, temporary = self._path(step), self.folder / f"{_TEMPORARY}{step:08d}"
        box: list[OSError | None] = [None]
        if self.rank == 0:
            try:
                self._clear()
                temporary.mkdir(parents=True)
            except OSError as error:
                box = [error]
        self._share(box)  # nobody writes before the folder is there
        if box[0] is not None:
            raise _unwritable(final, box[0])
        writer = _Writer(temporary, final, {**state, "step": step, "world_size": self.size}, self.keep)
        stager = DefaultStager(StagingOptions(False, False, False, False))
        try:
            future: Any = dcp.async_save(
                {**tensors, f"{_RANDOM}{self.rank}": _random_state()},
                storage_writer=writer,
                async_stager=stager,
                process_group=self._group,
                no_dist=self._group is None,
            )
        finally:
            stager.close()
        self._saving = final, future
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the last save stands.

        Raises:
            CheckpointError: it failed.
        """
        if self._saving is None:
            return
        (final, future), self._saving = self._saving, None
        try:
            future.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            if self.rank == 0:
                self._clear()
            raise _unwritable(final, error) from error

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Fill ``tensors`` in place from the newest checkpoint, whatever layout it was saved on, and the random state.

        A rank that the checkpoint has no random state of derives one from rank 0's.

        Returns:
            The ``state`` that was saved and ``step``; ``None`` if there is no checkpoint.

        Raises:
            CheckpointError: it is not whole, cannot be read, or is of another model. Nothing older is taken instead.
        """
        found = checkpoints(self.folder)
        box = [found[-1].name if found else None]
        self._share(box)  # one rank's look at the folder holds for all
        if box[0] is None:
            return None
        path = self.folder / box[0]
        state, metadata = inspect(path)
        _compare(path, metadata, tensors)
        try:
            dcp.load(
                dict(tensors),
                storage_reader=dcp.FileSystemReader(path),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            raise _unreadable(path, error) from error
        _set_random_state(path, metadata, self.rank)
        return state

    def _share(self, box: list[Any]) -> None:
        """Rank 0's, in the box of every rank."""
        if self._group is not None:
            with hang.named():
                dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))

    def _path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"

    def _clear(self) -> None:
        for left in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left)


class _Writer(dcp.FileSystemWriter):
    """DCP's files in a temporary folder; the coordinator's last act gives it its name."""

    def __init__(self, temporary: Path, final: Path, state: dict[str, Any], keep: int) -> None:
        super().__init__(temporary, sync_files=True)
        self.temporary, self.final, self.state, self.keep = temporary, final, state, keep

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On rank 0 alone, after every rank has written all of its data."""
        super().finish(metadata, results)
        files = {file.name: file.stat().st_size for file in sorted(self.temporary.iterdir())}
        text = json.dumps({"format": _FORMAT, **self.state, "files": files}, indent=1)
        (self.temporary / _STATE).write_text(text, encoding="utf-8")
        for path in (self.temporary / _STATE, self.temporary):
            _sync(path)
        if self.final.exists():
            shutil.rmtree(self.final)
        self.temporary.rename(self.final)
        _sync(self.final.parent)
        for old in checkpoints(self.final.parent)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def inspect(path: Path) -> tuple[dict[str, Any], Metadata]:
    """What a checkpoint says of itself: its state, and the names, shapes and dtypes of its tensors.

    Raises:
        CheckpointError: it is not whole.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if state["format"] != _FORMAT:
            raise ValueError(f"format {state['format']}, this version reads {_FORMAT}")
        for name, size in state["files"].items():
            file = path / name
            if not file.exists():
                raise ValueError(f"shard {name} is missing")
            if file.stat().st_size != size:
                raise ValueError(f"shard {name} has {file.stat().st_size} bytes, was saved with {size}")
        return state, dcp.FileSystemReader(path).read_metadata()
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise _unreadable(path, error) from error


def read(path: Path, prefix: str = "weight.") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint, whole and one at a time, on one process: for an export from any layout.

    Args:
        prefix: only names that begin with it, which is taken off.

    Raises:
        CheckpointError: it is not whole, or cannot be read.
    """
    _, metadata = inspect(path)
    for name, entry in metadata.state_dict_metadata.items():
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
            yield name[len(prefix) :], _read_one(path, name, entry)


def _read_one(path: Path, name: str, entry: TensorStorageMetadata) -> Tensor:
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        dcp.load({name: tensor}, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from error
    return tensor


def full_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> Iterator[tuple[str, Tensor | None]]:
    """Sharded tensors gathered whole, one at a time, on the CPU; without ``keep``, ``None`` instead. Collective."""
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name, whole.detach().cpu() if keep else None


def _compare(path: Path, metadata: Metadata, tensors: Mapping[str, Tensor]) -> None:
    found = {name: entry for name, entry in metadata.state_dict_metadata.items() if not name.startswith(_RANDOM)}
    for name, tensor in tensors.items():
        entry = found.pop(name, None)
        if entry is None or isinstance(entry, BytesStorageMetadata) or entry.size != tensor.shape:
            there = f"{list(entry.size)}" if isinstance(entry, TensorStorageMetadata) else "nothing"
            raise CheckpointError(
                f"checkpoint {path}: of another model: {name}: expected {list(tensor.shape)}, found {there}"
            )
    if found:
        raise CheckpointError(f"checkpoint {path}: of another model: it has {next(iter(found))}, this one has not")


def _random_state() -> Tensor:
    """Every generator of this process, as bytes: uint8 ``[n]``."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_initialized() else None,
        "numpy": [kind, np.asarray(keys).tolist(), place, has_gauss, gauss],
        "python": random.getstate(),
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _set_random_state(path: Path, metadata: Metadata, rank: int) -> None:
    name, first = f"{_RANDOM}{rank}", f"{_RANDOM}0"
    entries = metadata.state_dict_metadata
    entry = entries.get(name, entries.get(first))
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointError(f"checkpoint {path}: it holds no random state")
    text = bytes(_read_one(path, name if name in entries else first, entry).tolist())
    if name not in entries:  # this rank is new
        torch.manual_seed(zlib.crc32(text) + rank)
        return
    state = json.loads(text)
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    kind, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _unwritable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"checkpoint {path}: cannot be written ({_reason(error)}); earlier ones are intact")


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path}: cannot be read ({_reason(error)}); remove it to go on from an earlier one"
    )


def _reason(error: BaseException) -> str:
    """Of a failure on many ranks, the first rank's; one line."""
    where = ""
    if isinstance(error, CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
        where = f"rank {rank}: "
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return f"{where}{text[:300]}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
