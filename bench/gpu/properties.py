"""Stage: what a training loop relies on: the same bits twice, no host synchronisation, capture in a CUDA graph,
registration that ``opcheck`` accepts, and ``torch.compile`` of the whole graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from m4ov_bench.gate import poison_of
from m4ov_bench.gpu import device as chip
from m4ov_bench.gpu.context import Context
from m4ov_bench.gpu.example import Example, Maker, backends, dtypes_of, operator_named, recorded
from m4ov_bench.gpu.operators import cases_of
from m4ov_bench.gpu.part import Part
from m4ov_kernels import backend
from m4ov_kernels.dispatch import Operator

_SMALL = 2**22  # elements of an example that opcheck may copy many times


def run(context: Context) -> None:
    device, operator = context.device, operator_named(context.operator)
    make, _ = cases_of(context.operator)
    known = dtypes_of(operator)
    dtype = known.get("bf16" if device.type == "cuda" else "fp32", next(iter(known.values())))
    for name, reason in backends(operator, device, dtype).items():
        if reason:
            continue  # numerics says why
        with backend(name):
            examples = list(make(Maker(device, dtype), context.tiny))
            for example in examples:
                about = {"operator": operator.name, "backend": name, "case": example.title}
                _same_bits_twice(context.part, example, about)
                _no_host_synchronisation(context.part, device, example, about)
            for example in examples[:2]:
                about = {"operator": operator.name, "backend": name, "case": example.title}
                _compiled(context.part, device, example, about)
                _opcheck(context.part, operator, device, dtype, example, about)
            for example in examples:  # last: a failed capture can leave the device unusable
                about = {"operator": operator.name, "backend": name, "case": example.title}
                _captured(context.part, device, example, about)


def _same_bits_twice(part: Part, example: Example, about: dict[str, str]) -> None:
    with part.check("same bits twice", **about):
        first = example.run()
        spoiler = torch.full((2**16,), float("nan"), device=first[0].device)  # other memory is handed out than before
        _assert_equal(example, first, example.run(), "the second run")
        del spoiler


def _no_host_synchronisation(part: Part, device: torch.device, example: Example, about: dict[str, str]) -> None:
    with part.check("no host synchronisation", **about):
        example.run()
        # Interpreted Triton is called by the same host code as on a GPU; compiled C++ may read what the host has.
        dry = chip.reading_values_raises() if about["backend"] == "triton" and device.type == "cpu" else nullcontext()
        with chip.host_synchronisation_raises(device), dry:
            example.run()
        chip.require(device)


def _compiled(part: Part, device: torch.device, example: Example, about: dict[str, str]) -> None:
    with part.check("torch.compile(fullgraph=True)", **about):
        torch.compiler.reset()
        # Inductor would need seconds of a C++ compiler on the CPU; its own tests run it there.
        through = "inductor" if device.type == "cuda" else "aot_eager"
        compiled = torch.compile(example.function, fullgraph=True, backend=through)
        gate = example.judge(Example(**{**vars(example), "function": compiled}).run())
        if not gate.green:
            raise AssertionError(gate.problem)


def _opcheck(
    part: Part, operator: Operator, device: torch.device, dtype: torch.dtype, example: Example, about: dict[str, str]
) -> None:
    if example.elements > _SMALL:
        return
    with recorded(operator, operator.select(device, dtype)) as calls:
        example.run()
    kinds = {"fwd": operator.registered_fwd} | ({"bwd": operator.registered_bwd} if operator.differentiable else {})
    for kind, registered in kinds.items():
        with part.check(f"opcheck {kind}", **about):
            if not calls[kind]:
                raise AssertionError(f"{operator.name} made no raw {kind} call")
            wanted = kind == "fwd" and operator.differentiable
            arguments = tuple(
                value.detach().requires_grad_(wanted and value.is_floating_point())
                if isinstance(value, Tensor)
                else value
                for value in calls[kind][0]
            )
            torch.library.opcheck(registered, arguments)


def _captured(part: Part, device: torch.device, example: Example, about: dict[str, str]) -> None:
    """Capture on some values; replay on others, over poisoned outputs; equal to eager, bit by bit."""
    with part.check("CUDA graph", **about):
        replay, outputs = chip.captured(device, example.run)
        with torch.no_grad():
            for tensor in (*example.inputs, *example.grads):
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn_like(tensor) * tensor.abs().mean() if tensor.numel() else tensor)
            for output in outputs:
                output.fill_(poison_of(output))
        expected = example.run()
        replay()
        chip.synchronize(device)
        _assert_equal(example, outputs, expected, "the replay")
        chip.require(device)


def _assert_equal(example: Example, ours: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for name, one, other in zip(example.names, ours, expected, strict=True):
        different = one.contiguous().view(torch.uint8) != other.contiguous().view(torch.uint8)  # NaNs count too
        if one.shape != other.shape or bool(different.any()):
            first = int(different.flatten().nonzero()[0]) // one.element_size()
            raise AssertionError(f"{what}: {name} {list(one.shape)} has other bits, first in element {first}")
