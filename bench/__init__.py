"""Benchmarks of m4ov's operators: against named peers and the machine's limit, correctness before speed."""

from __future__ import annotations

from m4ov_bench.row import Machine, Peer, Row
from m4ov_bench.runner import FAMILIES, run

__all__ = ["FAMILIES", "Machine", "Peer", "Row", "run"]
