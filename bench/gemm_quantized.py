"""``int4_linear``, ``int8_linear`` and ``fp8_linear`` on one core, and a few rows on two.

Many rows are bound by arithmetic: the limit is the dot products of the instruction set in registers alone, by turns
with the kernel; one row is bound by the weight, which a loop then only reads. A call takes the next of several copies
of the weight, because one may lie in the last cache.

Ours is judged twice: against float64 of the input as the operator rounds it, and of the input as it is. A peer is
judged by the second, where what is allowed is twice the error of plain PyTorch with the rounding that the peer claims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench import cases, gate, measure, peers
from m4ov_bench.peers.gemm import EAGER, ROUNDS_TO
from m4ov_bench.row import Row
from m4ov_bench.session import Claim, Kernel, Session, Subject, implementation_name, rows
from m4ov_kernels import fp8_linear, int4_linear, int8_linear
from m4ov_kernels.dispatch import Implementation, native_extension
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

CPU = torch.device("cpu")
_EFFORT = measure.Effort(seconds=2.0, each=0.8, fewest=5, most=40)
_INPUTS = 3
_LOOP = 2e8  # operations that the limit makes: half a millisecond
_UNROUNDED = "output, of the input as it is"
Weight = Int4Weight | Int8Weight | Fp8Weight


def benchmark(session: Session) -> Iterator[Row]:
    cores = session.machine.cores
    layers = Layers(session.quick)
    if session.given_effort is None and not session.quick:
        session = replace(session, given_effort=_EFFORT)
    for case in cases.QUANTIZED:
        if session.wants(case) and case.threads <= cores:
            layers.of(case)  # made with all threads
            with threads(case.threads):
                yield from rows(session, subject(case, layers))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Layer:
    """A quantised weight, what it stands for, its copies and its packed peers, which take longer to make than to
    measure: kept from case to case."""

    def __init__(self, case: cases.QuantizedCase, quick: bool) -> None:
        full = (torch.randn(case.columns, case.width) * case.width**-0.5).to(torch.bfloat16)
        self.weight: Weight
        self._others: Any
        if case.kind == "int4":
            self.weight, self._others = Int4Weight.quantize(full, group_size=case.group), peers.int4_linear
        elif case.kind == "int8":
            self.weight, self._others = Int8Weight.quantize(full), peers.int8_linear
        else:
            self.weight, self._others = Fp8Weight.quantize(full), peers.fp8_linear
        self.exact, self.plain = self.weight.dequantize(torch.float64), self.weight.dequantize(torch.bfloat16)
        self._quick = quick
        self._copies: list[Weight] = []
        self._peers: tuple[Any, dict[str, peers.Peer]] = (None, {})

    def copies(self, count: int) -> list[Weight]:
        state = self.weight.state_dict()
        while len(self._copies) < count:
            clones = {name: value.clone() for name, value in state.items()}
            self._copies.append(type(self.weight).from_state_dict(clones))
        return self._copies[:count]

    def packed_peers(self, count: int) -> dict[str, peers.Peer]:
        """Of so many copies, for PyTorch's number of threads."""
        key = (count, torch.get_num_threads())
        if self._peers[0] != key:
            self._peers = (None, {})  # the last ones' memory goes first
            self._peers = (key, self._others(self.weight, self.plain, count, not self._quick))
        return self._peers[1]


class Layers:
    """The last layer that was asked for."""

    def __init__(self, quick: bool) -> None:
        self._quick = quick
        self._last: tuple[Any, Layer | None] = (None, None)

    def of(self, case: cases.QuantizedCase) -> Layer:
        key = (case.kind, case.columns, case.width, case.group)
        if self._last[1] is None or self._last[0] != key:
            self._last = (None, None)
            self._last = (key, Layer(case, self._quick))
        assert self._last[1] is not None
        return self._last[1]


def rounded(input: Tensor, activation: str) -> Tensor:
    """float64: the input as an operator with such activations sees it; written out here once more, in plain PyTorch."""
    if activation == "bf16":
        return input.bfloat16().double()
    largest = {"int8": 127.0, "fp8": 448.0}[activation]
    wide = input.float()
    scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(2.0**-126)
    codes = (wide / scale).round() if activation == "int8" else (wide / scale).to(torch.float8_e4m3fn).float()
    return codes.double() * scale.double()


def definition(layer: Layer, activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Exact for a float64 input; else plain PyTorch in bf16, of the input rounded."""

    def defined(input: Tensor, _: Tensor) -> Tensor:
        if input.dtype is torch.float64:
            return input @ layer.exact.t()
        return F.linear(rounded(input, activation).to(input.dtype), layer.plain)

    return defined


def ours(case: cases.QuantizedCase, layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    weights: Any = layer.copies(copies(case))
    if case.kind == "int8":
        return lambda input, which: int8_linear(input, weights[int(which)])
    function: Any = {"int4": int4_linear, "fp8": fp8_linear}[case.kind]
    return lambda input, which: function(input, weights[int(which)], activation=case.activation)


def copies(case: cases.QuantizedCase) -> int:
    """More bytes than a last cache holds."""
    return 7 if case.cold else 3


def subject(case: cases.QuantizedCase, layers: Layers) -> Subject:
    """One case, with PyTorch's number of threads."""
    from m4ov_kernels.gemm import QUANTIZED_LINEAR

    implementation = QUANTIZED_LINEAR.select(CPU, case.dtype)
    layer, count = layers.of(case), copies(case)
    xs = [torch.randn(case.rows, case.width).to(case.dtype) for _ in range(_INPUTS)]
    inputs = [(xs[i % _INPUTS], torch.tensor(i % count)) for i in range(_INPUTS * count)]
    others = {name: peer for name, peer in layer.packed_peers(count).items() if case.cold or _fits(name, case)}
    by = {what: definition(layer, what) for what in ("bf16", "int8", "fp8")}
    claims = {n: Claim(f"{what} activations", by[what]) for n, what in ROUNDS_TO.items() if n in others}
    call = ours(case, layer)
    judged, kernels = check(case, layer, call, xs[0]), {}
    if implementation is not None and implementation.backend == "native":
        panels: list[Any] = [weight.panels() for weight in layer.copies(count)]
        raw = _raw(case, panels, implementation)
        out = gate.poisoned(torch.empty(case.rows, case.columns, dtype=case.dtype))[0]
        raw(xs[0], 0, out)
        judged += _compare("output (out=)", out, case, layer, xs[0])
        kernels = {"forward": _kernel(case, panels, raw, xs)}
    return Subject(
        family="gemm",
        operator=f"{case.kind}_linear",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=judged,
        ours=call,
        peers=others,
        inputs=inputs,
        definition=by["bf16"],
        claims=claims,
        kernels=kernels,
    )


def _fits(name: str, case: cases.QuantizedCase) -> bool:
    """Whether a peer does as much as the case: what rounds its input to int8 is compared with what does so."""
    return case.kind == "fp8" or name == EAGER or ROUNDS_TO.get(name, "bf16") == case.activation


def check(
    case: cases.QuantizedCase, layer: Layer, call: Callable[[Tensor, Tensor], Tensor], input: Tensor
) -> gate.Gate:
    output = call(input, torch.tensor(0))
    plain = definition(layer, case.activation)(input, torch.tensor(0))
    unrounded = gate.compare(_UNROUNDED, output, plain, input.double() @ layer.exact.t())
    return _compare("output", output, case, layer, input) + unrounded


def _compare(name: str, output: Tensor, case: cases.QuantizedCase, layer: Layer, input: Tensor) -> gate.Gate:
    seen = rounded(input, case.activation)
    return gate.compare(name, output, F.linear(seen.to(case.dtype), layer.plain), seen @ layer.exact.t())


Raw = Callable[[Tensor, int, Tensor], Any]  # input, which copy, out


def _raw(case: cases.QuantizedCase, panels: list[Any], implementation: Implementation) -> Raw:
    def call(input: Tensor, which: int, out: Tensor) -> Any:
        p = panels[which]
        tensors = (input, p.codes, p.scales, p.zeros, p.order, p.input_scale, None, None)
        return implementation.fwd(*tensors, p.kind, case.columns, p.group, case.activation, "none", out=out)

    return call


def _kernel(case: cases.QuantizedCase, panels: list[Any], raw: Raw, xs: list[Tensor]) -> Kernel:
    count = len(panels)
    outs = [torch.zeros(case.rows, case.columns, dtype=case.dtype) for _ in range(_INPUTS)]
    operations = 2.0 * case.rows * case.columns * case.width
    read = [[tensor for tensor in (p.codes, p.scales, p.zeros) if tensor is not None] for p in panels]
    stored = sum(tensor.nbytes for tensor in read[0])
    moved = float(stored + xs[0].nbytes + outs[0].nbytes)

    def call(index: int) -> None:
        raw(xs[index % _INPUTS], index % count, outs[index % _INPUTS])

    if case.cold:
        extension, team = native_extension()[0], torch.get_num_threads()

        def only_read(index: int) -> None:
            for tensor in read[index % count]:
                extension.read_bytes(tensor.data_ptr(), tensor.nbytes, team)

        return Kernel(call, only_read, "reading the same bytes", moved, operations, "B", moved / stored)
    kind = "int8" if case.activation == "int8" else "bf16"
    limit, made = measure.dot_products(kind, min(operations, _LOOP))
    unit = "OP" if kind == "int8" else "FLOP"
    return Kernel(call, limit, f"{kind} dot products in registers", moved, operations, unit, operations / made)
