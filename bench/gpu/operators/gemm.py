"""The linears of quantised weights for the GPU suite. Few rows are bound by the weight's bytes: the limit is a copy of
as many; many by arithmetic, whose limit is a product of eight-bit floats by the vendor's library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench import gate
from m4ov_bench.gpu import device as chip
from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.peers import Peer
from m4ov_bench.session import Kernel, Session, Subject, implementation_name, memory_bound
from m4ov_kernels import fp8_linear, int4_linear, int8_linear
from m4ov_kernels.gemm import QUANTIZED_LINEAR, reference
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

Weight = Int4Weight | Int8Weight | Fp8Weight
_L2 = 128 << 20  # bytes of weights among which calls rotate, more than a cache holds


@dataclass(frozen=True)
class Case:
    """M, K and N of one call; ``form``: the group of int4, or the granularity of fp8."""

    kind: str
    rows: int
    width: int
    columns: int
    activation: str
    form: int | str = ""
    epilogue: str | None = None
    bias: bool = False
    residual: bool = False
    layout: str = "contiguous"
    grad: bool = False

    def __str__(self) -> str:
        parts = [f"M {self.rows}, K {self.width}, N {self.columns}", str(self.form), f"{self.activation} activations"]
        parts += [self.epilogue or "", "bias" * self.bias, "residual" * self.residual]
        return ", ".join(part for part in (*parts, self.layout if self.layout != "contiguous" else "") if part)


# The first two of a kind are small, typical and differentiated.
EXAMPLES = (
    Case("int4", 5, 512, 384, "bf16", 128, bias=True, grad=True),
    Case("int4", 100, 512, 384, "fp8", 64, grad=True),
    Case("int4", 16, 4096, 1536, "bf16", 128, bias=True, residual=True),
    Case("int4", 33, 1152, 4304, "bf16", 32, "gelu_tanh", bias=True),
    Case("int4", 1, 4096, 2048, "bf16", -1, layout="offset"),
    Case("int4", 300, 1000, 600, "bf16", 128, "swiglu", layout="wide rows"),
    Case("int4", 300, 1000, 600, "int8", 128, bias=True),
    Case("int4", 512, 4096, 3072, "fp8", 128, "swiglu"),
    Case("int4", 0, 64, 64, "bf16", 32),
    Case("int8", 5, 512, 384, "int8", bias=True, grad=True),
    Case("int8", 100, 512, 384, "int8", residual=True, grad=True),
    Case("int8", 16, 4096, 1536, "int8", residual=True),
    Case("int8", 300, 1152, 4304, "int8", "", "gelu_tanh", bias=True),
    Case("int8", 300, 3420, 1280, "int8", bias=True, residual=True, layout="transposed"),
    Case("int8", 257, 131, 70, "int8", "", "swiglu"),
    Case("fp8", 5, 512, 384, "fp8", "block", bias=True, grad=True),
    Case("fp8", 100, 512, 384, "fp8", "channel", grad=True),
    Case("fp8", 512, 4096, 3072, "fp8", "block", bias=True, residual=True),
    Case("fp8", 512, 4096, 3000, "fp8", "block", "swiglu"),
    Case("fp8", 16, 4096, 1536, "fp8", "tensor", residual=True),
    Case("fp8", 300, 1152, 4304, "fp8", "channel", "gelu_tanh", bias=True),
    Case("fp8", 300, 3420, 1280, "fp8", "channel", bias=True, layout="offset"),
    Case("fp8", 257, 131, 70, "fp8", "block", "gelu"),
    Case("fp8", 300, 1000, 640, "bf16", "block"),
)
TINY_EXAMPLES = (
    Case("int4", 3, 64, 40, "bf16", 32, bias=True, grad=True),
    Case("int4", 5, 33, 24, "fp8", -1, grad=True),
    Case("int4", 2, 70, 24, "int8", 64, "swiglu"),
    Case("int4", 0, 64, 16, "bf16", 32),
    Case("int8", 3, 64, 40, "int8", bias=True, grad=True),
    Case("int8", 5, 33, 24, "int8", residual=True, grad=True),
    Case("fp8", 3, 160, 40, "fp8", "block", bias=True, grad=True),
    Case("fp8", 5, 33, 24, "fp8", "channel", grad=True),
    Case("fp8", 2, 70, 24, "bf16", "block", "gelu_tanh", bias=True),
)
SPEED = (
    Case("int4", 1, 4096, 12288, "bf16", 128),
    Case("int4", 8, 4096, 12288, "bf16", 128),
    Case("int4", 16, 4096, 12288, "bf16", 128),
    Case("int4", 16, 12288, 4096, "bf16", 128),
    Case("int4", 64, 4096, 12288, "bf16", 128),
    Case("int4", 4096, 4096, 12288, "fp8", 128),
    Case("int8", 4096, 4096, 12288, "int8"),
    Case("int8", 16384, 1152, 4304, "int8"),
    Case("fp8", 4096, 16384, 7168, "fp8", "block"),
    Case("fp8", 64, 16384, 7168, "fp8", "block"),
    Case("fp8", 4096, 4096, 24576, "fp8", "block", "swiglu"),
    Case("fp8", 16384, 1152, 4304, "fp8", "channel"),
    Case("fp8", 16384, 3420, 1280, "fp8", "channel"),
)
TINY_SPEED = (
    Case("int4", 3, 64, 40, "bf16", 32),
    Case("int8", 70, 64, 40, "int8"),
    Case("fp8", 70, 160, 40, "fp8", "block"),
)


def of_kind(kind: str) -> tuple[Callable[..., Iterator[Example]], Callable[..., Iterator[Subject]]]:
    """``examples`` and ``subjects`` of one of the three functions."""

    def examples(maker: Maker, tiny: bool) -> Iterator[Example]:
        yield from (_example(maker, case) for case in (TINY_EXAMPLES if tiny else EXAMPLES) if case.kind == kind)

    def subjects(session: Session, device: torch.device, tiny: bool) -> Iterator[Subject]:
        dtype = torch.float32 if tiny else torch.bfloat16
        for case in TINY_SPEED if tiny else SPEED:
            if case.kind == kind:
                yield _subject(Maker(device, dtype), case)

    return examples, subjects


def weight_of(maker: Maker, case: Case) -> Weight:
    full = maker.normal((case.columns, case.width), magnitude=case.width**-0.5, grad=False)
    if case.kind == "int4":
        assert isinstance(case.form, int)
        return Int4Weight.quantize(full, group_size=case.form, symmetric=case.bias)
    if case.kind == "int8":
        return Int8Weight.quantize(full)
    assert isinstance(case.form, str)
    return Fp8Weight.quantize(full, granularity=case.form)


def call_of(case: Case, weight: Weight) -> Callable[..., Tensor]:
    """Of the input, and the bias and the residual if the case has them."""

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        bias, residual = _parted(case, rest)
        if isinstance(weight, Int8Weight):
            return int8_linear(x, weight, bias=bias, residual=residual, epilogue=case.epilogue)
        function: Any = int4_linear if isinstance(weight, Int4Weight) else fp8_linear
        options = {"activation": case.activation, "epilogue": case.epilogue}
        return function(x, weight, bias=bias, residual=residual, **options)  # type: ignore[no-any-return]

    return call


def _parted(case: Case, rest: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    return (rest[0] if case.bias else None), (rest[-1] if case.residual else None)


def _example(maker: Maker, case: Case) -> Example:
    weight = weight_of(maker, case)
    made = case.columns // 2 if case.epilogue == "swiglu" else case.columns
    x = maker.normal((case.rows, case.width), case.layout, grad=case.grad)
    rest = [maker.normal((case.columns,), grad=case.grad)] if case.bias else []
    rest += [maker.normal((case.rows, made), case.layout, grad=case.grad)] if case.residual else []

    def definition(x: Tensor, *rest: Tensor) -> Tensor:
        return reference.quantized_linear(x, weight, *_parted(case, rest), case.activation, case.epilogue or "none")

    grad = maker.normal((case.rows, made), grad=False)
    names = ["output"]
    if case.grad:
        names += ["grad_x", *(["grad_bias"] if case.bias else []), *(["grad_residual"] if case.residual else [])]
    terms = _terms(case, weight, x.detach(), *_parted(case, tuple(rest)), grad)
    grads = (grad,) if case.grad else ()
    return Example(str(case), call_of(case, weight), definition, (x, *rest), grads, tuple(names), terms)


@torch.no_grad()
def _terms(
    case: Case, weight: Weight, x: Tensor, bias: Tensor | None, residual: Tensor | None, grad: Tensor
) -> dict[str, Tensor]:
    """What nearly cancels, in float64: the products of a sum (the root of the sum of their squares), the residual."""
    rows, wide = reference.rounded(x.float(), weight, case.activation, torch.float64), weight.dequantize(torch.float64)
    shift = torch.zeros((), device=x.device) if bias is None else bias.double()
    sums = rows @ wide.t() + shift
    sizes = torch.maximum((rows.square() @ wide.t().square()).sqrt() + shift.abs(), sums.abs())
    terms = {}
    if case.epilogue == "swiglu":
        (gate_of, up), (gate_size, up_size) = sums.chunk(2, -1), sizes.chunk(2, -1)
        sizes = 1.1 * gate_size * up.abs() + F.silu(gate_of).abs() * up_size
    elif case.epilogue:
        sizes = 1.13 * sizes
    else:
        terms["grad_x"] = (grad.double().square() @ wide.square()).sqrt()
        terms["grad_bias"] = grad.double().square().sum(0).sqrt()
    return {**terms, "output": sizes if residual is None else sizes + residual.double().abs()}


def _subject(maker: Maker, case: Case) -> Subject:
    device, weight = maker.device, weight_of(maker, case)
    count = max(2, -(-_L2 // weight.nbytes) if device.type == "cuda" else 2)
    state = weight.state_dict()
    weights = [type(weight).from_state_dict({k: v.clone() for k, v in state.items()}) for _ in range(count)]
    calls = [call_of(case, copy) for copy in weights]
    x = [maker.normal((case.rows, case.width), grad=False) for _ in range(2)]
    gated = _example(maker, case)
    dense = [weight.dequantize(maker.dtype) for _ in range(2)]

    def eager(input: Tensor, which: Tensor) -> Tensor:
        return reference_after(case, F.linear(input, dense[int(which) % 2]))

    others: dict[str, Peer] = {"eager, dense weight": eager}
    result = case.columns // 2 if case.epilogue == "swiglu" else case.columns
    flops = 2.0 * case.rows * case.width * case.columns
    moved = weight.nbytes + case.rows * (case.width + result) * maker.dtype.itemsize

    def run(index: int) -> None:
        with torch.no_grad():
            calls[index % count](x[index % 2])

    if case.rows <= 64:
        codes = [next(t for t in copy.state_dict().values() if t.dim() == 2).view(torch.uint8) for copy in weights]
        kernel = memory_bound(run, moved, flops, [[(code, torch.empty_like(code))] for code in codes])
    else:
        name, limit = chip.fastest_product(device, case.rows, case.width, case.columns)
        kernel = Kernel(run, limit, name, moved, flops, "FLOP")
    return Subject(
        family="gemm",
        operator=f"{case.kind}_linear",
        case=str(case),
        implementation=implementation_name(QUANTIZED_LINEAR.select(device, maker.dtype)),
        gate=gated.judge(gated.run()) if gated.inputs[0].numel() else gate.Gate({}),
        ours=lambda input, which: calls[int(which)](input),
        peers=others,
        inputs=[(x[i % 2], torch.tensor(i)) for i in range(count)],
        kernels={"forward": kernel},
    )


def reference_after(case: Case, product: Tensor) -> Tensor:
    if case.epilogue == "swiglu":
        gate_of, up = product.chunk(2, -1)
        return F.silu(gate_of) * up
    if case.epilogue:
        return F.gelu(product, approximate="tanh" if case.epilogue == "gelu_tanh" else "none")
    return product
