"""``varlen_attention`` through the compiled kernels (CPU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.bounds import check_bounds
from m4ov_kernels.layout import DTYPES, output, scratch


def varlen_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(output [T, H, D], normalizer float32 [2, H, T])``: the largest score before the scale, and the sum of
    exponentials relative to it."""
    result = output(out and out[0], q.shape, q, q.dtype)
    normalizer = output(out and out[1], (2, q.shape[1], q.shape[0]), q, torch.float32)
    arguments, alive = _arguments(q, k, v, cu_seqlens, cu_seqlens_k, causal, scale)
    _run(_C.varlen_attention_fwd, arguments, result.data_ptr(), normalizer.data_ptr())
    del alive
    return result, normalizer


FEW_LANES = 8  # query heads of a key head that decoding takes; as csrc/attention has it


def decode_attention(q: Tensor, k: Tensor, v: Tensor, places: Tensor, *, scale: float) -> Tensor:
    """The forward for single queries, as in a step of decoding, over keys and values that lie anywhere; no graph is
    recorded. The bits of :func:`varlen_attention_fwd` over the same keys one after the other.

    Args:
        q: ``[n, H, D]``.
        k, v: ``[S, KV, D]``, ``H`` at most :data:`FEW_LANES` times ``KV``. All contiguous.
        places: int64 ``[4, n]``, contiguous, checked: of each query the first token and the number of keys of a prefix
            that it sees first (0: none; neighbours that share one read it together), and the same of its own keys, at
            least one.
        scale: of the scores.
    """
    result = output(None, q.shape, q, q.dtype)
    table = places.data_ptr()
    addresses = [*(x.data_ptr() for x in (result, q, k, v)), *(table + 8 * i * q.shape[0] for i in range(4)), 0]
    arguments = ((q.shape[0], q.shape[1], *k.shape[1:]), scale, DTYPES[q.dtype], torch.get_num_threads())
    _memory, addresses[8] = scratch(_C.decode_attention(addresses, *arguments))
    _C.decode_attention(addresses, *arguments)
    return result


def varlen_attention_bwd(
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
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_q, grad_k, grad_v)``, contiguous, from the forward's ``result`` and ``normalizer``."""
    grads = tuple(output(out and out[i], x.shape, x, x.dtype) for i, x in enumerate((q, k, v)))
    grad_output, result, normalizer = _dense(grad_output), result.contiguous(), normalizer.contiguous()
    arguments, alive = _arguments(q, k, v, cu_seqlens, cu_seqlens_k, causal, scale)
    addresses = (*(x.data_ptr() for x in (*grads, grad_output, result, normalizer)),)
    _run(_C.varlen_attention_bwd, arguments, addresses, grad_output.stride(0), grad_output.stride(1))
    del alive
    return grads  # type: ignore[return-value]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, causal: bool, scale: float
) -> tuple[list[Any], tuple[Tensor, ...]]:
    """What both kernels take, and the tensors that must outlive the call."""
    bounds_q = check_bounds("varlen_attention", "cu_seqlens", cu_seqlens, q.shape[0])
    bounds_k = (
        bounds_q if cu_seqlens_k is None else check_bounds("varlen_attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    )
    if len(bounds_k) != len(bounds_q):
        raise ValueError(
            f"varlen_attention: cu_seqlens_k must be of {len(bounds_q) - 1} sequences, as cu_seqlens; "
            f"got {len(bounds_k) - 1}"
        )
    bounds = torch.tensor([bounds_q, bounds_k])
    q, k, v = _dense(q), _dense(k), _dense(v)
    addresses = [x.data_ptr() for x in (q, k, v, bounds)]
    inputs = [*addresses, addresses[3] + 8 * len(bounds_q), 0]
    sizes = (len(bounds_q) - 1, q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2])
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    return [inputs, sizes, strides, scale, causal, DTYPES[q.dtype], torch.get_num_threads()], (q, k, v, bounds)


def _run(kernel: Any, arguments: list[Any], *others: Any) -> None:
    size = kernel(*arguments, *others)  # without scratch memory it only says how much it needs
    _memory, arguments[0][5] = scratch(size)
    kernel(*arguments, *others)
