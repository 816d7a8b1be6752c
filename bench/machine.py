"""The machine a run is made on: what it is, and what its memory and arithmetic reach in this run."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from m4ov_bench import measure
from m4ov_bench.row import Machine
from m4ov_kernels.dispatch import native_extension

_COPY_BYTES, _MATRIX = 2**25, 2048


def describe(allocator: str = "") -> Machine:
    """Everything but the limits; ``allocator``: in words, from whoever set it up."""
    extension, reason = native_extension()
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa=extension.isa() if extension is not None else f"none: {reason}",
        system=platform.platform(),
        versions={"python": platform.python_version()} | {n: version(n) for n in ("m4ov", "torch", "transformers")},
        allocator=allocator or _allocator(),
        commit=_commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def limits(effort: measure.Effort) -> dict[str, float]:
    """B/s of a copy (bytes read plus bytes written), FLOP/s of a large matrix product, and OP/s of int8 dot products
    where there are compiled kernels."""
    measured = {"copy B/s": measure.copy_rate(_COPY_BYTES, effort)}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        measured[f"{name} mm FLOP/s"] = measure.matmul_rate(dtype, effort, _MATRIX)
    if native_extension()[0] is not None:
        measured["int8 dot OP/s"] = measure.dot_rate("int8", effort)
    return measured


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _allocator() -> str:
    set_up = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    return ", ".join(set_up) or "as the system has it (run `m4ov bench` for the set-up of m4ov's commands)"


def version(package: str) -> str:
    """Of an installed distribution, or that it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the checkout that this file lies in; empty in an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
