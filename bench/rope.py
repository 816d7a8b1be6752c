"""Rotary positions: an operator a file."""

from __future__ import annotations

from collections.abc import Iterator

from m4ov_bench import rope_positions
from m4ov_bench.row import Row
from m4ov_bench.session import Session


def benchmark(session: Session) -> Iterator[Row]:
    yield from rope_positions.benchmark(session)
