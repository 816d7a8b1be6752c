"""``mrope_positions``: from tokens and grids to the positions of multimodal rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator
from m4ov_kernels.rope import reference

__all__ = ["mrope_positions"]

_OP = "mrope_positions"
_KINDS = ("qwen3_vl", "qwen2_5_vl")
_INDEX_DTYPES = (torch.int32, torch.int64)


def mrope_positions(
    input_ids: Tensor,
    *,
    cu_seqlens: Tensor,
    mm_token_type_ids: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | None = None,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    kind: str = "qwen3_vl",
    tokens_per_second: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions in time, height and width of every token of a packed batch, each sample for itself.

    Text advances all three. An image starts where the text before it ends and counts its frames, rows and columns of
    merged patches from there; what follows goes on behind the larger of rows and columns. A video of Qwen3-VL is a
    row of such images, one for each frame, with or without text (timestamps) between them; one of Qwen2.5-VL is a
    whole, whose frames are ``tokens_per_second · second_per_grid_ts`` positions apart. Images may follow each other
    without text between them (Hugging Face's function needs some).

    Args:
        input_ids: int64 ``[T]``, sample after sample.
        cu_seqlens: int32 or int64 ``[N + 1]``: sample ``n`` has the tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``.
            Starts at 0, never falls, ends at ``T``. Samples may be empty.
        mm_token_type_ids: int32 or int64 ``[T]``: 0 at text, 1 at image, 2 at video tokens. ``None``: as
            ``image_token_id`` and ``video_token_id`` say.
        image_grid_thw, video_grid_thw: int64 ``[n, 3]``, patches in time, height and width of every image (video), in
            the order of their tokens. ``None``: there are none.
        second_per_grid_ts: float32 ``[n]``, seconds between the frames of each video; ``None``: 1. Only for
            ``"qwen2_5_vl"``.
        image_token_id, video_token_id: not looked at where ``mm_token_type_ids`` is given.
        merge_size: patches a side of one token.
        kind: whose positions: ``"qwen3_vl"`` or ``"qwen2_5_vl"``.
        tokens_per_second: of the vision configuration; needed, and used, for videos of ``"qwen2_5_vl"`` only.

    Returns:
        ``(position_ids, deltas)``: int64 ``[3, T]``, and int64 ``[N]``: what to add to the number of tokens of a sample
        for the position of the next one (Hugging Face's ``rope_deltas``). Bit-equal to ``get_rope_index`` of
        transformers' models. Nothing is differentiable.

    Saves for backward: nothing.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, device, ``kind`` or ``merge_size`` does not fit; values of ``cu_seqlens``, types or grids
            that are wrong; grids that do not match the image (video) tokens of a sample, which is named. A GPU's values
            are not fetched: positions of such a sample are -1, and :func:`m4ov_kernels.check` raises.

    Source: Wang et al., "Qwen2-VL", arXiv 2409.12191; Qwen3-VL and Qwen2.5-VL as transformers defines them.
    """
    samples = _check(input_ids, cu_seqlens, mm_token_type_ids, merge_size)
    for name, number in (("image_token_id", image_token_id), ("video_token_id", video_token_id)):
        if type(number) is not int:
            checks.refuse(TypeError, _OP, name, "an int", checks.describe(number))
    if mm_token_type_ids is None and image_token_id == video_token_id:
        checks.refuse(ValueError, _OP, "video_token_id", "another than image_token_id", video_token_id)
    if kind not in _KINDS:
        checks.one_of(_OP, "kind", kind, _KINDS)
    for name, grid in (("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw)):
        if grid is not None:
            _check_grid(name, grid, input_ids, samples)
    intervals = _intervals(video_grid_thw, second_per_grid_ts, tokens_per_second) if kind == "qwen2_5_vl" else None
    if second_per_grid_ts is not None and kind == "qwen3_vl":
        checks.refuse(ValueError, _OP, "second_per_grid_ts", "None for kind 'qwen3_vl'", "one")
    arguments = (input_ids, cu_seqlens, mm_token_type_ids, image_grid_thw, video_grid_thw, intervals)
    implementation = MROPE_POSITIONS.select(input_ids.device, torch.int64)
    if implementation is None:
        return reference.mrope_positions(*arguments, image_token_id, video_token_id, merge_size)
    made: tuple[Tensor, Tensor] = MROPE_POSITIONS(
        implementation, *arguments, image_token_id, video_token_id, merge_size
    )
    return made


def _check(input_ids: Tensor, cu_seqlens: Tensor, mm_token_type_ids: Tensor | None, merge_size: int) -> int:
    """How many samples there are."""
    checks.index_tensor(_OP, "input_ids", input_ids, (torch.int64,))
    if input_ids.ndim != 1:
        checks.refuse(ValueError, _OP, "input_ids", "[T]", checks.describe(input_ids))
    checks.index_tensor(_OP, "cu_seqlens", cu_seqlens, _INDEX_DTYPES)
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        checks.refuse(ValueError, _OP, "cu_seqlens", "[N + 1]", checks.describe(cu_seqlens))
    given = [("cu_seqlens", cu_seqlens)]
    if mm_token_type_ids is not None:
        checks.index_tensor(_OP, "mm_token_type_ids", mm_token_type_ids, _INDEX_DTYPES)
        if mm_token_type_ids.shape != input_ids.shape:
            expected = f"{list(input_ids.shape)}, as input_ids"
            checks.refuse(ValueError, _OP, "mm_token_type_ids", expected, checks.describe(mm_token_type_ids))
        given.append(("mm_token_type_ids", mm_token_type_ids))
    for name, tensor in given:
        if tensor.device != input_ids.device:
            checks.refuse(ValueError, _OP, name, f"on {input_ids.device}, as input_ids", f"one on {tensor.device}")
    if type(merge_size) is not int:
        checks.refuse(TypeError, _OP, "merge_size", "an int", checks.describe(merge_size))
    if merge_size < 1:
        checks.refuse(ValueError, _OP, "merge_size", "1 or greater", repr(merge_size))
    samples = cu_seqlens.shape[0] - 1
    if samples == 0 and input_ids.shape[0] != 0:
        expected = f"[N + 1] with at least one sample for {input_ids.shape[0]} tokens"
        checks.refuse(ValueError, _OP, "cu_seqlens", expected, checks.describe(cu_seqlens))
    return samples


def _check_grid(name: str, grid: Tensor, input_ids: Tensor, samples: int) -> None:
    checks.index_tensor(_OP, name, grid, (torch.int64,))
    if grid.ndim != 2 or grid.shape[1] != 3:
        checks.refuse(ValueError, _OP, name, "[n, 3]", checks.describe(grid))
    if grid.device != input_ids.device:
        checks.refuse(ValueError, _OP, name, f"on {input_ids.device}, as input_ids", f"one on {grid.device}")
    if input_ids.shape[0] == 0 and grid.shape[0] != 0:
        checks.refuse(ValueError, _OP, name, "[0, 3] or None, as there are no tokens", checks.describe(grid))


def _intervals(
    video_grid_thw: Tensor | None, second_per_grid_ts: Tensor | None, tokens_per_second: float | None
) -> Tensor | None:
    """Positions between the frames of each video of Qwen2.5-VL; ``None`` without videos."""
    videos = 0 if video_grid_thw is None else video_grid_thw.shape[0]
    if second_per_grid_ts is not None:
        if not isinstance(second_per_grid_ts, Tensor) or second_per_grid_ts.dtype is not torch.float32:
            got = checks.describe(second_per_grid_ts)
            checks.refuse(TypeError, _OP, "second_per_grid_ts", "a float32 tensor or None", got)
        if second_per_grid_ts.shape != (videos,):
            got = checks.describe(second_per_grid_ts)
            checks.refuse(ValueError, _OP, "second_per_grid_ts", f"[{videos}], one for each video", got)
    if video_grid_thw is None or not videos:
        return None
    if tokens_per_second is None:
        expected = "that of the vision configuration, for videos of kind 'qwen2_5_vl'"
        checks.refuse(ValueError, _OP, "tokens_per_second", expected, None)
    checks.number(_OP, "tokens_per_second", tokens_per_second)
    if not 0 <= tokens_per_second < float("inf"):
        checks.refuse(ValueError, _OP, "tokens_per_second", "a finite number from 0", repr(tokens_per_second))
    if second_per_grid_ts is None:
        return torch.full((videos,), tokens_per_second, dtype=torch.float32, device=video_grid_thw.device)
    if second_per_grid_ts.device != video_grid_thw.device:
        expected = f"on {video_grid_thw.device}, as video_grid_thw"
        checks.refuse(ValueError, _OP, "second_per_grid_ts", expected, f"one on {second_per_grid_ts.device}")
    return tokens_per_second * second_per_grid_ts.detach()


def _fwd_fake(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    mm_token_type_ids: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    intervals: Tensor | None,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
) -> tuple[Tensor, Tensor]:
    return input_ids.new_empty(3, input_ids.shape[0]), input_ids.new_empty(cu_seqlens.shape[0] - 1)


MROPE_POSITIONS = Operator(
    "rope",
    _OP,
    fwd_schema="(Tensor input_ids, Tensor cu_seqlens, Tensor? mm_token_type_ids, Tensor? image_grid_thw,"
    " Tensor? video_grid_thw, Tensor? intervals, int image_token_id, int video_token_id, int merge_size)"
    " -> (Tensor position_ids, Tensor deltas)",
    fwd_fake=_fwd_fake,
    dtypes=(torch.int64,),
)
