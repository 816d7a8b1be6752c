"""Stage: an operator against float64 by the numerics rule, for every backend and dtype, in poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m4ov_bench.gpu import device as chip
from m4ov_bench.gpu.context import Context
from m4ov_bench.gpu.example import Example, Maker, backends, dtypes_of, operator_named, poisoned_memory
from m4ov_bench.gpu.operators import cases_of
from m4ov_bench.gpu.part import NotRun
from m4ov_kernels import backend, check


def run(context: Context) -> None:
    part, device = context.part, context.device
    examples, _ = cases_of(context.operator)
    operator = operator_named(context.operator)
    with part.check("uninitialised memory is full of NaN", operator=context.operator), poisoned_memory():
        for make in (torch.empty, lambda *size, **where: torch.zeros(*size, **where).new_empty(size)):
            if not bool(make(1000, device=device).isnan().all()):
                raise AssertionError("PyTorch handed out memory that was not poisoned: the checks below prove less")
    for short, dtype in dtypes_of(operator).items():
        for name, reason in backends(operator, device, dtype).items():
            about = {"operator": context.operator, "backend": name, "dtype": short}
            if reason:
                with part.check("float64", **about):
                    if name == "triton" and device.type == "cuda":
                        raise AssertionError(reason)
                    raise NotRun(reason)
                continue
            for example in _made_under(name, examples(Maker(device, dtype), context.tiny)):
                with part.check("float64", **about, case=example.title) as found:
                    with backend(name), poisoned_memory():
                        ours = example.run()
                    check()
                    chip.synchronize(device)
                    gate = example.judge(ours)
                    found["error"] = round(max(gate.errors.values()), 4)
                    if not gate.green:
                        raise AssertionError(gate.problem)


def _made_under(name: str, examples: Iterator[Example]) -> Iterator[Example]:
    """One after the other, each made under a backend, which may serve but some of them."""
    while True:
        with backend(name):
            example = next(examples, None)
        if example is None:
            return
        yield example
