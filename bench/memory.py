"""The most memory that a head needs beyond its inputs and outputs, seen from outside: a process of its own.

The child maps every block of 64 KiB or more by itself, so that what is freed leaves the process at once. It runs the
call on a tiny case (which loads code and starts threads; a compiled peer runs on the case itself, to compile), notes
its resident memory, resets the kernel's high-water mark, runs forward and backward once, and subtracts the gradients.
Everything counts: scratch space of libraries, packed weights, the allocator's own overhead. Linux only.
"""

from __future__ import annotations

import ast
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from m4ov_bench import cases, kl_loss, logprob_loss, peers
from m4ov_bench.session import OURS
from m4ov_kernels import linear_cross_entropy

_KIB = 1024
Case = cases.HeadCase | cases.LogprobCase | cases.KlCase
_FIELDS = {
    cases.HeadCase: ("rows", "width", "vocabulary", "labelled", "kept"),
    cases.LogprobCase: ("rows", "width", "vocabulary", "labelled", "entropy"),
    cases.KlCase: ("rows", "width", "vocabulary"),
}


def extra_mib(name: str, case: Case) -> float | None:
    """MiB beyond inputs and outputs of one forward and backward; ``None`` where the system cannot tell.

    Raises:
        RuntimeError: the child failed; carries its last line.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    arguments = [type(case).__name__, *(str(getattr(case, field)) for field in _FIELDS[type(case)])]
    arguments.append(str(case.dtype).removeprefix("torch."))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 * _KIB), "MALLOC_TRIM_THRESHOLD_": str(64 * _KIB)}
    for variable in ("THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES"):  # huge pages would round every block up to 2 MiB
        environment.pop(variable, None)
    command = [sys.executable, "-W", "ignore", "-m", "m4ov_bench.memory", name, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring the memory of {name!r} failed: {last}")
    return float(child.stdout.strip().splitlines()[-1])


def _function(name: str, case: Case) -> Callable[..., Tensor]:
    if isinstance(case, cases.KlCase):
        return partial(kl_loss.ours if name == OURS else kl_loss.eager, case.kind)
    if isinstance(case, cases.LogprobCase):
        return partial(logprob_loss.ours if name == OURS else logprob_loss.eager, case.entropy)
    if name == OURS:
        return partial(linear_cross_entropy, keep_logits_bytes=case.kept)
    function = peers.linear_cross_entropy(case.rows)[name]
    if isinstance(function, peers.Absent):
        raise SystemExit(str(function))
    return function


def _others(case: Case) -> tuple[Tensor, ...]:
    """What comes after hidden states and weight: targets, or a reference's."""
    if isinstance(case, cases.KlCase):
        return torch.randn(case.rows, case.width).to(case.dtype), torch.randn(case.vocabulary, case.width).to(
            case.dtype
        )
    return (cases.targets(case),)


def _measure(name: str, case: Case) -> float:
    function = _function(name, case)

    def run(case: Case) -> tuple[Tensor, ...]:
        input = torch.randn(case.rows, case.width).to(case.dtype).requires_grad_()
        weight = torch.zeros(case.vocabulary, case.width, dtype=case.dtype).uniform_(-0.05, 0.05).requires_grad_()
        others = _others(case)
        gc.collect()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _resident("VmRSS")
        loss = function(input, weight, *others)
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
    peer, kind, *given, dtype_name = sys.argv[1:]
    made = getattr(cases, kind)
    values = dict(zip(_FIELDS[made], map(ast.literal_eval, given), strict=True))
    print(_measure(peer, made(**values, dtype=getattr(torch, dtype_name))))
