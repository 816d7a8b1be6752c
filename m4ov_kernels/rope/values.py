"""What the values of the arguments of ``mrope_positions`` must be, where they are on the host, and what is said."""

from __future__ import annotations

from itertools import pairwise
from typing import NoReturn

from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.bounds import check_bounds

OPERATOR = "mrope_positions"
FARTHEST = 2.0**53  # positions between the first and the last frame of a video
LARGEST = 2**20  # patches a side, and frames
_NAMES = ("text", "image", "video")


def types_of(input_ids: Tensor, mm_token_type_ids: Tensor | None, image_token_id: int, video_token_id: int) -> Tensor:
    """int64 ``[T]``: 0 text, 1 image, 2 video."""
    if mm_token_type_ids is not None:
        return mm_token_type_ids.long()
    return (input_ids == image_token_id).long() + 2 * (input_ids == video_token_id)


def refuse(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    mm_token_type_ids: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    intervals: Tensor | None,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
) -> NoReturn:
    """Find what is wrong with values that an implementation could not use, and say it. Slow: it has no hurry.

    Raises:
        ValueError: naming the argument, and the sample where it is about one.
    """
    bounds = check_bounds(OPERATOR, "cu_seqlens", cu_seqlens, input_ids.shape[0])
    types: list[int] = types_of(input_ids, mm_token_type_ids, image_token_id, video_token_id).tolist()
    for place, kind in enumerate(types):
        if not 0 <= kind <= 2:
            _refuse("mm_token_type_ids", place, kind, "0 (text), 1 (image) or 2 (video)")
    grids: dict[int, list[list[int]]] = {}
    for kind, name, grid in ((1, "image_grid_thw", image_grid_thw), (2, "video_grid_thw", video_grid_thw)):
        grids[kind] = [] if grid is None else grid.tolist()
        for place, row in enumerate(grids[kind]):
            if min(row) < 1 or max(row) > LARGEST or row[1] % merge_size or row[2] % merge_size:
                expected = f"sizes from 1 to {LARGEST}, both sides multiples of merge_size {merge_size}"
                _refuse(name, place, row, expected)
    for place, interval in enumerate([] if intervals is None else intervals.tolist()):
        if not (interval >= 0 and interval * grids[2][place][0] < FARTHEST):
            _refuse("second_per_grid_ts", place, f"{interval} times tokens_per_second", "a finite number from 0")
    used = _walk(types, bounds, grids, merge_size, by_frame=intervals is None)
    for kind, name in ((1, "image_grid_thw"), (2, "video_grid_thw")):
        if used[kind] < len(grids[kind]):
            expected = f"of {used[kind]} {_NAMES[kind]}s, which use up the {_NAMES[kind]} tokens of all samples"
            checks.refuse(ValueError, OPERATOR, name, expected, len(grids[kind]))
    raise RuntimeError(f"{OPERATOR}: the arguments were refused, but nothing is wrong with them: a bug, please report")


def _walk(
    types: list[int], bounds: list[int], grids: dict[int, list[list[int]]], merge_size: int, by_frame: bool
) -> dict[int, int]:
    """Go through the tokens, one unit after the other; how many items were used."""
    used = {1: 0, 2: 0}
    for sample, (begin, end) in enumerate(pairwise(bounds)):
        left = {1: 0, 2: 0}  # frames of a video that has begun
        place = begin
        while place < end:
            kind = types[place]
            if kind == 0:
                place += 1
                continue
            name, what = f"{_NAMES[kind]}_grid_thw", f"{_NAMES[kind]} tokens of sample {sample}"
            if used[kind] == len(grids[kind]):
                expected = f"of more than {len(grids[kind])} {_NAMES[kind]}s, to match the {what}"
                checks.refuse(ValueError, OPERATOR, name, expected, len(grids[kind]))
            frames, height, width = grids[kind][used[kind]]
            split = kind == 2 and by_frame
            size = (height // merge_size) * (width // merge_size) * (1 if split else frames)
            run = next((i for i in range(place, min(place + size, end)) if types[i] != kind), min(place + size, end))
            if run - place < size:
                row = f"row {used[kind]}, {grids[kind][used[kind]]}, for {size} tokens in a row"
                expected = f"of as many tokens as the {what}"
                checks.refuse(ValueError, OPERATOR, name, expected, f"{row}, where there are {run - place}")
            place += size
            left[kind] = (left[kind] or (frames if split else 1)) - 1
            used[kind] += left[kind] == 0
        for kind in (1, 2):
            if left[kind]:
                expected = f"of as many tokens as the {_NAMES[kind]} tokens of sample {sample}"
                row = f"row {used[kind]}, {grids[kind][used[kind]]}"
                checks.refuse(
                    ValueError, OPERATOR, f"{_NAMES[kind]}_grid_thw", expected, f"{row}, {left[kind]} frames more"
                )
    return used


def _refuse(argument: str, place: int, came: object, expected: str) -> NoReturn:
    raise ValueError(f"{OPERATOR}: {argument}[{place}] is {came}: expected {expected}")
