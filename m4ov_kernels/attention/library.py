"""``varlen_attention`` on a GPU, by kernels of other packages: flash-attn where it is installed, else PyTorch's own
(those of ``torch.nn.attention.varlen``). Both are flash attention, and causal rows align to the end of the keys.

Neither has been run in this repository's history, which had no GPU; see the README.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)


@cache
def chosen() -> str:
    """``"flash-attn"`` or ``"PyTorch"``."""
    return "flash-attn" if importlib.util.find_spec("flash_attn") is not None else "PyTorch"


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve tensors of this device type and dtype; ``None`` if they can."""
    if device_type != "cuda":
        return f"neither flash-attn nor PyTorch's varlen attention runs on {device_type} tensors"
    if dtype not in _DTYPES:
        return f"{chosen()} has varlen attention for bfloat16 and float16 only"
    return None


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
) -> tuple[Tensor, Tensor]:
    """``(output [T, H, D], lse float32 [H, T])``."""
    (q, k, v), width = _padded(q, k, v)
    lengths = (*_bounds(cu_seqlens, cu_seqlens_k), max_seqlen, max_seqlen_k)
    if chosen() == "flash-attn":
        output, lse, *_ = _flash_attn()._flash_attn_varlen_forward(q, k, v, *lengths, 0.0, scale, causal)
    else:
        output, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, scale=scale)
    return output[..., :width].contiguous(), lse


def varlen_attention_bwd(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_q, grad_k, grad_v)``, contiguous."""
    (grad_output, q, k, v, result), width = _padded(grad_output, q, k, v, result)
    lengths = (*_bounds(cu_seqlens, cu_seqlens_k), max_seqlen, max_seqlen_k)
    if chosen() == "flash-attn":
        grads = [torch.empty_like(x) for x in (q, k, v)]
        no_window, no_cap = (-1, -1), 0.0
        _flash_attn()._flash_attn_varlen_backward(
            *(grad_output, q, k, v, result, lse, *grads, *lengths, 0.0, scale, causal, *no_window, no_cap, None, True)
        )
    else:
        random_state, unused = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)
        grads = torch.ops.aten._flash_attention_backward(
            *(grad_output, q, k, v, result, lse, *lengths, 0.0, causal, random_state, unused), scale=scale
        )
    return tuple(grad[..., :width].contiguous() for grad in grads)  # type: ignore[return-value]


@cache
def _flash_attn() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _bounds(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    bounds = cu_seqlens.to(torch.int32)
    return bounds, bounds if cu_seqlens_k is None else cu_seqlens_k.to(torch.int32)


def _padded(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """With a head dimension that is a multiple of 8, as the kernels want it, and the dimension that was."""
    width = tensors[0].shape[-1]
    missing = -width % 8
    if missing:
        return [torch.nn.functional.pad(x, (0, missing)) for x in tensors], width
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors], width
