"""Stage: what this machine is, what its memory and matrix units reach, and whether every operator has a case."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

import m4ov_bench
import m4ov_kernels
from m4ov_bench import machine as host
from m4ov_bench.gpu import device as chip
from m4ov_bench.gpu import timing
from m4ov_bench.gpu.context import Context
from m4ov_bench.gpu.operators import uncovered
from m4ov_bench.gpu.peers import PACKAGES, WITHOUT_COUNTERPART
from m4ov_kernels.dispatch import FUNCTIONS, native_extension

_DISTRIBUTIONS = (
    *("numpy", "triton", "transformers", "liger-kernel", "quack-kernels", "flash-attn", "cut-cross-entropy"),
    *("transformer-engine", "verl", "gemlite"),
)


def run(context: Context) -> None:
    context.part.facts(operators=sorted(FUNCTIONS), versions=_versions(), **_host(), **chip.describe(context.device))
    with context.part.check("what was installed is what runs"):
        roots = {str(Path(module.__file__).resolve().parent.parent) for module in (m4ov_kernels, m4ov_bench)}
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0]
        if path and roots != {str(Path(path).resolve())}:
            raise AssertionError(f"the packages come from {sorted(roots)} and not from {path}")
    with context.part.check("every registered operator has a case"):
        missing = uncovered()
        if missing:
            raise LookupError(
                f"no case in m4ov_bench.gpu.operators for {', '.join(missing)}: an operator that is not checked and "
                "measured on a GPU is not finished; add a module and a line in CASES"
            )
    with context.part.check("limits measured"):
        context.part.facts(limits=limits(context))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    found |= {name: host.version(name) for name in _DISTRIBUTIONS}
    return found | {"nvcc": chip.last_line(["nvcc", "--version"])}


def _host() -> dict[str, Any]:
    extension, reason = native_extension()
    return {
        "host": host.describe("").cpu,
        "system": platform.platform(),
        "cores": host.describe("").cores,
        "native": {"cuda": extension.cuda_targets(), "isa": extension.isa()} if extension else reason,
        "peers importable": [name for name in PACKAGES if importlib.util.find_spec(name)],
        "peers without a counterpart": WITHOUT_COUNTERPART,
        "compute-sanitizer": shutil.which("compute-sanitizer") or "not on the PATH",
    }


def limits(context: Context) -> dict[str, float]:
    """B/s of a copy (read plus written) and FLOP/s of a large matrix product of random values, each the median."""
    device, size, side = context.device, (2**16 if context.tiny else 2**31), (64 if context.tiny else 8192)
    effort = timing.TINY_EFFORT if context.tiny else timing.EFFORT
    source = torch.randn(size // 4, device=device)
    sink = torch.empty_like(source)
    calls = {"copy": lambda _: sink.copy_(source)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        operands = [torch.randn(side, side, device=device).to(dtype) for _ in range(3)]
        calls[name] = lambda _, a=operands: torch.mm(a[0], a[1], out=a[2])
    times = timing.interleaved(device, calls, effort)
    copied = {"copy B/s": 2 * size / times.pop("copy").seconds}
    return copied | {f"{name} mm FLOP/s": 2 * side**3 / taken.seconds for name, taken in times.items()}
