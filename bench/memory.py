"""The most memory that a head needs beyond its inputs and outputs, seen from outside: a process of its own.

The child maps every block of 64 KiB or more by itself, so that what is freed leaves the process at once. It runs the
call on a tiny case (which loads code and starts threads; a compiled peer runs on the case itself, to compile), notes
its resident memory, resets the kernel's high-water mark, runs forward and backward once, and subtracts the gradients.
Everything counts: scratch space of libraries, packed weights, the allocator's own overhead. Linux only.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from m4ov_bench import cases, peers
from m4ov_bench.session import OURS
from m4ov_kernels import linear_cross_entropy

_KIB = 1024
_FIELDS = ("rows", "width", "vocabulary", "labelled", "kept")


def extra_mib(name: str, case: cases.HeadCase) -> float | None:
    """MiB beyond inputs and outputs of one forward and backward; ``None`` where the system cannot tell.

    Raises:
        RuntimeError: the child failed; carries its last line.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    arguments = [str(getattr(case, field)) for field in _FIELDS] + [str(case.dtype).removeprefix("torch.")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 * _KIB), "MALLOC_TRIM_THRESHOLD_": str(64 * _KIB)}
    for variable in ("THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES"):  # huge pages would round every block up to 2 MiB
        environment.pop(variable, None)
    command = [sys.executable, "-W", "ignore", "-m", "m4ov_bench.memory", name, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring the memory of {name!r} failed: {last}")
    return float(child.stdout.strip().splitlines()[-1])


def _measure(name: str, case: cases.HeadCase) -> float:
    if name == OURS:
        function = partial(linear_cross_entropy, keep_logits_bytes=case.kept)
    else:
        function = peers.linear_cross_entropy(case.rows)[name]
        if isinstance(function, peers.Absent):
            raise SystemExit(str(function))

    def run(case: cases.HeadCase) -> tuple[Tensor, ...]:
        input = torch.randn(case.rows, case.width).to(case.dtype).requires_grad_()
        weight = torch.zeros(case.vocabulary, case.width, dtype=case.dtype).uniform_(-0.05, 0.05).requires_grad_()
        target = cases.targets(case)
        gc.collect()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _resident("VmRSS")
        loss = function(input, weight, target)
        grads = torch.autograd.grad(loss, (input, weight))
        outputs = sum(tensor.numel() * tensor.element_size() for tensor in (loss, *grads))
        extra.append((_resident("VmHWM") - before - outputs) / 2**20)
        return grads

    extra: list[float] = []
    run(case if name == "torch.compile" else replace(case, rows=8, vocabulary=64))
    run(case)
    return extra[-1]


def _resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most since the last reset)."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * _KIB


if __name__ == "__main__":
    *numbers, dtype = sys.argv[2:]
    values = [None if number == "None" else float(number) if "." in number else int(number) for number in numbers]
    print(_measure(sys.argv[1], cases.HeadCase(**dict(zip(_FIELDS, values, strict=True)), dtype=getattr(torch, dtype))))
