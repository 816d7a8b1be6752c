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


FEW_LANES = 8  # rows · query heads of a key head, of a sequence that may have a prefix; as csrc/attention has it


class Prepared:
    """Forwards of many layers over the same sequences, as in a step of decoding: bounds, sizes and memory are looked at
    once. The bits of :func:`varlen_attention_fwd`; no graph is recorded.

    Args:
        bounds: int64 ``[2, N + 1]``, contiguous: of queries and of keys, checked.
        heads, kv_heads, dim: of the tensors that will come.
        causal, scale: see :func:`m4ov_kernels.varlen_attention`.
        prefix: int64 ``[2, N]``, contiguous, or ``None``: of each sequence the first token and the number of keys that
            it sees before its own. They lie anywhere among the keys, sequences may share them, and the bits are those
            of keys that lie one after the other. A sequence that has some has at most :data:`FEW_LANES` lanes.
    """

    def __init__(
        self,
        bounds: Tensor,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        *,
        causal: bool,
        scale: float,
        prefix: Tensor | None = None,
    ) -> None:
        sequences = bounds.shape[1] - 1
        tokens_q, tokens_k = (int(last) for last in bounds[:, -1])
        self._alive = bounds, prefix
        self._normalizer = torch.empty(2, heads, tokens_q, dtype=torch.float32)
        self._shape = (tokens_q, heads, dim)
        q, k = (heads * dim, dim), (kv_heads * dim, dim)
        self._rest = [bounds.data_ptr(), bounds[1].data_ptr(), 0]
        sizes = (sequences, tokens_q, tokens_k, heads, kv_heads, dim)
        self._options = (sizes, (*q, *k, *k), scale, causal, DTYPES[dtype], torch.get_num_threads())
        self._prefix = (0, 0) if prefix is None else (prefix.data_ptr(), prefix[1].data_ptr())
        size = _C.varlen_attention_prefixed_fwd([0, 0, 0, *self._rest], *self._options, 0, 0, *self._prefix)
        self._memory, self._rest[2] = scratch(size)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[T, H, D]``, and keys and values ``[S, KV, D]`` that hold at least those that are asked for, all contiguous
        → ``[T, H, D]``."""
        result = output(None, self._shape, q, q.dtype)
        inputs = [q.data_ptr(), k.data_ptr(), v.data_ptr(), *self._rest]
        addresses = (result.data_ptr(), self._normalizer.data_ptr(), *self._prefix)
        _C.varlen_attention_prefixed_fwd(inputs, *self._options, *addresses)
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
