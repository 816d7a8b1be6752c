"""``qk_norm_mrope`` through the compiled kernels (CPU)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from m4ov_kernels.layout import NUMERICS
from m4ov_kernels.rope.frequencies import tables
from m4ov_kernels.rope.native import rotation


def qk_norm_mrope_fwd(
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
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(q, k)`` normalised and rotated, contiguous; ``mrope_section`` is empty for positions of one axis."""
    angles = _angles(position_ids, mrope_section, theta, interleaved, rotary_dim, numerics)
    return rotation.forward((q, k), (q_weight, k_weight), angles, rotary_dim // 2, eps, NUMERICS[numerics], out)


def qk_norm_mrope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    position_ids: Tensor,
    mrope_section: Sequence[int],
    theta: float,
    eps: float,
    interleaved: bool,
    rotary_dim: int,
    numerics: str,
    need_q_weight: bool,
    need_k_weight: bool,
    *,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(grad_q, grad_k, grad_q_weight, grad_k_weight)``, gradients of the function without its rounding; the latter
    are empty unless needed. ``q`` and ``k`` are looked at where there is a weight."""
    angles = _angles(position_ids, mrope_section, theta, interleaved, rotary_dim, numerics)
    needs = (need_q_weight, need_k_weight)
    return rotation.backward((grad_q, grad_k), (q, k), (q_weight, k_weight), needs, angles, rotary_dim // 2, eps, out)


def _angles(
    position_ids: Tensor, sections: Sequence[int], theta: float, interleaved: bool, rotary_dim: int, numerics: str
) -> rotation.Angles:
    made = tables(theta, rotary_dim, tuple(sections), interleaved, position_ids.device)
    return rotation.from_positions(position_ids, 3 if sections else 1, made, numerics)
