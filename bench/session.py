"""One run, and the way every operator goes through it: gate, then kernels, then calls as users make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import measure
from m4ov_bench.gate import Gate, Truth
from m4ov_bench.peers import Absent, Compiled, Peer
from m4ov_bench.row import Machine, Row
from m4ov_bench.row import Peer as PeerRow
from m4ov_bench.runtimes import Inference
from m4ov_kernels.dispatch import Implementation, native_extension

OURS = "m4ov"
KERNEL = "kernel, preallocated"
_LIMIT = "limit"


@dataclass(frozen=True)
class Session:
    """``quick``: the short run: few cases and rounds, no compiled peers, no memory. ``interleaved``: the timer.
    ``only``: a part of the names of the cases to measure, whether quick or not."""

    machine: Machine
    quick: bool = False
    say: Callable[[str], None] = lambda _: None
    interleaved: Callable[[Mapping[str, measure.Call], measure.Effort], dict[str, measure.Times]] = measure.interleaved
    given_effort: measure.Effort | None = None  # instead of that of a full or a short run
    only: str = ""

    @property
    def effort(self) -> measure.Effort:
        return self.given_effort or (measure.QUICK if self.quick else measure.FULL)

    def wants(self, case: Any) -> bool:
        return self.only in str(case) if self.only else case.quick or not self.quick

    @property
    def compiled(self) -> Compiled:
        return "left out of the short run" if self.quick else True


@dataclass(frozen=True)
class Kernel:
    """A raw call with preallocated outputs, and the limit it is interleaved with.

    ``bytes``, ``flops``: the fewest bytes that must be read and written, and floating-point operations; ``unit``: which
    of them bounds it, ``"B"`` or ``"FLOP"``. ``scale``: how much more work the call has to do than ``limit`` does.
    """

    call: measure.Call
    limit: measure.Call
    limit_name: str
    bytes: float
    flops: float
    unit: str
    scale: float = 1.0


def memory_bound(
    call: measure.Call, moved: int, flops: float, copies: Sequence[Sequence[tuple[Tensor, Tensor]]]
) -> Kernel:
    """A kernel that reads and writes ``moved`` bytes: its limit is a copy of as many.

    How fast memory is depends on where the system has put it, so the copy goes through the kernel's own buffers:
    ``copies`` holds, for every set of inputs, pairs of an input and an output. Its time is scaled to ``moved``.
    """
    count = len(copies)

    def copy(index: int) -> None:
        for source, sink in copies[index % count]:
            sink.copy_(source)

    copied = sum(2 * source.numel() * source.element_size() for source, _ in copies[0])
    return Kernel(call, copy, "copy of as many bytes", moved, flops, "B", moved / copied)


@dataclass(frozen=True)
class Claim:
    """Other numerics than the operator's, by which a peer is judged: in words, and its ``definition`` by them."""

    words: str
    definition: Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """An operator in one case.

    ``kernels``: by what they do ("forward", "backward", …). ``ours`` and the peers take one of ``inputs`` (sets that
    rotate) and return a tensor or several; ``grads``: for every set, what is handed to their backward (``None``: the
    outputs are scalar losses). ``definition``: the same in plain PyTorch, for judging peers; ``claims``: by a peer's
    name, where it is judged by another. ``memory``: a peer's name → MiB beyond inputs and outputs.
    """

    family: str
    operator: str
    case: str
    implementation: str
    gate: Gate
    ours: Callable[..., Any]
    peers: Mapping[str, Peer]
    inputs: Sequence[tuple[Tensor, ...]]
    grads: Sequence[tuple[Tensor, ...]] | None = None
    definition: Callable[..., Any] | None = None
    claims: Mapping[str, Claim] = field(default_factory=dict)
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    memory: Mapping[str, float | None] = field(default_factory=dict)


def rows(session: Session, subject: Subject) -> Iterator[Row]:
    """All rows of a subject; a red gate gives one row without a speed, and nothing is timed."""
    if not subject.gate.green:
        yield row(session, subject, "not measured")
        return
    for what, kernel in subject.kernels.items():
        session.say(f"{subject.operator} {subject.case}: {what}, kernel")
        times = session.interleaved({OURS: kernel.call, _LIMIT: kernel.limit}, session.effort)
        ours, limit = times[OURS], times[_LIMIT]
        yield row(
            session,
            subject,
            f"{what}, kernel",
            **timing(ours),
            rate=(kernel.bytes if kernel.unit == "B" else kernel.flops) / ours.seconds,
            unit=kernel.unit,
            bytes=kernel.bytes,
            flops=kernel.flops,
            limit=kernel.limit_name,
            limit_seconds=limit.seconds * kernel.scale,
            fraction=limit.ratio_to(ours) * kernel.scale,
        )
    present = [name for name, peer in subject.peers.items() if not isinstance(peer, Absent)]
    truths = _truths(session, subject, present)
    differentiable = any(tensor.requires_grad for tensor in subject.inputs[0])
    for what, backward in (("forward", False), ("forward + backward", True))[: 1 + differentiable]:
        session.say(f"{subject.operator} {subject.case}: {what}, as called")
        yield _called(session, subject, what, backward, truths)


def _truths(session: Session, subject: Subject, names: Sequence[str]) -> dict[str, Truth]:
    """By which each of these peers is judged; none without a definition."""
    made: dict[Any, Truth] = {}
    truths = {}
    for name in names:
        definition = subject.claims[name].definition if name in subject.claims else subject.definition
        if definition is not None:
            session.say(f"{subject.operator} {subject.case}: float64, for {name}")
            if definition not in made:
                made[definition] = Truth(definition, subject.inputs[0], subject.grads and subject.grads[0])
            truths[name] = made[definition]
    return truths


def _called(session: Session, subject: Subject, what: str, backward: bool, truths: Mapping[str, Truth]) -> Row:
    calls = {OURS: as_called(subject, subject.ours, backward)}
    absent, errors = {}, {}
    for name, peer in subject.peers.items():
        if isinstance(peer, Absent):
            absent[name] = str(peer)
        elif backward and isinstance(peer, Inference):
            absent[name] = "forward only"
        else:
            call = as_called(subject, peer, backward)
            try:
                call(0)
                if name in truths:
                    errors[name] = max(truths[name].judge(peer, backward).errors.values())
            except Exception as error:  # a peer that fails is a row that says so; ours never comes here
                absent[name] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            else:
                calls[name] = call
    kernel = _joined(subject.kernels, what)
    if kernel is not None:
        calls[KERNEL] = kernel
    times = session.interleaved(calls, session.effort)
    ours = times.pop(OURS)
    memory = subject.memory if backward else {}
    peers = {}
    for name, taken in times.items():
        error = errors.get(name)
        believed = error is None or error <= 1
        ratio = taken.ratio_to(ours) if believed else None
        claim = subject.claims[name].words if name in subject.claims else ""
        peers[name] = PeerRow(taken.seconds, ratio, memory.get(name), error=error, claim=claim)
    peers |= {name: PeerRow(absent=reason, memory_mib=memory.get(name)) for name, reason in absent.items()}
    return row(session, subject, f"{what}, as called", **timing(ours), memory_mib=memory.get(OURS), peers=peers)


def as_called(subject: Subject, function: Callable[..., Any], backward: bool) -> measure.Call:
    """One of ours or a peer's calls as a user makes it: fresh outputs, through autograd when ``backward``."""
    inputs, grads = subject.inputs, subject.grads

    def forward_only(index: int) -> Any:
        with torch.no_grad():
            return function(*inputs[index % len(inputs)])

    def forward_backward(index: int) -> Any:
        tensors = inputs[index % len(inputs)]
        outputs = function(*tensors)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        given = None if grads is None else grads[index % len(grads)]
        return torch.autograd.grad(outputs, wanted, given)

    return forward_backward if backward else forward_only


def _joined(kernels: Mapping[str, Kernel], what: str) -> measure.Call | None:
    """The kernels that do the work of one kind of call, one after the other."""
    if what in kernels:
        return kernels[what].call
    parts = [kernels.get(part) for part in what.split(" + ")]
    if None in parts:
        return None
    calls = [part.call for part in parts if part is not None]

    def joined(index: int) -> None:
        for call in calls:
            call(index)

    return joined


def timing(times: measure.Times) -> dict[str, Any]:
    return {"seconds": times.seconds, "faults": times.faults, "disturbed": times.disturbed}


def row(session: Session, subject: Subject, what: str, **measured: Any) -> Row:
    return Row(
        family=subject.family,
        operator=subject.operator,
        case=subject.case,
        what=what,
        implementation=subject.implementation,
        machine=session.machine,
        green=subject.gate.green,
        errors=dict(subject.gate.errors),
        problem=subject.gate.problem,
        **measured,
    )


def implementation_name(implementation: Implementation | None) -> str:
    if implementation is None:
        return "reference"
    if implementation.backend == "native":
        return f"native {native_extension()[0].isa()}"
    return implementation.backend
