"""The definition of ``qk_norm_mrope``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m4ov_kernels.rope.frequencies import axes, inverse_frequencies


def qk_norm_mrope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    position_ids: Tensor,
    mrope_section: Sequence[int],
    theta: float,
    eps: float,
    interleaved: bool,
    rotary_dim: int,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`m4ov_kernels.rope.qk_norm_mrope`; ``mrope_section`` is empty for positions of one axis."""
    half = rotary_dim // 2
    # [..., half]: the position that each frequency multiplies
    if mrope_section:
        axis = torch.tensor(axes(half, mrope_section, interleaved), device=position_ids.device)
        positions = position_ids.movedim(0, -1).index_select(-1, axis)
    else:
        positions = position_ids.unsqueeze(-1)
    exact = torch.float64 if numerics == "fp32" else torch.float32
    angles = positions.to(exact) * inverse_frequencies(theta, rotary_dim, exact).to(q.device)
    return tuple(  # type: ignore[return-value]
        _rotated(_normed(x, weight, eps, numerics), angles, numerics, x.dtype)
        for x, weight in ((q, q_weight), (k, k_weight))
    )


def _normed(x: Tensor, weight: Tensor | None, eps: float, numerics: str) -> Tensor:
    """Rounded as ``numerics`` says; for ``"fp32"`` not at all."""
    dtype = x.dtype
    compute = torch.promote_types(dtype, torch.float32)
    if weight is not None:
        exact = x.to(compute)
        normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        if numerics == "hf":
            return weight * normed.to(dtype)
        x = normed * weight.to(compute)
    return x.to(compute if numerics == "fp32" else dtype)


def _rotated(x: Tensor, angles: Tensor, numerics: str, dtype: torch.dtype) -> Tensor:
    """``x`` ``[..., H, D]`` by ``angles`` ``[..., half]``, as a result of ``dtype``."""
    width = 2 * angles.shape[-1]
    if numerics == "fp32":
        dtype_of_sine = x.dtype
    else:
        angles, dtype_of_sine = angles.to(torch.promote_types(dtype, torch.float32)), dtype
    halves = (angles.cos(), angles.sin())
    cos, sin = (torch.cat((half, half), -1).unsqueeze(-2).to(dtype_of_sine) for half in halves)
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    turned = (turned * cos) + (torch.cat((-second, first), -1) * sin)
    made = torch.cat((turned, rest), -1) if rest.shape[-1] else turned
    return made.to(dtype) if numerics == "fp32" else made
