"""``varlen_attention`` of one query per sequence, bound by reading keys and values: the limit is a sum over as many
bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_bench import cases, gate
from m4ov_bench.peers.attention import decoding as peers
from m4ov_bench.session import Kernel, Subject, implementation_name
from m4ov_kernels import varlen_attention
from m4ov_kernels.attention import VARLEN_ATTENTION, reference


def subject(case: cases.DecodingCase) -> Subject:
    """One case, on PyTorch's default device."""
    implementation = VARLEN_ATTENTION.select(torch.get_default_device(), case.dtype)
    raw = implementation if implementation is not None and implementation.backend == "native" else None
    bounds = torch.arange(case.sequences + 1, dtype=torch.int32)
    bounds_k = bounds * case.keys
    scale = case.dim**-0.5
    options = (bounds, bounds_k, 1, case.keys, True, scale)
    inputs = [_inputs(case) for _ in range(2)]
    others = peers(case.sequences, case.keys)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, bounds, cu_seqlens_k=bounds_k, causal=True)

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.varlen_attention(q, k, v, bounds, bounds_k, True, scale)

    plain, exact = others["SDPA"](*inputs[0]), definition(*(x.double() for x in inputs[0]))  # type: ignore[operator]
    judged = gate.compare("output", ours(*inputs[0]), plain, exact)
    kernels: dict[str, Kernel] = {}
    if raw is not None:
        outs = [(torch.empty_like(q), torch.empty(2, case.heads, case.sequences)) for q, _, _ in inputs]
        out = gate.poisoned(*outs[0])
        raw.fwd(*inputs[0], *options, out=out)
        judged += gate.compare("output (out=)", out[0], plain, exact)
        read = [torch.ones((k.nbytes + v.nbytes) // 4) for _, k, v in inputs]
        work = 4.0 * case.heads * case.dim * case.sequences * case.keys

        def call(index: int) -> Any:
            return raw.fwd(*inputs[index % 2], *options, out=outs[index % 2])

        kernels["forward"] = Kernel(
            call, lambda index: read[index % 2].sum(), "sum over as many bytes", read[0].nbytes, work, "B"
        )
    return Subject(
        family="attention",
        operator="varlen_attention",
        case=str(case),
        implementation=implementation_name(implementation),
        gate=judged,
        ours=ours,
        peers=others,
        inputs=inputs,
        definition=definition,
        kernels=kernels,
    )


def _inputs(case: cases.DecodingCase) -> tuple[Tensor, ...]:
    keys = case.sequences * case.keys
    shapes = ((case.sequences, case.heads), (keys, case.kv_heads), (keys, case.kv_heads))
    return tuple(torch.randn(*shape, case.dim).to(case.dtype) for shape in shapes)
