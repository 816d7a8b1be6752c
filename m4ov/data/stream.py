"""The streaming loader: packed batches from shards of records, the same on any number of ranks, and resumable."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from m4ov.data.chat import ChatEncoder, Conversation
from m4ov.data.images import ImageError
from m4ov.data.index import RecordIndex
from m4ov.data.loader import LazyLengths, NoUsableSampleError, PackedLoader, Visit
from m4ov.data.pixels import Picture, patches_of
from m4ov.data.quarantine import Quarantine
from m4ov.data.records import RecordError
from m4ov.data.rows import pack, sample_of
from m4ov.data.shards import MAX_LINE_BYTES
from m4ov.data.sources import DataError
from m4ov_kernels.packing import PackedBatch, Patches, Sample

_FEW = 16  # bad records that no share of all is asked of


class StreamError(RuntimeError):
    """A step cannot be made; the message names the record."""


class RecordStream:
    """Rows of at most ``capacity`` tokens of records, ``rows`` of them a step over all ranks, as the loop takes them.

    Nothing is read ahead of time but where lines begin. A record is read and encoded when it is first planned, on every
    rank; its images are decoded and made into patches for its row, on the rank that has the row. An epoch visits every
    record once, in a new random order that reads blocks of neighbours together (:meth:`RecordIndex.order`).

    Records that cannot be used are counted, named in the quarantine file, and passed over: lines that are no records,
    images that are missing, too long records. An image whose header is right and whose pixels are not is found when its
    row is made: the row goes without that record. Two records with one id are two records here; :func:`validate`
    finds them.

    With :class:`m4ov.data.ahead.Ahead` around it, steps are made while the model trains.

    Args:
        source: a file of records, a folder of such, or several.
        encoder: makes tokens of records.
        capacity: tokens of a row, and of a record.
        rows: of a step, of all ranks; a multiple of ``ranks``.
        seed: of the order.
        rank, ranks: whose rows these are.
        too_long: what becomes of a record of more than ``capacity`` tokens: ``"turns"``: its last turns are dropped,
            whole, as many as it takes; and the record, if not even its first answer fits. ``"drop"``: the record is
            passed over. ``"error"``: the step raises. An image is never cut.
        on_bad: ``"quarantine"``: as above. ``"error"``: the step raises.
        shuffle: ``False``: records come in their order, as far as packing lets them.
        window: tokens that wait to be packed, see :class:`PackedLoader`.
        dtype: of ``pixel_values``.
        workers: threads that decode the images of a row.
        quarantine: a JSONL file that names what was passed over, once; ``None``: only counted. Ranks other than 0
            write what they alone find into one with their number.
        max_bad: share of the records read so far that may be bad, where there are more than 16 of them: a folder of
            images that has gone is an error, and not an empty data set.
        limit: bytes of a line.

    Raises:
        RecordError: there is no such file, or it cannot be read.
        ValueError: naming the argument.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        encoder: ChatEncoder,
        *,
        capacity: int,
        rows: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        too_long: Literal["turns", "drop", "error"] = "turns",
        on_bad: Literal["quarantine", "error"] = "quarantine",
        shuffle: bool = True,
        window: float = 4.0,
        dtype: torch.dtype = torch.float32,
        workers: int = 1,
        quarantine: str | Path | None = None,
        max_bad: float = 0.1,
        limit: int = MAX_LINE_BYTES,
    ) -> None:
        if too_long not in ("turns", "drop", "error"):
            raise ValueError(f"RecordStream: too_long: expected turns, drop or error; got {too_long!r}")
        if on_bad not in ("quarantine", "error"):
            raise ValueError(f"RecordStream: on_bad: expected quarantine or error; got {on_bad!r}")
        if workers < 1:
            raise ValueError(f"RecordStream: workers: expected 1 or more; got {workers}")
        self.index = RecordIndex(source, limit=limit)
        self.encoder, self.dtype, self.max_bad = encoder, dtype, max_bad
        self.capacity, self.rows, self.rank, self.too_long, self.on_bad = capacity, rows, rank, too_long, on_bad
        self.shuffle = shuffle
        self.counts: Counter[str] = Counter()
        self._quarantine = Quarantine(quarantine, rank)
        self._lengths = _Lengths(self)
        self._unusable: set[int] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="m4ov-images") if workers > 1 else None
        if not len(self.index):
            raise DataError(f"RecordStream: source: expected at least one record; got none in {source}")
        self.packed: PackedLoader[PackedBatch] = PackedLoader(
            self._lengths,
            self._make,
            capacity=capacity,
            rows=rows,
            seed=seed,
            rank=rank,
            ranks=ranks,
            window=window,
            order=self.index.order if shuffle else lambda _: np.arange(len(self.index)),
        )

    def batches(self, step: int) -> list[PackedBatch]:
        """This rank's rows of the next step. A row whose records all turned out to be broken is a token without a
        label.

        Raises:
            DataError: more records are bad than ``max_bad`` allows, or all are.
            StreamError: naming the record: something else went wrong with it.
            RecordError: with ``on_bad="error"`` or ``too_long="error"``.
            WriteError: the quarantine file cannot be written.
            ValueError: ``step`` is not the next.
        """
        try:
            made = self.packed.batches(step)
        except NoUsableSampleError as error:
            raise DataError(f"none of the {len(self.index)} records can be used ({self._reasons()})") from error
        self._lengths.keep({index for _, index in self.packed.waiting})
        return made

    def state_dict(self) -> dict[str, Any]:
        """Place in the stream, what waits to be packed, and what both depend on."""
        return {**self.packed.state_dict(), "data": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, on any number of ranks.

        Raises:
            DataError: the data or the settings that steps depend on have changed.
        """
        own, there = json.loads(json.dumps(self._settings())), state["data"]
        changed = [name for name in own if own[name] != there.get(name)]
        if changed:
            what = ", ".join(f"{name} ({there.get(name)} there, {own[name]} now)" for name in changed)
            raise DataError(f"the stream cannot go on where it was, as it has another {what}")
        self.packed.load_state_dict(state)

    def statistics(self) -> dict[str, float]:
        """Of this process and rank: records ``read``, ``bad`` ones and of each kind, ``turns dropped``, ``rows``,
        ``tokens``, ``images``, and ``fill``: tokens over what the rows had room for."""
        room = self.counts["rows"] * self.capacity
        return {**self.counts, "fill": self.counts["tokens"] / room if room else 0.0}

    def close(self) -> None:
        """Close files and end threads."""
        self.index.close()
        if self._pool is not None:
            self._pool.shutdown()

    def _settings(self) -> dict[str, Any]:
        data = {"records": len(self.index), "bytes": self.index.bytes, "file contents": self.index.fingerprint}
        size = {"capacity": self.capacity, "rows": self.rows}
        order = {"seed": self.packed.seed, "shuffle": self.shuffle, "window": self.packed.window}
        return {**data, **size, **order, "too_long": self.too_long, **self.encoder.settings()}

    def _make(self, row: Sequence[Visit]) -> PackedBatch:
        planned = [(index, made) for _, index in row if (made := self._conversation(index)) is not None]
        wanted = [picture for _, made in planned for picture in made.pictures]
        patches = patches_of(wanted, self.encoder.pixels, self.dtype, self._pool)
        samples = [sample for index, made in planned if (sample := self._sample(made, index, patches)) is not None]
        self.counts["rows"] += 1
        self.counts["tokens"] += sum(len(sample.input_ids) for sample in samples)
        self.counts["images"] += sum(len(sample.images) for sample in samples)
        return pack(samples, self.encoder, self.dtype)

    def _conversation(self, index: int) -> Conversation | None:
        try:
            return self._lengths.conversation(index)
        except RecordError as error:  # it was right when it was planned
            self.bad(error, index)
            return None

    def _sample(self, made: Conversation, index: int, patches: Mapping[Picture, Patches | ImageError]) -> Sample | None:
        try:
            return sample_of(made, patches, self.encoder, self.index.where(index))
        except RecordError as error:
            self.bad(error, index)
            return None

    def bad(self, error: RecordError, index: int, planned: bool = False) -> None:
        """Count a record that cannot be used, and name it, once. ``planned``: every rank has found it."""
        if self.on_bad == "error" or (error.kind == "too long" and self.too_long == "error"):
            raise error
        if index in self._unusable:
            return
        self._unusable.add(index)
        self.counts["bad"] += 1
        self.counts[f"bad: {error.kind}"] += 1
        if not planned or self.rank == 0:  # what is planned, all ranks see
            self._quarantine.add(error)
        if self.counts["bad"] > max(_FEW, self.max_bad * self.counts["read"]):
            share = f"{self.counts['bad']} of the {self.counts['read']} records read so far"
            raise DataError(f"{share} cannot be used ({self._reasons()}); the last: {error}")

    def _reasons(self) -> str:
        kinds = [(name[5:], count) for name, count in self.counts.items() if name.startswith("bad: ")]
        return ", ".join(f"{kind}: {count}" for kind, count in kinds) or "empty lines"


class _Lengths(LazyLengths):
    """Tokens of records; what has been encoded stays until its row is made."""

    def __init__(self, stream: RecordStream) -> None:
        self.stream = stream
        self._known = np.full(len(stream.index), -1, dtype=np.int32)
        self._made: dict[int, Conversation] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, index: int) -> int:
        if self._known[index] < 0:
            self._known[index] = self._first(index)
        return int(self._known[index])

    def conversation(self, index: int) -> Conversation:
        """The record as it was planned.

        Raises:
            RecordError: it is not what it was.
        """
        made = self._made[index] if index in self._made else self._encoded(index)
        if made is None or len(made) != self[index]:
            problem = f"{0 if made is None else len(made)} tokens now, {self[index]} when it was planned"
            raise RecordError(self.stream.index.where(index), "", "changed", problem, made.id if made else "")
        return made

    def keep(self, waiting: set[int]) -> None:
        """Forget the others."""
        self._made = {index: made for index, made in self._made.items() if index in waiting}

    def _first(self, index: int) -> int:
        self.stream.counts["read"] += 1
        try:
            made = self._encoded(index)
        except RecordError as error:
            self.stream.bad(error, index, planned=True)
            return 0
        if made is None:
            return 0
        self.stream.counts["turns dropped"] += made.turns_dropped
        self._made[index] = made
        return len(made)

    def _encoded(self, index: int) -> Conversation | None:
        """``None``: an empty line."""
        stream = self.stream
        where = stream.index.where(index)
        record = None
        try:
            record = stream.index[index]
            if record is None:
                return None
            turns = stream.too_long == "turns"
            return stream.encoder(
                record, Path(where.file).parent, max_length=stream.capacity, drop_turns=turns, where=where
            )
        except (RecordError, MemoryError):
            raise
        except Exception as error:
            name = f"record {record.id!r} of " if record is not None else ""
            raise StreamError(
                f"{name}{where.file}, line {where.line}: cannot be encoded: {type(error).__name__}: {error}"
            ) from error
