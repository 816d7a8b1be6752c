"""What ``qk_norm_mrope`` and ``vision_rope`` share: calls of the compiled kernels of ``csrc/rope``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.layout import DTYPES, as_heads, output, spacing
from m4ov_kernels.rope.frequencies import Tables

# Tokens are summed in order within a block, then blocks in order. Enough blocks for many cores, few enough that the
# partial sums stay small beside the tensors; a function of the number of tokens only.
_BLOCK_TOKENS, _MAX_BLOCKS = 32, 64

Pair = tuple[Tensor, Tensor]
Maybe = tuple[Tensor | None, Tensor | None]


class Angles(NamedTuple):
    """Arguments of the kernels: addresses, sizes, and the tensors that must outlive the call."""

    addresses: tuple[int, int, int, int]
    sizes: tuple[int, int, int, int, int, int, int]
    alive: tuple[Tensor, ...]


def from_positions(positions: Tensor, axes: int, tables: Tables, numerics: str) -> Angles:
    """``positions``: int32 or int64 ``[axes, ...]``, or ``[...]`` for one axis."""
    stacked = positions if axes > 1 else positions[None]
    step = spacing(stacked.shape[1:], stacked.stride()[1:], 0)
    if step is None:
        stacked = stacked.contiguous()
        step = 1
    inv_freq, axis = _frequencies(tables, numerics)
    wide, single = stacked.dtype is torch.int64, numerics != "fp32"
    addresses = (stacked.data_ptr(), 0, inv_freq.data_ptr(), axis.data_ptr())
    return Angles(addresses, (stacked.stride(0), step, 0, 1, axes, wide, single), (stacked, inv_freq, axis))


def from_grid(grid: Tensor, merge_size: int, tables: Tables, numerics: str) -> Angles:
    """``grid``: int64 ``[n, 3]``, contiguous, checked."""
    inv_freq, axis = _frequencies(tables, numerics)
    addresses = (0, grid.data_ptr(), inv_freq.data_ptr(), axis.data_ptr())
    sizes = (0, 0, grid.shape[0], merge_size, 2, True, numerics != "fp32")
    return Angles(addresses, sizes, (grid, inv_freq, axis))


def _frequencies(tables: Tables, numerics: str) -> tuple[Tensor, Tensor]:
    return tables.double if numerics == "fp32" else tables.widened, tables.axis


def forward(
    inputs: Pair, weights: Maybe, angles: Angles, half: int, eps: float, rounding: int, out: Pair | None
) -> Pair:
    """``rounding``: one of ``NUMERICS``' codes, as the kernel rounds."""
    q = inputs[0]
    results = tuple(output(out[i] if out else None, x.shape, x, x.dtype) for i, x in enumerate(inputs))
    kept = [as_heads(x) for x in inputs]
    scales = [None if weight is None else weight.contiguous() for weight in weights]
    tensors = [(r.data_ptr(), x[0].data_ptr(), _address(w)) for r, x, w in zip(results, kept, scales, strict=True)]
    strides = [(x.shape[-2], *distances) for x, *distances in kept]
    tokens, dim = q.shape[:-2].numel(), q.shape[-1]
    options = (tokens, dim, half, eps, rounding, DTYPES[q.dtype], torch.get_num_threads())
    _C.rope_fwd(angles.addresses, angles.sizes, tensors, strides, *options)
    return results  # type: ignore[return-value]


def backward(
    grads: Pair,
    inputs: Maybe,
    weights: Maybe,
    needs: tuple[bool, bool],
    angles: Angles,
    half: int,
    eps: float,
    out: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(grad_q, grad_k, grad_q_weight, grad_k_weight)``, the latter empty where they are not needed."""
    like = grads[0]
    tokens, dim = like.shape[:-2].numel(), like.shape[-1]
    results = [output(out[i] if out else None, grad.shape, like, like.dtype) for i, grad in enumerate(grads)]
    results += [output(out[2 + i] if out else None, (dim if needs[i] else 0,), like, like.dtype) for i in range(2)]
    partials, blocks = None, tokens
    if any(needs):
        blocks = min(_MAX_BLOCKS, -(-tokens // _BLOCK_TOKENS))
        partials = like.new_empty(blocks * 2 * _C.rope_partial(dim), dtype=torch.float32)
    tensors, strides, alive = [], [], []
    for i, (grad, x, weight) in enumerate(zip(grads, inputs, weights, strict=True)):
        grad, *distances = as_heads(grad)
        value, scale, steps = None, None, [0, 0]
        if weight is not None and x is not None:
            value, *steps = as_heads(x)
            scale = weight.contiguous()
        grad_weight = results[2 + i].data_ptr() if needs[i] else 0
        tensors.append((results[i].data_ptr(), grad_weight, grad.data_ptr(), _address(value), _address(scale)))
        strides.append((grad.shape[-2], *distances, *steps))
        alive += [grad, value, scale]
    options = (_address(partials), tokens, dim, half, blocks, eps, DTYPES[like.dtype], torch.get_num_threads())
    _C.rope_bwd(angles.addresses, angles.sizes, tensors, strides, *options)
    del alive
    return tuple(results)  # type: ignore[return-value]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
