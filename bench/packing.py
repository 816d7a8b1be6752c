"""``pack_sequences``: a million sequences as training data has them, and how full the bins are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m4ov_bench import cases
from m4ov_bench.gate import Gate
from m4ov_bench.row import Row
from m4ov_bench.session import Session, Subject, rows
from m4ov_kernels import pack_sequences
from m4ov_kernels.dispatch import native_extension
from m4ov_kernels.packing import reference

_CHECKED = 10_000  # sequences that plain Python packs too


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.PACKING:
        if case.quick or not session.quick:
            yield from rows(session, subject(case))


def subject(case: cases.PackingCase) -> Subject:
    inputs = [(lengths(case),) for _ in range(3)]

    def ours(sequences: Tensor) -> Tensor:
        return pack_sequences(sequences, case.capacity).order

    bins = pack_sequences(*inputs[0], case.capacity)
    full = int(inputs[0][0].sum()) / (len(bins) * case.capacity)
    extension, _ = native_extension()
    return Subject(
        family="packing",
        operator="pack_sequences",
        case=f"{case}: {full:.2%} full",
        implementation="reference" if extension is None else f"native {extension.isa()}",
        gate=check(case, inputs[0][0][:_CHECKED]),
        ours=ours,
        peers={},
        inputs=inputs,
    )


def check(case: cases.PackingCase, sequences: Tensor) -> Gate:
    """The same bins as the definition's."""
    made = [group.tolist() for group in pack_sequences(sequences, case.capacity)]
    same = made == reference.pack_sequences(sequences.tolist(), case.capacity)
    return Gate({"bins": 0.0 if same else float("inf")}, "" if same else "bins: others than the definition's")


def lengths(case: cases.PackingCase) -> Tensor:
    """int64 ``[N]``: chats (log-normal around 250 tokens), a fifth of them documents of any length, or with images."""
    count, capacity = case.sequences, case.capacity
    chats = torch.empty(count).log_normal_(5.5, 1.0)
    if case.mix == "documents":
        chats = torch.where(torch.rand(count) < 0.2, torch.rand(count) * capacity, chats)
    elif case.mix == "images":
        chats = torch.randint(1, 9, (count,)) * 256 + chats
    return chats.long().clamp(1, capacity)
