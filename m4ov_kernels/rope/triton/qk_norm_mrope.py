"""``qk_norm_mrope`` in Triton: launches and declarations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.gpu import SIZES, Build, Config, Work, current_device
from m4ov_kernels.layout import NUMERICS, as_heads, output, spacing
from m4ov_kernels.norm.triton_kernels import _rms_norm_bwd_reduce_kernel
from m4ov_kernels.rope.frequencies import tables
from m4ov_kernels.rope.triton.kernels import _qk_norm_mrope_bwd_kernel, _qk_norm_mrope_fwd_kernel

_MAX_PROGRAMS = 1024  # partial gradients of the weights: enough to fill a large GPU


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
    """``(q, k)`` normalised and rotated; ``out``: contiguous, not overlapping an input."""
    dim = q.shape[-1]
    results = tuple(output(out and out[i], x.shape, x, x.dtype) for i, x in enumerate((q, k)))
    tokens = q.shape[:-2].numel()
    if tokens == 0:
        return results  # type: ignore[return-value]
    operands: list[Any] = []
    for x, weight, result in ((q, q_weight, results[0]), (k, k_weight, results[1])):
        operands += [*as_heads(x), x if weight is None else weight.contiguous(), result, x.shape[-2]]
    angles, axes = _angles(position_ids, mrope_section, theta, interleaved, rotary_dim)
    flags = {"NUMERICS": NUMERICS[numerics], "AXES": axes, **_flags(q_weight, k_weight, dim, rotary_dim)}
    config = configs.get("qk_norm_mrope_fwd", q, dim)
    with current_device(q):
        _qk_norm_mrope_fwd_kernel[(tokens,)](*operands, *angles, dim, rotary_dim // 2, eps, **flags, **config.options())
    return results  # type: ignore[return-value]


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
    grads, needs = (grad_q, grad_k), (need_q_weight, need_k_weight)
    tokens, dim = grad_q.shape[:-2].numel(), grad_q.shape[-1]
    results = [output(out and out[i], grad.shape, grad, grad.dtype) for i, grad in enumerate(grads)]
    results += [output(out and out[2 + i], (dim if needs[i] else 0,), grad_q, grad_q.dtype) for i in range(2)]
    programs = min(tokens, _MAX_PROGRAMS) if any(needs) else tokens
    partials = [
        torch.empty((programs, dim) if needed else (0,), dtype=torch.float32, device=grad_q.device) for needed in needs
    ]
    operands: list[Any] = []
    for i, (grad, x, weight) in enumerate(((grad_q, q, q_weight), (grad_k, k, k_weight))):
        operands += as_heads(grad)
        operands += as_heads(grad if x is None else x)
        operands += [grad if weight is None else weight.contiguous(), results[i], partials[i], grad.shape[-2]]
    angles, axes = _angles(position_ids, mrope_section, theta, interleaved, rotary_dim)
    flags = {"EXACT": numerics == "fp32", "AXES": axes, **_flags(q_weight, k_weight, dim, rotary_dim)}
    flags |= {"NEED_Q_WEIGHT": need_q_weight, "NEED_K_WEIGHT": need_k_weight}
    config = configs.get("qk_norm_mrope_bwd", grad_q, dim)
    with current_device(grad_q):
        if tokens:
            _qk_norm_mrope_bwd_kernel[(programs,)](
                *operands, *angles, tokens, dim, rotary_dim // 2, eps, **flags, **config.options()
            )
        for grad_weight, partial in zip(results[2:], partials, strict=True):
            if grad_weight.numel():
                reduce = configs.get("rms_norm_bwd_reduce", grad_weight)
                grid = (triton.cdiv(dim, reduce.constexprs["BLOCK_D"]),)
                _rms_norm_bwd_reduce_kernel[grid](partial, grad_weight, programs, dim, **reduce.options())
    return tuple(results)  # type: ignore[return-value]


def _angles(
    position_ids: Tensor, sections: Sequence[int], theta: float, interleaved: bool, rotary_dim: int
) -> tuple[tuple[Any, ...], int]:
    axes = 3 if sections else 1
    stacked = position_ids if sections else position_ids[None]
    step = spacing(stacked.shape[1:], stacked.stride()[1:], 0)
    if step is None:
        stacked, step = stacked.contiguous(), 1
    made = tables(theta, rotary_dim, tuple(sections), interleaved, position_ids.device)
    return (stacked, stacked.stride(0), step, made.single, made.exact, made.axis), axes


def _flags(q_weight: Tensor | None, k_weight: Tensor | None, dim: int, rotary_dim: int) -> dict[str, bool]:
    return {
        "HAS_Q_WEIGHT": q_weight is not None,
        "HAS_K_WEIGHT": k_weight is not None,
        "HAS_REST": rotary_dim < dim,
    }


_TOKENS, _Q_HEADS, _K_HEADS = 4096, 32, 8  # of the problems that the cost models state


def _work(dim: int, dtype: str, norm: bool, backward: bool) -> Work:
    """Reads and writes queries and keys (and reads their gradients), and the positions. Of a pair, the rotation is six
    operations; of an element, the norm is four, its gradient ten."""
    count = _TOKENS * (_Q_HEADS + _K_HEADS) * dim
    tensors = (3 if norm else 2) if backward else 2
    operations = 3 + (0 if not norm else 10 if backward else 4)
    moved = tensors * count * SIZES[dtype] + 3 * 8 * _TOKENS
    return Work(f"[{_TOKENS}, {_Q_HEADS} + {_K_HEADS}, {dim}]", moved, operations * count)


def _declared() -> list[Build]:
    """Every row of the tables for every dtype; what else a call may ask for at heads of 128."""
    builds: list[Build] = []

    def declare(kernel: Any, dtype: str, signature: str, targets: tuple[str, ...], config: Config, **rest: Any) -> None:
        flags = {**rest.pop("flags"), **config.constexprs}
        builds.append(
            Build(kernel, dtype, signature, flags, config.num_warps, config.num_stages, targets=targets, **rest)
        )

    tensor, angles = "*T/16 i32/16 i32/16", "*i64/16 i32 i32 *fp32/16 *i64/16 *i32/16"
    fwd = " ".join([f"{tensor} *T/16 *T/16 i32"] * 2 + [angles, "i32/16 i32/16 fp32"])
    bwd = " ".join([f"{tensor} {tensor} *T/16 *T/16 *fp32/16 i32"] * 2 + [angles, "i32 i32/16 i32/16 fp32"])
    for dtype in SIZES:
        for row, targets in configs.shipped("qk_norm_mrope_fwd", dtype):
            width = row.width or 0
            variants = [("hf", 3, True, False)]
            if dtype == "bf16" and width == 128:
                variants += [("vllm", 3, True, False), ("fp32", 3, True, False), ("hf", 3, False, False)]
                variants += [("hf", 1, True, False), ("hf", 3, True, True)]
            for numerics, axes, norm, rest in variants:
                note = f"D {width}" + f", {numerics}" * (numerics != "hf") + ", no norm" * (not norm)
                note += ", one axis" * (axes == 1) + ", partly rotated" * rest
                flags = {"NUMERICS": NUMERICS[numerics], "AXES": axes, **_both(norm), "HAS_REST": rest}
                work = _work(width, dtype, norm, False)
                declare(
                    _qk_norm_mrope_fwd_kernel, dtype, fwd, targets, row.config, flags=flags, note=note, work=work,
                    hot=width <= 256,
                )  # fmt: skip
        for row, targets in configs.shipped("qk_norm_mrope_bwd", dtype):
            width = row.width or 0
            cases = [(True, True, False, False)]
            if dtype == "bf16" and width == 128:
                cases += [(True, False, False, False), (False, False, False, False)]
                cases += [(True, True, True, False), (True, True, False, True)]
            for norm, need, exact, rest in cases:
                note = f"D {width}" + ", no norm" * (not norm) + ", frozen weights" * (norm and not need)
                note += ", fp32" * exact + ", partly rotated" * rest
                flags = {"EXACT": exact, "AXES": 3, **_both(norm), "HAS_REST": rest}
                flags |= {"NEED_Q_WEIGHT": need, "NEED_K_WEIGHT": need}
                work = _work(width, dtype, norm, True)
                declare(
                    _qk_norm_mrope_bwd_kernel, dtype, bwd, targets, row.config, flags=flags, note=note, work=work,
                    hot=width <= 256 and not rest,  # no model that is patched has such heads; on gfx942, 6 scalar
                    # registers go to lanes
                )  # fmt: skip
    return builds


def _both(norm: bool) -> dict[str, bool]:
    return {"HAS_Q_WEIGHT": norm, "HAS_K_WEIGHT": norm}


KERNELS = _declared()
