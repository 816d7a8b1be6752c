"""``mrope_positions`` in Triton: no token waits for the one before it.

What comes before a token follows from how many image and video tokens do, for these numbers say which images are
complete. So tokens are counted block by block, the counts summed (by PyTorch), and every block finds its positions by
itself: the images by search in a table of theirs, the sample by search in the bounds. Counts and divisions are 32 bits
wide: a batch has fewer than 2^30 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m4ov_kernels import configs, device_errors
from m4ov_kernels.gpu import Build, Work, current_device
from m4ov_kernels.layout import output
from m4ov_kernels.rope.values import LARGEST

# Slots of device_errors, in their order there, two elements apart.
_CU_SEQLENS, _TYPES, _GRIDS, _MATCH = (tl.constexpr(slot) for slot in (0, 2, 4, 8))
_BAD = tl.constexpr(-1)  # the origin of a sample that has no positions
_MOST = tl.constexpr(2**30)  # tokens
_FARTHEST = tl.constexpr(2.0**53)
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def _last_not_above(values_ptr, count, value, steps):
    """The largest place in [0, count] with ``values[place] <= value``, by ``steps`` halvings; ``value`` is a tensor."""
    low = value * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high + 1) // 2
        below = tl.load(values_ptr + middle, mask=middle > low, other=0) <= value
        low = tl.where(below & (middle > low), middle, low)
        high = tl.where(below, high, tl.maximum(middle - 1, low))
    return low


@triton.jit
def _side(patches, merge_size):
    """Merged patches, within bounds where a grid is refused too."""
    return tl.maximum(tl.minimum(tl.maximum(patches, 1), _LARGEST).to(tl.int32) // merge_size, 1)


@triton.jit
def _place(rank, table_ptr, grid_ptr, items, steps, merge_size, BY_FRAME: tl.constexpr):
    """Of the token behind ``rank`` tokens of its kind: item, offset in it, columns and size of its frame, and how far
    the complete units before it move what follows. ``table``: int32 [2, items + 1], tokens of the items before, and how
    far they move."""
    item = _last_not_above(table_ptr, items, rank, steps)
    offset = rank - tl.load(table_ptr + item)
    moved = tl.load(table_ptr + items + 1 + item)
    here = item < items
    rows = _side(tl.load(grid_ptr + 3 * tl.cast(item, tl.int64) + 1, mask=here, other=1), merge_size)
    columns = _side(tl.load(grid_ptr + 3 * tl.cast(item, tl.int64) + 2, mask=here, other=1), merge_size)
    size = tl.minimum(tl.cast(rows, tl.int64) * columns, _MOST).to(tl.int32)
    if BY_FRAME:
        moved += tl.where(here, offset // size * tl.maximum(rows, columns), 0)
    return item, offset, columns, size, moved


@triton.jit
def _kinds(kinds_ptr, place, mask, image_kind, video_kind):
    kind = tl.load(kinds_ptr + place, mask=mask, other=-1)
    return kind, mask & (kind == image_kind), mask & (kind == video_kind)


@triton.jit(do_not_specialize=["tokens", "blocks", "image_kind", "video_kind"])
def _mrope_count_kernel(
    kinds_ptr,  # [tokens]
    counts_ptr,  # int32 [2, blocks]: image and video tokens
    tokens,
    blocks,
    image_kind,
    video_kind,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    _, images, videos = _kinds(kinds_ptr, place, place < tokens, image_kind, video_kind)
    tl.store(counts_ptr + block, tl.sum(images.to(tl.int32), axis=0))
    tl.store(counts_ptr + blocks + block, tl.sum(videos.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["items", "merge_size", "slot"])
def _mrope_table_kernel(
    grid_ptr,  # int64 [items, 3]
    intervals_ptr,  # fp32 [items], or unused
    table_ptr,  # int32 [2, items + 1]
    flag_ptr,  # int64 [slots]
    items,
    merge_size,
    slot,  # of the grid; that of the intervals is _MATCH + 4
    BY_FRAME: tl.constexpr,
    HAS_INTERVALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tokens = tl.cast(0, tl.int64)
    moved = tl.cast(0, tl.int64)
    tl.store(table_ptr, 0)
    tl.store(table_ptr + items + 1, 0)
    for start in range(0, items, BLOCK):
        item = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        mask = item < items
        frames = tl.load(grid_ptr + 3 * item, mask=mask, other=1)
        height = tl.load(grid_ptr + 3 * item + 1, mask=mask, other=merge_size)
        width = tl.load(grid_ptr + 3 * item + 2, mask=mask, other=merge_size)
        least = tl.minimum(frames, tl.minimum(height, width))
        most = tl.maximum(frames, tl.maximum(height, width))
        sound = (least >= 1) & (most <= _LARGEST)
        height, width = tl.where(sound, height, 1).to(tl.int32), tl.where(sound, width, 1).to(tl.int32)
        sound = sound & (height % merge_size == 0) & (width % merge_size == 0)
        tl.atomic_min(flag_ptr + slot + item * 0, item, mask=mask & ~sound)
        frames = tl.where(sound, frames, 1)
        rows = tl.where(sound, height // merge_size, 1).to(tl.int64)
        columns = tl.where(sound, width // merge_size, 1).to(tl.int64)
        if HAS_INTERVALS:
            interval = tl.load(intervals_ptr + item, mask=mask, other=0.0)
            sound = (interval >= 0.0) & (interval * frames.to(tl.float32) < _FARTHEST)
            tl.atomic_min(flag_ptr + _MATCH + 4 + item * 0, item, mask=mask & ~sound)
        step = tl.maximum(rows, columns)
        if BY_FRAME:
            step *= frames
        size = tl.where(mask, frames * rows * columns, 0)
        step = tl.where(mask, step, 0)
        tl.store(table_ptr + item + 1, tl.minimum(tokens + tl.cumsum(size, axis=0), _MOST), mask=mask)
        tl.store(table_ptr + items + 1 + item + 1, tl.minimum(moved + tl.cumsum(step, axis=0), _MOST), mask=mask)
        tokens += tl.sum(size, axis=0)
        moved += tl.sum(step, axis=0)


@triton.jit
def _rank(kinds_ptr, sums_ptr, bound, tokens, blocks, image_kind, video_kind, BLOCK: tl.constexpr):
    """Image and video tokens before ``bound``."""
    block = bound // BLOCK
    place = block * BLOCK + tl.arange(0, BLOCK)
    _, images, videos = _kinds(kinds_ptr, place, (place < bound) & (place < tokens), image_kind, video_kind)
    before = tl.load(sums_ptr + block - 1, mask=block > 0, other=0)
    videos_before = tl.load(sums_ptr + blocks + block - 1, mask=block > 0, other=0)
    return before + tl.sum(images.to(tl.int32), axis=0), videos_before + tl.sum(videos.to(tl.int32), axis=0)


@triton.jit
def _origin(
    bound,
    images,
    videos,
    image_table_ptr,
    image_grid_ptr,
    video_table_ptr,
    video_grid_ptr,
    image_items,
    video_items,
    image_steps,
    video_steps,
    merge_size,
    BY_FRAME: tl.constexpr,
):
    """How far all before a bound moves; whether it lies between two images and two videos; whether behind the last."""
    i, i_offset, _, _, i_moved = _place(
        images, image_table_ptr, image_grid_ptr, image_items, image_steps, merge_size, False
    )
    v, v_offset, _, _, v_moved = _place(
        videos, video_table_ptr, video_grid_ptr, video_items, video_steps, merge_size, BY_FRAME
    )
    origin = bound - images - videos + i_moved + v_moved
    return origin, i_offset == 0, v_offset == 0, i == image_items, v == video_items


@triton.jit(
    do_not_specialize=[
        *("tokens", "blocks", "samples", "image_items", "video_items", "image_steps", "video_steps"),
        *("merge_size", "image_kind", "video_kind"),
    ]
)
def _mrope_sample_kernel(
    kinds_ptr,  # [tokens]
    sums_ptr,  # int32 [2, blocks], image and video tokens up to the end of each block
    cu_seqlens_ptr,  # int64 [samples + 1]
    image_table_ptr,
    image_grid_ptr,
    video_table_ptr,
    video_grid_ptr,
    origins_ptr,  # int32 [samples]
    deltas_ptr,  # int64 [samples], raised later where the frames of an image or a video reach farther
    flag_ptr,
    tokens,
    blocks,
    samples,
    image_items,
    video_items,
    image_steps,
    video_steps,
    merge_size,
    image_kind,
    video_kind,
    BY_FRAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + sample)
    end = tl.load(cu_seqlens_ptr + sample + 1)
    last = sample == samples - 1
    starts = (begin == 0) | (sample > 0)
    ends = (end >= begin) & ((end == tokens) | ~last)
    wide = tl.cast(sample, tl.int64)
    tl.atomic_min(flag_ptr + _CU_SEQLENS, wide, mask=~starts)
    tl.atomic_min(flag_ptr + _CU_SEQLENS, wide + 1, mask=~ends)
    begin = tl.minimum(tl.maximum(begin, 0), tokens).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), tokens).to(tl.int32)
    images, videos = _rank(kinds_ptr, sums_ptr, begin, tokens, blocks, image_kind, video_kind, BLOCK)
    origin, i_fits, v_fits, _, _ = _origin(
        *(begin, images, videos, image_table_ptr, image_grid_ptr, video_table_ptr, video_grid_ptr),
        *(image_items, video_items, image_steps, video_steps, merge_size, BY_FRAME),
    )
    fits = i_fits & v_fits
    images, videos = _rank(kinds_ptr, sums_ptr, end, tokens, blocks, image_kind, video_kind, BLOCK)
    past, i_fits, v_fits, i_done, v_done = _origin(
        *(end, images, videos, image_table_ptr, image_grid_ptr, video_table_ptr, video_grid_ptr),
        *(image_items, video_items, image_steps, video_steps, merge_size, BY_FRAME),
    )
    i_fits = i_fits & (i_done | ~last)
    v_fits = v_fits & (v_done | ~last)
    tl.atomic_min(flag_ptr + _MATCH, wide, mask=~i_fits)
    tl.atomic_min(flag_ptr + _MATCH + 2, wide, mask=~v_fits)
    good = fits & i_fits & v_fits & starts & ends
    tl.store(origins_ptr + sample, tl.where(good, origin, _BAD))
    tl.store(deltas_ptr + sample, tl.cast((past - origin) - (end - begin), tl.int64))


@triton.jit(
    do_not_specialize=[
        *("tokens", "blocks", "samples", "image_items", "video_items", "sample_steps", "image_steps", "video_steps"),
        *("merge_size", "image_kind", "video_kind"),
    ]
)
def _mrope_positions_kernel(
    position_ids_ptr,  # int64 [3, tokens]
    deltas_ptr,
    kinds_ptr,
    sums_ptr,
    cu_seqlens_ptr,
    image_table_ptr,
    image_grid_ptr,
    video_table_ptr,
    video_grid_ptr,
    intervals_ptr,  # fp32 [videos], or unused
    origins_ptr,
    flag_ptr,
    tokens,
    blocks,
    samples,
    image_items,
    video_items,
    sample_steps,
    image_steps,
    video_steps,
    merge_size,
    image_kind,
    video_kind,
    TYPED: tl.constexpr,
    BY_FRAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    mask = place < tokens
    kind, image, video = _kinds(kinds_ptr, place, mask, image_kind, video_kind)
    sample = _last_not_above(cu_seqlens_ptr, samples - 1, place, sample_steps)
    begin = tl.load(cu_seqlens_ptr + sample)
    origin = tl.load(origins_ptr + sample)
    images = tl.load(sums_ptr + block - 1, mask=block > 0, other=0)
    videos = tl.load(sums_ptr + blocks + block - 1, mask=block > 0, other=0)
    images += tl.cumsum(image.to(tl.int32), axis=0) - image.to(tl.int32)
    videos += tl.cumsum(video.to(tl.int32), axis=0) - video.to(tl.int32)
    _, i_offset, i_columns, i_size, i_moved = _place(
        images, image_table_ptr, image_grid_ptr, image_items, image_steps, merge_size, False
    )
    item, v_offset, v_columns, v_size, v_moved = _place(
        videos, video_table_ptr, video_grid_ptr, video_items, video_steps, merge_size, BY_FRAME
    )
    first = place - images - videos + i_moved + v_moved - origin
    visual = image | video
    offset = tl.where(image, i_offset, v_offset)
    columns = tl.where(image, i_columns, v_columns)
    size = tl.where(image, i_size, v_size)
    frame = offset // size
    within = offset % size
    row, column = within // columns, within % columns
    if BY_FRAME:
        time = tl.where(image, frame, 0).to(tl.int64)
        inside = tl.where(image, offset, within) > 0
    else:
        interval = tl.load(intervals_ptr + item, mask=video & (item < video_items), other=1.0)
        interval = tl.where((interval >= 0.0) & (interval < _FARTHEST), interval, 0.0)  # others are flagged
        time = tl.where(image, frame.to(tl.int64), (frame.to(tl.float32) * interval).to(tl.int64))
        inside = offset > 0
    inside = visual & inside
    before, _, _ = _kinds(kinds_ptr, place - 1, inside & (place > begin), image_kind, video_kind)
    broken = inside & ((before != kind) | (place == begin))
    good = (origin >= 0) & ~broken
    if TYPED:
        strange = mask & ((kind < 0) | (kind > 2))
        tl.atomic_min(flag_ptr + _TYPES + place * 0, tl.cast(place, tl.int64), mask=strange)
    tl.atomic_min(flag_ptr + _MATCH + place * 0, tl.cast(sample, tl.int64), mask=broken & image)
    tl.atomic_min(flag_ptr + _MATCH + 2 + place * 0, tl.cast(sample, tl.int64), mask=broken & video)
    time += first
    stride = tl.cast(tokens, tl.int64)
    tl.store(position_ids_ptr + place, tl.where(good, tl.where(visual, time, first), -1), mask=mask)
    position_ids_ptr += stride
    tl.store(position_ids_ptr + place, tl.where(good, first + tl.where(visual, row, 0), -1).to(tl.int64), mask=mask)
    position_ids_ptr += stride
    tl.store(position_ids_ptr + place, tl.where(good, first + tl.where(visual, column, 0), -1).to(tl.int64), mask=mask)
    length = tl.load(cu_seqlens_ptr + sample + 1) - begin
    tl.atomic_max(deltas_ptr + sample, time + 1 - length, mask=good & visual & (time > first))


def mrope_positions_fwd(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    mm_token_type_ids: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    intervals: Tensor | None,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(position_ids [3, T], deltas [N])``, int64."""
    tokens, samples = input_ids.shape[0], cu_seqlens.shape[0] - 1
    position_ids = output(out and out[0], (3, tokens), input_ids, torch.int64)
    deltas = output(out and out[1], (samples,), input_ids, torch.int64)
    if not samples:
        return position_ids, deltas
    if tokens >= _MOST.value:
        raise ValueError(f"mrope_positions: input_ids must be of fewer than 2^30 tokens on a GPU; got {tokens}")
    typed, by_frame = mm_token_type_ids is not None, intervals is None
    kinds = (input_ids if mm_token_type_ids is None else mm_token_type_ids).contiguous()
    codes = (1, 2) if typed else (image_token_id, video_token_id)
    bounds = cu_seqlens.long().contiguous()
    flag = device_errors.flag(input_ids.device, "mrope_positions")
    config, table_config = configs.get("mrope_positions", input_ids), configs.get("mrope_table", input_ids)
    blocks = triton.cdiv(tokens, config.constexprs["BLOCK"])
    none = input_ids.new_empty(0)
    spans = flag if intervals is None else intervals.contiguous()
    counts = input_ids.new_empty(2, blocks, dtype=torch.int32)
    origins = input_ids.new_empty(samples, dtype=torch.int32)
    with current_device(input_ids):
        tables, grids, items = [], [], []
        for slot, grid in enumerate((image_grid_thw, video_grid_thw)):
            grid = none.view(0, 3) if grid is None else grid.contiguous()
            count, video = grid.shape[0], slot == 1
            table = input_ids.new_empty(2, count + 1, dtype=torch.int32)
            _mrope_table_kernel[(1,)](
                *(grid, spans if video else flag, table, flag, count, merge_size, _GRIDS.value + 2 * slot),
                BY_FRAME=video and by_frame,
                HAS_INTERVALS=video and not by_frame,
                **table_config.options(),
            )
            tables.append(table)
            grids.append(grid)
            items.append(count)
        if blocks:
            _mrope_count_kernel[(blocks,)](kinds, counts, tokens, blocks, *codes, **config.options())
        sums = counts.cumsum(1, dtype=torch.int32)
        steps = [count.bit_length() for count in items]
        searched = (tables[0], grids[0], tables[1], grids[1])
        _mrope_sample_kernel[(samples,)](
            *(kinds, sums, bounds, *searched, origins, deltas, flag),
            *(tokens, blocks, samples, *items, *steps, merge_size, *codes),
            BY_FRAME=by_frame,
            **config.options(),
        )
        if blocks:
            _mrope_positions_kernel[(blocks,)](
                *(position_ids, deltas, kinds, sums, bounds, *searched, spans, origins, flag),
                *(tokens, blocks, samples, *items, (samples - 1).bit_length(), *steps, merge_size, *codes),
                TYPED=typed,
                BY_FRAME=by_frame,
                **config.options(),
            )
    return position_ids, deltas


def _declared() -> list[Build]:
    """Types given as int32, as int64, or by token ids; frames of videos apart or together."""
    builds = []
    tokens, samples, items = 524288, 64, 512  # of the problem that the cost models state
    problem, pointers = f"{samples} samples of {tokens // samples} tokens, {items} images", "*i32/16 *i64/16 " * 2

    def declare(kernel: Any, row: str, signature: str, note: str, moved: int, **flags: Any) -> None:
        for shipped, targets in configs.shipped(row, "any"):
            config = shipped.config
            constexprs, warps = {**flags, **config.constexprs}, (config.num_warps, config.num_stages)
            work = Work(problem, moved, 0)
            # One program a sample, for which ptxas keeps a barrier of divergent threads in 8 bytes of local memory.
            hot = kernel is not _mrope_sample_kernel
            builds.append(
                Build(kernel, "i64", signature, constexprs, *warps, hot=hot, note=note, work=work, targets=targets)
            )

    for by_frame in (True, False):
        frames = "frames apart" if by_frame else "videos whole"
        for intervals in (False,) if by_frame else (False, True):
            if intervals or by_frame:
                spans = "*fp32/16" if intervals else "*i64/16"
                signature = f"*i64/16 {spans} *i32/16 *i64/16 i32 i32 i32"
                flags = {"BY_FRAME": by_frame, "HAS_INTERVALS": intervals}
                declare(_mrope_table_kernel, "mrope_table", signature, frames, items * 40, **flags)
        for typed, kinds in ((False, "*i64/16"), (True, "*i32/16"), (True, "*i64/16")):
            note = f"{frames}, {'types ' * typed}{kinds[1:4]}"
            size = 4 if kinds == "*i32/16" else 8
            spans = "*i64/16" if by_frame else "*fp32/16"
            signature = f"*i64/16 *i64/16 {kinds} *i32/16 *i64/16 {pointers}{spans} *i32/16 *i64/16" + " i32" * 11
            flags = {"TYPED": typed, "BY_FRAME": by_frame}
            declare(_mrope_positions_kernel, "mrope_positions", signature, note, tokens * (24 + size), **flags)
            if typed == (kinds == "*i32/16"):
                signature = f"{kinds} *i32/16 *i64/16 {pointers}*i32/16 *i64/16 *i64/16" + " i32" * 10
                sample = f"{frames}, {kinds[1:4]}"
                declare(_mrope_sample_kernel, "mrope_positions", signature, sample, samples * 8192, BY_FRAME=by_frame)
                if by_frame:
                    declare(
                        _mrope_count_kernel,
                        "mrope_positions",
                        f"{kinds} *i32/16 i32 i32 i32 i32",
                        kinds[1:4],
                        tokens * size,
                    )
    signature = "*i64/16 *i64/16 *i32/16 *i64/16 i32 i32 i32"
    flags = {"BY_FRAME": False, "HAS_INTERVALS": False}
    declare(_mrope_table_kernel, "mrope_table", signature, "images", items * 40, **flags)
    return builds


KERNELS = _declared()
