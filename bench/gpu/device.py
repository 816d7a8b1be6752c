"""The lines that only a chip can run, each in one small function; on the CPU they do nothing, or what comes nearest.

What a dry run cannot execute stands here, behind ``device.type``. In other files of this package the device's type only
chooses a size, a dtype, a compiler or the command that is run.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m4ov_bench.gpu.part import NO_DEVICE, NotRun

_aten = torch.ops.aten
_READING = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.is_nonzero}
_READING |= {_aten.unique_consecutive, _aten._unique2, _aten.bincount}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_SLEEP_CYCLES = 2_000_000_000  # per second, at most: what torch.cuda._sleep counts


def require(device: torch.device) -> None:
    """Raises :class:`NotRun` where there is no CUDA device: what follows proves nothing without one."""
    if device.type != "cuda":
        raise NotRun(NO_DEVICE)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def host_synchronisation_raises(device: torch.device) -> Iterator[None]:
    """Inside, an operation of PyTorch that makes the host wait for the device raises ``RuntimeError``."""
    with _sync_debug_mode(device, "error"):
        yield


class _NoReads(TorchDispatchMode):
    """Raises where the host reads a tensor's values, which on a device would make it wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.overloadpacket in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks or func.overloadpacket in _READING:
            raise RuntimeError(f"{func} would make the host wait for the device")
        return func(*args, **(kwargs or {}))


def reading_values_raises() -> TorchDispatchMode:
    """A context for the CPU, where nothing synchronises: the same rule, as far as PyTorch's operators show it."""
    return _NoReads()


@contextmanager
def host_synchronisation_warns(device: torch.device) -> Iterator[None]:
    """Inside, such an operation warns ("called a synchronizing CUDA operation") each time."""
    with _sync_debug_mode(device, "warn"):
        yield


@contextmanager
def _sync_debug_mode(device: torch.device, mode: str) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)


def captured(device: torch.device, call: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """``call`` as a CUDA graph: what replays it, and its outputs, which each replay writes anew.

    ``call`` must read and write the same tensors each time. Warm-up on a side stream and capture as PyTorch's notes on
    CUDA graphs have it. On the CPU the "replay" calls again and copies into the first outputs.
    """
    if device.type != "cuda":
        outputs = call()

        def again() -> None:
            for output, value in zip(outputs, call(), strict=True):
                output.copy_(value)

        return again, outputs
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, chooses algorithms, allocates workspaces
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


def extra_mib(device: torch.device, call: Callable[[int], Any]) -> float | None:
    """MiB that a call needs at its peak beyond what was allocated before and what it returns; ``None`` on the CPU."""
    call(0)
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    returned = call(0)
    torch.cuda.synchronize(device)
    tensors = [returned] if isinstance(returned, Tensor) else list(returned or ())
    outputs = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return (torch.cuda.max_memory_allocated(device) - before - outputs) / 2**20


def peak_mib(device: torch.device, call: Callable[[], object]) -> float | None:
    """MiB allocated on the device at the peak of a call, everything counted; ``None`` on the CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def seconds_to_queue(device: torch.device, call: Callable[[], object]) -> float:
    """What the host needs to queue a call on an idle device; 0 on the CPU, where nothing is queued."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    call()
    seconds = time.perf_counter() - begun
    torch.cuda.synchronize(device)
    return seconds


def seconds_of(device: torch.device, call: Callable[[], object], lead: float = 0.0) -> float:
    """Seconds from the first to the last work of a call on the device, by events; on the CPU by the host's clock.

    ``lead``: seconds for which the device is held before, so that the host can queue ahead.
    """
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if lead:
        torch.cuda._sleep(int(lead * _SLEEP_CYCLES))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def fastest_product(device: torch.device, rows: int, width: int, columns: int) -> tuple[str, Callable[[int], Any]]:
    """What a product of eight-bit operands is measured against: the vendor library's of e4m3 with one scale each, or,
    where a chip has none and on the CPU, its bfloat16 product."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        left, right = (torch.randn(n, width, device=device).to(torch.bfloat16) for n in (rows, columns))
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return "torch.mm of bf16", lambda _: torch.mm(left, right.t(), out=out)
    # Its widths are multiples of 16.
    width, columns = (-(-size // 16) * 16 for size in (width, columns))
    left, right = (torch.randn(n, width, device=device).to(torch.float8_e4m3fn) for n in (rows, columns))
    one = torch.ones((), device=device)
    return "torch._scaled_mm of e4m3, one scale", lambda _: torch._scaled_mm(
        left, right.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def memory_bytes(device: torch.device) -> float:
    """Of the device; on the CPU unlimited."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def describe(device: torch.device) -> dict[str, Any]:
    """Name, driver and size of the chip."""
    if device.type != "cuda":
        return {"gpu": "none: a dry run on the CPU"}
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", f"--id={device.index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": properties.name,
        "driver": last_line(query),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "L2 MiB": round(properties.L2_cache_size / 2**20, 1),
    }


def last_line(command: list[str]) -> str:
    """The end of what a command prints, or why there is none."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not on the PATH"
    lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return lines[-1].strip() if lines else "no answer"
