"""Stage: an operator's speed on every backend: against its limit, and as called against its peers. Gate first."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from m4ov_bench import machine, measure
from m4ov_bench.gpu import timing
from m4ov_bench.gpu.context import Context
from m4ov_bench.gpu.example import Example, Maker, backends, dtypes_of, operator_named
from m4ov_bench.gpu.machine import limits as device_limits
from m4ov_bench.gpu.operators import cases_of
from m4ov_bench.gpu.part import Part
from m4ov_bench.row import Row
from m4ov_bench.session import Session, rows
from m4ov_kernels import backend


def run(context: Context) -> None:
    part, device, operator = context.part, context.device, operator_named(context.operator)
    effort = timing.TINY_EFFORT if context.tiny else timing.EFFORT
    described = machine.describe("")
    if operator.family == "moe":  # the only one whose limit is a sum of products and bytes
        described = replace(described, limits=device_limits(context))
    session = Session(described, interleaved=timing.timer(device), given_effort=effort)
    _, subjects = cases_of(context.operator)
    known = dtypes_of(operator)
    dtype = known.get("fp32" if context.tiny else "bf16", next(iter(known.values())))
    found = [name for name, reason in backends(operator, device, dtype).items() if not reason]
    for index, name in enumerate(found):
        with backend(name):
            for subject in subjects(session, device, context.tiny):
                about = {"operator": operator.name, "backend": name, "case": subject.case}
                with part.check("gate before speed", **about):
                    if not subject.gate.green:
                        raise AssertionError(subject.gate.problem)
                    measured = replace(subject, peers={}) if index else subject  # peers once
                    for row in rows(session, measured):
                        part.row(**figures(row, f"{name} ({device.type})"))
    with part.check("overhead of a call", operator=operator.name):
        _overhead(part, context, found)


def figures(row: Row, implementation: str) -> dict[str, Any]:
    """A row without what every row of the run shares."""
    made = asdict(replace(row, implementation=implementation, what=row.what.replace(", kernel", ", against its limit")))
    for name in ("machine", "faults", "disturbed"):
        del made[name]
    return made


def _overhead(part: Part, context: Context, found: list[str]) -> None:
    """Host microseconds of a small call, without and with gradients, and of the peers that PyTorch itself has."""
    make, _ = cases_of(context.operator)
    maker = Maker(context.device, torch.float32)
    example = next(iter(make(maker, True)))
    effort = measure.Effort(seconds=0.02 if context.tiny else 0.3, each=0.01, fewest=3, most=9)
    calls = {}
    for name in found:
        with backend(name):
            if next(iter(make(maker, True)), None) is None:
                continue  # it serves another function of the operator
            example.run()
        calls[name] = lambda n=name: _under(n, example)
    calls["reference"] = lambda: _under("reference", example)
    with torch.no_grad():
        times = measure.microseconds(calls, effort)
    part.row(
        family="overhead",
        operator=context.operator,
        case=example.title,
        what="host time of a small call, no gradients",
        green=True,
        seconds_of={name: taken.seconds for name, taken in times.items()},
    )


def _under(name: str, example: Example) -> None:
    with backend(name):
        example.function(*example.inputs)
