"""The two-dimensional rotary embedding of a vision tower, straight from the grids of its images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator
from m4ov_kernels.rope.qk_norm_mrope import both, heads, integers, positive
from m4ov_kernels.vision import reference

_OP = "vision_rope"


def vision_rope(
    q: Tensor,
    k: Tensor,
    grid_thw: Tensor | None,
    *,
    merge_size: int,
    positions: Tensor | None = None,
    theta: float = 10000.0,
    numerics: str = "hf",
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys of image patches by their row and column; no tensor of sines and cosines is made.

    With ``frequency[j] = theta^(-4j / D)`` for j below D/4, the pair ``(x[i], x[i + D/2])`` of a head is turned by
    ``row · frequency[i]`` for i below D/4, and by ``column · frequency[i - D/4]`` from there on.

    Args:
        q: ``[N, H, D]``, bfloat16, float16, float32 or float64; any strides; D a multiple of 4, at most 1024.
        k: ``[N, KV, D]``: the same patches, dtype and device as ``q``.
        grid_thw: int64 or int32 ``[n, 3]``: frames, rows and columns of patches of each image or video. Patches come
            image after image, frame after frame, in blocks of ``merge_size²``, as Qwen-VL's processors order them.
            ``None`` where ``positions`` are given.
        merge_size: patches to a side of a block; rows and columns are multiples of it. Without a grid it says nothing.
        positions: int64 or int32 ``[N, 2]``, the row and column of each patch, for patches in another order (the
            windows of Qwen2.5-VL), in place of ``grid_thw``.
        theta: the base of the frequencies, > 0.
        numerics: ``"hf"`` and ``"vllm"``: angles are float32 products; ``"fp32"``: of float64. Everything else is in
            float32, and rounded once, to the dtype of ``q``, as in Hugging Face's vision towers.

    Returns:
        ``(q, k)`` rotated: contiguous, shaped and typed as given.

    Saves for backward: ``grid_thw`` or ``positions``.

    Invariance: the bits of a head, forward and backward, depend on its own elements and its place in its image alone:
    on the CPU always (other images, strides, threads); on a GPU one configuration serves a width and dtype.

    Raises:
        TypeError: a tensor argument is not dense or of a wrong dtype, or an option is of a wrong type.
        ValueError: a shape, device or option does not fit; grids that do not make up N patches or are no multiples of
            ``merge_size``, naming the image. On a GPU the offending rows are NaN and :func:`m4ov_kernels.check` raises.

    Source: Wang et al., "Qwen2-VL", arXiv 2409.12191; the vision towers of Qwen2.5-VL and Qwen3-VL.
    """
    _check(q, k, grid_thw, merge_size, positions, theta, numerics)
    theta = float(theta)
    implementation = VISION_ROPE.select(q.device, q.dtype)
    if implementation is None:
        return reference.vision_rope(q, k, grid_thw, positions, merge_size, theta, numerics)
    made: tuple[Tensor, Tensor] = VISION_ROPE(implementation, q, k, grid_thw, positions, merge_size, theta, numerics)
    return made


def _check(
    q: Tensor,
    k: Tensor,
    grid_thw: Tensor | None,
    merge_size: int,
    positions: Tensor | None,
    theta: float,
    numerics: str,
) -> None:
    heads(_OP, q, k)
    if q.ndim != 3 or q.shape[2] % 4:
        checks.refuse(ValueError, _OP, "q", "[N, H, D] with D a multiple of 4", checks.describe(q))
    if isinstance(merge_size, bool) or not isinstance(merge_size, int):
        checks.refuse(TypeError, _OP, "merge_size", "an int", checks.describe(merge_size))
    if merge_size < 1:
        checks.refuse(ValueError, _OP, "merge_size", "1 or greater", merge_size)
    if grid_thw is not None:
        integers(_OP, "grid_thw", grid_thw, q.device)
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
            checks.refuse(ValueError, _OP, "grid_thw", "[n, 3]", checks.describe(grid_thw))
    elif positions is None:
        checks.refuse(TypeError, _OP, "grid_thw", "a tensor, unless positions are given", "None")
    if positions is not None:
        if grid_thw is not None:
            checks.refuse(ValueError, _OP, "positions", "None, as grid_thw is given", checks.describe(positions))
        integers(_OP, "positions", positions, q.device)
        if positions.shape != (q.shape[0], 2):
            checks.refuse(ValueError, _OP, "positions", f"[{q.shape[0]}, 2]", checks.describe(positions))
    positive(_OP, "theta", theta)
    if numerics not in checks.NUMERICS:
        checks.one_of(_OP, "numerics", numerics, checks.NUMERICS)


def _fwd_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, grid_thw, positions, *ctx.options = inputs
    ctx.shapes = q.shape, k.shape
    ctx.save_for_backward(grid_thw, positions)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    made = bwd(*both(grads, ctx.shapes), *ctx.saved_tensors, *ctx.options)
    wanted = (needs[i] and grads[i] is not None for i in range(2))
    return (*(grad if want else None for grad, want in zip(made, wanted, strict=True)), *(None,) * 5)


VISION_ROPE = Operator(
    "vision",
    _OP,
    fwd_schema="(Tensor q, Tensor k, Tensor? grid_thw, Tensor? positions, int merge_size, float theta, str numerics)"
    " -> (Tensor q_turned, Tensor k_turned)",
    bwd_schema="(Tensor grad_q_turned, Tensor grad_k_turned, Tensor? grid_thw, Tensor? positions, int merge_size,"
    " float theta, str numerics) -> (Tensor grad_q, Tensor grad_k)",
    fwd_fake=_fwd_fake,
    bwd_fake=_fwd_fake,
    results=lambda *_: 2,
    setup_context=_setup_context,
    backward=_backward,
)
