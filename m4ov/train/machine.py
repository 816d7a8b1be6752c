"""What a run costs its machine, and what the machine could do: memory, and the rate of a large matrix product."""

from __future__ import annotations

import time
from pathlib import Path

import torch

# Dense bfloat16 rates of data sheets, FLOP/s: A100, H100 SXM / H200, B200.
_DECLARED = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops(dtype: torch.dtype, declared_tflops: float = 0.0) -> tuple[float, str]:
    """The rate that a model's FLOPs are held against, of this process: FLOP/s, and where the number is from.

    ``declared_tflops`` if it is given; a GPU's data sheet for bfloat16; else measured: the best of a few products of
    square matrices, on the threads that the process has. Ranks that share a machine should measure at the same time.
    """
    if declared_tflops:
        return declared_tflops * 1e12, "declared"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        for model, rate in _DECLARED.items():
            if model in name:
                return rate, f"data sheet of {model}"
    size = 8192 if device == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # what a training draws must not depend on this
    one, other = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first sets up
        began = time.perf_counter()
        torch.mm(one, other)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best, "measured"


def reset_peak_mib() -> float | None:
    """Forget the peak of this process's resident memory; what it holds now, MiB. ``None``: not on this system."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_mib("VmRSS")


def peak_mib() -> float | None:
    """The most memory, MiB: allocated by PyTorch on the GPU if there is one, else resident since
    :func:`reset_peak_mib`."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status_mib("VmHWM")


def _status_mib(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name)]
    return int(found[0]) / 1024 if found else None
