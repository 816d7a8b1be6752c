"""``interpolate_position_embeddings``: a learned square table of positions, resampled to the grid of each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator, is_compiling
from m4ov_kernels.vision import reference
from m4ov_kernels.vision.checks import count_patches, refuse_count, side_of

_OP = "interpolate_position_embeddings"


def interpolate_position_embeddings(
    table: Tensor,
    grid_thw: Tensor,
    *,
    merge_size: int,
    hidden_states: Tensor | None = None,
    num_patches: int | None = None,
    numerics: str = "hf",
) -> Tensor:
    """The position embeddings of every patch, bilinear between those of a square table whose corners are the image's;
    added to ``hidden_states``, if given, in the same pass. Frames of a video have the same ones.

    Args:
        table: ``[S·S, D]``, row by row (bfloat16, float16, float32 or float64).
        grid_thw: ``[n, 3]`` int64: frames, rows and columns of patches of each image or video; on the CPU, or on the
            device of ``table``.
        merge_size: patches come in blocks of ``merge_size · merge_size`` neighbours; it divides rows and columns.
        hidden_states: ``[N, D]``, the patches' embeddings, same device (another floating dtype is served by the
            reference); any strides. It is not changed.
        num_patches: N, where neither ``hidden_states`` nor a ``grid_thw`` on the CPU says it.
        numerics: coordinates and weights are float32 (float64 for a float64 table), as Hugging Face's.
            ``"hf"`` rounds the interpolated embedding to the dtype before the addition; ``"vllm"`` and ``"fp32"`` round
            the sum once.

    Returns:
        ``[N, D]``, contiguous, in the dtype of ``hidden_states``, or of ``table`` without them.

    Saves for backward: ``grid_thw``. The gradient of ``table`` is summed in float32 in the order of the patches (the
    same bits for any number of threads, no atomics); that of ``hidden_states`` is that of the output, itself.

    Invariance: a patch's bits depend on the table, its place in its image and its own embedding alone: on the CPU
    always (other images, strides, threads); on a GPU one configuration serves a width and dtype. The gradient of
    ``table`` is a sum over the batch.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes or devices do not fit, or (``grid_thw`` on the CPU) a grid is not positive or not a multiple
            of ``merge_size`` (named), or the grids do not have N patches in all. On a GPU the rows of such a grid, and
            those beyond the last, are NaN, and :func:`m4ov_kernels.check` raises the error.

    Source: Qwen3-VL, arXiv 2511.21631; Hugging Face's ``fast_pos_embed_interpolate`` (5.14), after it
    ``get_vision_interpolation_indices_and_weights`` with ``align_corners``, whose bits these are (5.17 and newer).
    """
    _check(table, grid_thw, merge_size, hidden_states, num_patches, numerics)
    if hidden_states is not None:
        num_patches = hidden_states.shape[0]
    elif num_patches is None:
        if grid_thw.device.type != "cpu":
            checks.refuse(ValueError, _OP, "num_patches", "given, as grid_thw is not on the CPU", "None")
        num_patches = count_patches(_OP, grid_thw, merge_size)
    same = hidden_states is None or hidden_states.dtype is table.dtype
    implementation = INTERPOLATE.select(table.device, table.dtype if same else None)
    if implementation is None:
        if (
            grid_thw.device.type == "cpu"
            and not is_compiling()
            and count_patches(_OP, grid_thw, merge_size) != num_patches
        ):
            refuse_count(_OP, grid_thw, num_patches)
        return reference.interpolate_position_embeddings(
            table, grid_thw, hidden_states, num_patches, merge_size, numerics
        )
    result: Tensor = INTERPOLATE(implementation, table, grid_thw, hidden_states, num_patches, merge_size, numerics)
    return result


def _check(
    table: Tensor,
    grid_thw: Tensor,
    merge_size: int,
    hidden_states: Tensor | None,
    num_patches: int | None,
    numerics: str,
) -> None:
    checks.float_tensor(_OP, "table", table)
    if not is_compiling():  # a symbolic size has no integer root; kernels look again
        side_of(_OP, table)
    if not isinstance(grid_thw, Tensor) or grid_thw.dtype is not torch.int64 or grid_thw.layout is not torch.strided:
        sparse = getattr(grid_thw, "is_sparse", False)
        came = f"layout {grid_thw.layout}" if sparse else checks.describe(grid_thw)
        checks.refuse(TypeError, _OP, "grid_thw", "a dense int64 tensor", came)
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.device not in (table.device, torch.device("cpu")):
        expected = f"[n, 3] on the CPU or {table.device}, as table"
        checks.refuse(ValueError, _OP, "grid_thw", expected, checks.describe(grid_thw))
    for name, value, least in (("merge_size", merge_size, 1), ("num_patches", num_patches, 0)):
        if value is None and name == "num_patches":
            continue
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            checks.refuse(TypeError, _OP, name, "an int", checks.describe(value))
        if value < least:
            checks.refuse(ValueError, _OP, name, f"at least {least}", value)
    if hidden_states is not None:
        checks.float_tensor(_OP, "hidden_states", hidden_states)
        if (
            hidden_states.ndim != 2
            or hidden_states.shape[1] != table.shape[1]
            or hidden_states.device != table.device
            or (num_patches is not None and hidden_states.shape[0] != num_patches)
        ):
            rows = "N" if num_patches is None else num_patches
            expected = f"[{rows}, {table.shape[1]}] on {table.device}, as table"
            checks.refuse(ValueError, _OP, "hidden_states", expected, checks.describe(hidden_states))
    if numerics not in checks.NUMERICS:
        checks.one_of(_OP, "numerics", numerics, checks.NUMERICS)


def _fwd_fake(
    table: Tensor, grid_thw: Tensor, hidden_states: Tensor | None, num_patches: int, merge_size: int, numerics: str
) -> Tensor:
    return table.new_empty((num_patches, table.shape[1]))


def _bwd_fake(grad_output: Tensor, grid_thw: Tensor, table_rows: int, merge_size: int) -> Tensor:
    return grad_output.new_empty((table_rows, grad_output.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, grid_thw, _, _, ctx.merge_size, _ = inputs
    ctx.table_rows = table.shape[0]
    ctx.save_for_backward(grid_thw)


def _backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (grid_thw,) = ctx.saved_tensors
    grad_table = bwd(grads[0], grid_thw, ctx.table_rows, ctx.merge_size) if needs[0] else None
    return grad_table, None, grads[0] if needs[2] else None, None, None, None


INTERPOLATE = Operator(
    "vision",
    _OP,
    fwd_schema="(Tensor table, Tensor grid_thw, Tensor? hidden_states, SymInt num_patches, int merge_size,"
    " str numerics) -> Tensor",
    bwd_schema="(Tensor grad_output, Tensor grid_thw, SymInt table_rows, int merge_size) -> Tensor",
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    results=lambda *_: 1,
    setup_context=_setup_context,
    backward=_backward,
)
