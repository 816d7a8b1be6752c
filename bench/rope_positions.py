"""``mrope_positions``: bound by memory; the limit is a copy of as many bytes: a token's id in, three positions out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gate, peers
from m4ov_bench.row import Row
from m4ov_bench.session import Kernel, Session, Subject, implementation_name, memory_bound, rows
from m4ov_kernels import mrope_positions
from m4ov_kernels.dispatch import Implementation
from m4ov_kernels.rope import reference
from m4ov_kernels.rope.positions import MROPE_POSITIONS

IMAGE, VIDEO = 151655, 151656  # of Qwen3-VL
MERGE_SIZE = 2
NAMES = ("position_ids", "deltas")


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.POSITIONS:
        if session.wants(case):
            yield from rows(session, subject(case))


def subject(case: cases.PositionsCase) -> Subject:
    """One case, on PyTorch's default device."""
    implementation = MROPE_POSITIONS.select(torch.get_default_device(), torch.int64)
    inputs = [tokens_of(case) for _ in range(3)]
    bounds, grid = torch.arange(case.samples + 1) * case.length, grids_of(case)

    def ours(input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return mrope_positions(
            input_ids,
            cu_seqlens=bounds,
            image_grid_thw=grid,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            merge_size=MERGE_SIZE,
        )

    options = (bounds, None, grid, None, None, IMAGE, VIDEO, MERGE_SIZE)
    theirs = peers.get_rope_index(case.samples, grid, IMAGE, MERGE_SIZE)
    return Subject(
        family="rope",
        operator="mrope_positions",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=check(ours, implementation, options, inputs[0]),
        ours=ours,
        peers=theirs,
        inputs=inputs,
        kernels={} if implementation is None else {"forward": kernel(implementation, options, inputs)},
        definition=lambda input_ids: reference.mrope_positions(input_ids, *options),
    )


def tokens_of(case: cases.PositionsCase) -> tuple[Tensor]:
    """Text with the tokens of the images spread evenly over every sample."""
    ids = torch.randint(0, 150_000, (case.samples, case.length))
    size = case.rows * case.columns
    for image in range(case.images):
        begin = 1 + image * (case.length // case.images)
        ids[:, begin : begin + size] = IMAGE
    return (ids.flatten(),)


def grids_of(case: cases.PositionsCase) -> Tensor:
    grid = [1, MERGE_SIZE * case.rows, MERGE_SIZE * case.columns]
    return torch.tensor([grid] * (case.samples * case.images), dtype=torch.int64).view(-1, 3)


def check(
    call: Any, implementation: Implementation | None, options: tuple[Any, ...], inputs: tuple[Tensor]
) -> gate.Gate:
    """The call, and the raw kernel into poisoned outputs, are the definition to the bit."""
    exact = reference.mrope_positions(*inputs, *options)
    result = gate.compare_all(NAMES, call(*inputs), exact, exact)
    if implementation is None:
        return result
    out = gate.poisoned(*exact)
    implementation.fwd(*inputs, *options, out=out)
    return result + gate.compare_all([f"{name} (out=)" for name in NAMES], out, exact, exact)


def kernel(implementation: Implementation, options: tuple[Any, ...], inputs: list[tuple[Tensor]]) -> Kernel:
    out = [tuple(torch.zeros_like(tensor) for tensor in implementation.fwd(*tensors, *options)) for tensors in inputs]

    def forward(index: int) -> None:
        implementation.fwd(*inputs[index % len(inputs)], *options, out=out[index % len(out)])

    moved = 4 * inputs[0][0].nbytes
    copies = [[(ids, position_ids[0])] for (ids,), (position_ids, _) in zip(inputs, out, strict=True)]
    return memory_bound(forward, moved, 0.0, copies)
