"""What this machine will run, and why: collected from what is loaded, never guessed."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import m4ov_kernels  # noqa: F401  (registers every operator)
from m4ov import allocator
from m4ov.cores import usable_cores
from m4ov_kernels.dispatch import BACKENDS, FUNCTIONS, Operator, native_extension, triton_interpreted

PACKAGES = ("m4ov", "torch", "triton", "transformers", "tokenizers", "omegaconf", "flash-attn", "transformer-engine")
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)\b.*\.so")  # wheels add a hash to the name


@dataclass(frozen=True)
class Served:
    """Which implementation runs an operator for tensors of one device and dtype; ``why`` names what does not, too."""

    operator: str
    device: str
    dtype: str
    runs: str  # "native", "triton", "reference", or "error": the call would raise
    why: str


@dataclass(frozen=True)
class Report:
    """``facts``: section → (name, value). ``advice``: what the user can do better."""

    facts: dict[str, list[tuple[str, str]]]
    operators: list[Served]
    advice: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"facts": {section: dict(lines) for section, lines in self.facts.items()}} | {
            "operators": [asdict(served) for served in self.operators],
            "advice": self.advice,
        }


def collect() -> Report:
    """Look at this process and this machine; loads the compiled extension, asks no network."""
    extension, reason = native_extension()
    memory = allocator.status()
    runtimes = openmp_runtimes()
    facts = {
        "kernels": _kernel_facts(extension, reason),
        "threads": [
            ("PyTorch", f"{torch.get_num_threads()} in a call, {torch.get_num_interop_threads()} between calls"),
            ("cores", f"{usable_cores()} usable of {os.cpu_count()}"),
            *((name, os.environ[name]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ),
            ("OpenMP runtimes mapped", _runtimes_text(runtimes)),
        ],
        "allocator": [
            ("set up", memory.how),
            (
                "large blocks",
                {True: "stay in the process", False: "mapped afresh each time", None: "not observed"}[memory.keeps],
            ),
            ("because", memory.reason),
        ],
        "CUDA": _cuda_facts(extension),
        "versions": [(name, _version(name)) for name in PACKAGES]
        + [("Python", f"{platform.python_version()}, {sys.executable}"), ("system", platform.platform())],
    }
    return Report(facts, serving(), _advice(extension, reason, memory, runtimes))


def serving() -> list[Served]:
    """Operator by operator: what runs on the CPU and on the GPU (or would, where there is none)."""
    devices = [torch.device("cpu"), torch.device("cuda")]
    return [
        _serve(name, operator, device, dtype)
        for name, operator in FUNCTIONS.items()
        for device in devices
        for dtype in operator.dtypes
    ]


def _serve(function: str, operator: Operator, device: torch.device, dtype: torch.dtype) -> Served:
    name, usual = str(dtype).removeprefix("torch."), operator.usual.get(function, ())
    try:
        implementation = operator.select(device, dtype, *usual)
    except RuntimeError as error:
        return Served(function, device.type, name, "error", str(error))
    runs = "reference" if implementation is None else implementation.backend
    if os.environ.get("M4OV_BACKEND"):
        why = f"M4OV_BACKEND={os.environ['M4OV_BACKEND']}"
    elif runs == "native" and device.type == "cpu":
        why = f"compiled kernels, {native_extension()[0].isa()}"
    else:
        tried = [name for name in BACKENDS if name in operator.backends]
        reasons = [(backend, _reason(operator, backend, device.type, dtype, usual)) for backend in tried]
        by = [f"kernels of {operator.library().chosen()}"] if runs == "library" else []
        why = "; ".join(by + [f"{backend}: {reason}" for backend, reason in reasons if reason is not None])
    if device.type == "cuda" and not torch.cuda.is_available():
        return Served(function, "cuda", name, "none", f"no GPU; with one: {runs}" + f" ({why})" * bool(why))
    return Served(function, device.type, name, runs, why)


def _reason(
    operator: Operator, backend: str, device_type: str, dtype: torch.dtype, usual: tuple[Any, ...]
) -> str | None:
    reason = operator.unavailable(backend, device_type, dtype)
    if reason is None and operator.declines is not None:
        reason = operator.declines(backend, device_type, *usual)
    return reason


def openmp_runtimes() -> list[str] | None:
    """Files of the OpenMP runtimes that this process has mapped; ``None`` where that cannot be seen."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    except OSError:
        return None
    return sorted(file for file in files if _OPENMP.match(os.path.basename(file)))


def _runtimes_text(runtimes: list[str] | None) -> str:
    if runtimes is None:
        return "cannot be seen on this system"
    return f"{len(runtimes)}: {', '.join(runtimes)}" if runtimes else "none"


def _kernel_facts(extension: Any, reason: str) -> list[tuple[str, str]]:
    facts = [("processor", _cpu())]
    if extension is None:
        return [*facts, ("compiled extension", f"none: {reason}")]
    found = extension.isas()
    forced = os.environ.get("M4OV_ISA")
    return [
        *facts,
        ("instruction sets here", ", ".join(found) or "none with kernels"),
        ("in use", extension.isa() + (f" (M4OV_ISA={forced})" if forced else "")),
        ("compiled by", extension.compiler()),
        ("Triton interpreter", "on (TRITON_INTERPRET=1)" if triton_interpreted() else "off"),
    ]


def _cuda_facts(extension: Any) -> list[tuple[str, str]]:
    driver = _driver_version()
    facts = [
        ("driver", f"supports CUDA {driver}" if driver else "none (no libcuda.so.1)"),
        ("PyTorch", f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            text = (
                f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
            )
            facts.append((f"GPU {index}", text))
    else:
        facts.append(("GPU", "none that PyTorch can use"))
    targets = extension.cuda_targets() if extension is not None else []
    facts.append(("our CUDA C++ kernels", ", ".join(targets) if targets else "not compiled in (M4OV_CUDA)"))
    return facts


def _advice(extension: Any, reason: str, memory: allocator.Status, runtimes: list[str] | None) -> list[str]:
    advice = []
    if extension is None:
        advice.append(f"no compiled kernels: {reason}")
    if memory.keeps is False:
        advice.append("large tensors are page-faulted afresh: see m4ov/allocator.py, or run through a command of m4ov")
    if runtimes is not None and len(runtimes) > 1:
        advice.append(f"{len(runtimes)} OpenMP runtimes are mapped: their threads compete for the cores")
    if torch.get_num_threads() > usable_cores():
        advice.append(f"{torch.get_num_threads()} threads on {usable_cores()} cores: set OMP_NUM_THREADS")
    return advice


def _driver_version() -> str | None:
    """The newest CUDA that the driver supports, e.g. "13.0"; ``None`` without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def render(report: Report, console: Console) -> None:
    for section, lines in report.facts.items():
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2))
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in lines:
            table.add_row(f"[dim]{name}[/dim]", escape(value))
        console.print(table)
    table = Table(title="operators: what will run", title_justify="left")
    for column in ("operator", "device", "dtypes", "runs", "why"):
        table.add_column(column, overflow="fold")
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for served in report.operators:
        grouped.setdefault((served.operator, served.device, served.runs, served.why), []).append(served.dtype)
    for (operator, device, runs, why), dtypes in grouped.items():
        colour = {"reference": "yellow", "error": "red", "none": "dim"}.get(runs, "green")
        table.add_row(operator, device, ", ".join(dtypes), f"[{colour}]{runs}[/{colour}]", escape(why))
    console.print(table)
    console.print("float64, mixed dtypes and other devices run through the reference.")
    for advice in report.advice:
        console.print(f"[yellow]• {escape(advice)}[/yellow]")
