"""Attention inside the sequences of a packed batch: ``varlen_attention``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.attention import reference
from m4ov_kernels.dispatch import Operator, invariance_requested

__all__ = ["varlen_attention"]

_OP = "varlen_attention"


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    max_seqlen: int | None = None,
    scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    invariant: bool = False,
) -> Tensor:
    """Softmax attention of each query to the keys of its own sequence; sequences lie one after the other.

    Args:
        q: ``[T, H, D]``, bfloat16, float16, float32 or float64; any strides (a dense last dimension spares a copy).
        k, v: ``[S, KV, D]`` of the same dtype, ``H`` a multiple of ``KV`` (each key head serves ``H / KV`` neighbouring
            query heads). ``S = T`` unless ``cu_seqlens_k`` is given.
        cu_seqlens: ``[N + 1]`` int32 or int64, on the device of ``q``: sequence ``n`` has the rows ``cu_seqlens[n]`` to
            ``cu_seqlens[n + 1]``. Starts at 0, never falls, ends at ``T``. Sequences may be empty.
        causal: whether a query sees no later keys. Where a sequence has more keys than queries, the last query sees all
            of them (decoding); a query that sees no key at all gives zeros.
        max_seqlen: the longest sequence, or an upper bound; only GPU kernels use it. ``None``: ``T``, which launches
            more than is needed.
        scale: of the scores, greater than 0; ``None``: ``1/sqrt(D)``.
        cu_seqlens_k, max_seqlen_k: bounds of the keys, where they are not those of the queries.
        invariant: the bits of an output row must depend on nothing but its query and the keys it sees: not on the other
            rows, so that decoding a row gives the bits that prefilling gave. The compiled CPU kernels always keep this;
            where another implementation would serve, the call raises.

    Returns:
        ``[T, H, D]``, contiguous. Probabilities are computed in float32; for bfloat16 on processors with AVX512-BF16
        they are rounded to bfloat16 before the product with ``v``.

    Saves for backward: ``q``, ``k``, ``v``, the output, and the log of the sum of exponentials, float32 ``[H, T]`` (on
    the CPU its two parts, ``[2, H, T]``). On the CPU the gradients are summed in a fixed order: their bits do not
    depend on the number of threads.

    Invariance: by the compiled CPU kernels a row's output depends on its query and the keys it sees alone: decoding
    with a cache, prefilling in one go or in chunks, alone or packed among others, on any number of threads, in any
    strides: the same bits. The gradients of a sequence depend on that sequence alone. Kernels of other packages, on a
    GPU, promise neither.

    Raises:
        TypeError: a tensor argument is not a dense floating-point tensor, dtypes differ, or bounds are not integers.
        ValueError: a shape, device, ``scale`` or maximum does not fit; bounds whose values are wrong, with the position
            (values are checked on the CPU only; a GPU's are not fetched).
        RuntimeError: ``invariant`` where the compiled CPU kernels do not serve.

    Source: Dao, "FlashAttention-2", arXiv 2307.08691; the interface is that of its ``flash_attn_varlen_func``.
    """
    _check(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, scale)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    max_seqlen = q.shape[0] if max_seqlen is None else max_seqlen
    max_seqlen_k = max_seqlen_k if max_seqlen_k is not None else max_seqlen if cu_seqlens_k is None else k.shape[0]
    implementation = VARLEN_ATTENTION.select(q.device, q.dtype)
    if (invariant or invariance_requested()) and (implementation is None or implementation.backend != "native"):
        raise RuntimeError(
            f"{_OP}: invariant=True is kept by the compiled CPU kernels only; here "
            f"{'reference' if implementation is None else implementation.backend} serves {q.dtype} on {q.device}"
        )
    if implementation is None:
        return reference.varlen_attention(q, k, v, cu_seqlens, cu_seqlens_k, causal, scale)
    arguments = (q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, causal, scale)
    return VARLEN_ATTENTION(implementation, *arguments)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
) -> None:
    checks.float_tensor(_OP, "q", q)
    if q.ndim != 3 or 0 in q.shape[1:]:
        checks.refuse(ValueError, _OP, "q", "[T, H, D] with H and D at least 1", checks.describe(q))
    tokens, heads, dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        checks.float_tensor(_OP, name, tensor)
        if tensor.dtype is not q.dtype:
            checks.refuse(TypeError, _OP, name, f"{q.dtype}, as q", tensor.dtype)
        if tensor.ndim != 3 or tensor.shape[2] != dim or not tensor.shape[1] or heads % tensor.shape[1]:
            expected = f"[S, KV, {dim}] with KV dividing {heads}, the heads of q"
            checks.refuse(ValueError, _OP, name, expected, checks.describe(tensor))
        if tensor.device != q.device:
            checks.refuse(ValueError, _OP, name, f"on {q.device}, as q", f"one on {tensor.device}")
    if v.shape != k.shape:
        checks.refuse(ValueError, _OP, "v", f"{list(k.shape)}, as k", list(v.shape))
    if cu_seqlens_k is None and k.shape[0] != tokens:
        expected = f"of {tokens} tokens, as q, unless cu_seqlens_k is given"
        checks.refuse(ValueError, _OP, "k", expected, k.shape[0])
    for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds is None and name == "cu_seqlens_k":
            continue
        if not isinstance(bounds, Tensor) or bounds.dtype not in (torch.int32, torch.int64):
            checks.refuse(TypeError, _OP, name, "an int32 or int64 tensor", checks.describe(bounds))
        if bounds.ndim != 1 or not bounds.shape[0]:
            checks.refuse(ValueError, _OP, name, "[N + 1]", checks.describe(bounds))
        if bounds.device != q.device:
            checks.refuse(ValueError, _OP, name, f"on {q.device}, as q", f"one on {bounds.device}")
    if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens.shape:
        expected = f"{list(cu_seqlens.shape)}, as cu_seqlens"
        checks.refuse(ValueError, _OP, "cu_seqlens_k", expected, list(cu_seqlens_k.shape))
    for name, maximum in (("max_seqlen", max_seqlen), ("max_seqlen_k", max_seqlen_k)):
        if maximum is None:
            continue
        if isinstance(maximum, bool) or not isinstance(maximum, (int, torch.SymInt)):
            checks.refuse(TypeError, _OP, name, "an int or None", checks.describe(maximum))
        if maximum < 0:
            checks.refuse(ValueError, _OP, name, "0 or greater, or None", repr(maximum))
    if scale is not None and type(scale) is not float:
        checks.number(_OP, "scale", scale)
    if scale is not None and not 0 < scale < math.inf:
        checks.refuse(ValueError, _OP, "scale", "a number greater than 0, or None", repr(scale))


def _fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    parts = (2,) if q.device.type == "cpu" else ()
    return output, q.new_empty((*parts, q.shape[1], q.shape[0]), dtype=torch.float32)


def _bwd_fake(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: Tensor,
    normalizer: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return grad_q, grad_k, grad_v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k)


def _backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    made = bwd(grads[0], *ctx.saved_tensors, *ctx.options)
    return (*(grad if needed else None for grad, needed in zip(made, needs, strict=False)), *(None,) * 6)


VARLEN_ATTENTION = Operator(
    "attention",
    _OP,
    fwd_schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, SymInt max_seqlen,"
    " SymInt max_seqlen_k, bool causal, float scale) -> (Tensor output, Tensor normalizer)",
    bwd_schema="(Tensor grad_output, Tensor q, Tensor k, Tensor v, Tensor result, Tensor normalizer,"
    " Tensor cu_seqlens, Tensor? cu_seqlens_k, SymInt max_seqlen, SymInt max_seqlen_k, bool causal, float scale)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    results=lambda *_: 1,
    setup_context=_setup_context,
    backward=_backward,
    backends=("native", "library"),
)
