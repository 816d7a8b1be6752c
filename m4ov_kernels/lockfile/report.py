"""What is known of one compiled kernel, and the budgets that it is held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from m4ov_kernels.gpu import Build, CudaBuild
from m4ov_kernels.lockfile.read import WGMMA, Code
from m4ov_kernels.lockfile.targets import chip


@dataclass(frozen=True)
class Report:
    """One compilation: fields of :class:`Code`, with ``shared`` all of the block's shared memory, the ``threads`` of a
    block, and the estimated ``occupancy``: resident warps over the most that a multiprocessor holds."""

    kernel: str
    target: str
    registers: int
    local: int
    spills: int
    shared: int
    fp64: int
    matrix: Mapping[str, int]
    threads: int
    occupancy: float
    size: int

    @classmethod
    def of(cls, kernel: str, target: str, code: Code, threads: int, shared: int) -> Report:
        occupancy = round(chip(target).occupancy(threads, code.registers, shared), 4)
        known = {**asdict(code), "threads": threads, "shared": shared}
        return cls(kernel=kernel, target=target, occupancy=occupancy, **known)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "matrix": dict(self.matrix)}


def violations(report: Report, build: Build | CudaBuild, shared_limit: int) -> list[str]:
    """The budgets. ``build``: what the kernel was declared to be."""
    found = []
    if report.fp64:
        found.append(f"{report.fp64} float64 instructions")
    if build.hot and report.local:
        found.append(f"{report.local} bytes of local memory a thread (spills) in a hot kernel")
    if build.hot and report.spills and not report.local:
        found.append(f"{report.spills} spills in a hot kernel")
    if report.shared > shared_limit:
        found.append(f"{report.shared} bytes of shared memory of {shared_limit}")
    if not report.occupancy:
        found.append("no block fits on a multiprocessor")
    kinds = ", ".join(report.matrix) or "none"
    wgmma = report.target.startswith("sm_90") and (isinstance(build, Build) or build.wgmma)
    if build.matrix and not report.matrix:
        found.append("no matrix instruction in a matrix kernel")
    elif build.matrix and wgmma and not any(map(WGMMA.fullmatch, report.matrix)):
        found.append(f"no wgmma in a matrix kernel (its matrix instructions: {kinds})")
    elif report.matrix and not build.matrix:
        found.append(f"matrix instructions ({kinds}) in a kernel that is not declared with matrix=True")
    return found
