"""Where the vision features of a packed batch go, found where the counts are known: on the host, when it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m4ov_kernels import checks

_OP = "vision_positions"
IMAGE, VIDEO = 1, 2  # as Hugging Face's mm_token_type_ids number them; 0 is text


class VisionPositions(NamedTuple):
    """int64 on the CPU: the rows of the packed batch that the features of the images, ``[N]``, and of the videos,
    ``[M]``, go to, in the order of the features."""

    image: Tensor
    video: Tensor


def vision_positions(
    mm_token_type_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    merge_size: int,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    images_per_sample: Sequence[int] | Tensor | None = None,
    videos_per_sample: Sequence[int] | Tensor | None = None,
) -> VisionPositions:
    """The positions for :func:`m4ov_kernels.scatter_vision` and :func:`m4ov_kernels.deepstack_add`, after a check that
    every sample has as many vision tokens as its images and videos have features. All on the CPU.

    Args:
        mm_token_type_ids: ``[T]`` or ``[1, T]``, integers: 1 at the tokens of images, 2 at those of videos.
        cu_seqlens: ``[S + 1]``, integers: where samples begin; 0 first, T last.
        merge_size: a token stands for ``merge_size · merge_size`` patches.
        image_grid_thw, video_grid_thw: ``[n, 3]``, integers: frames, rows and columns of patches of all images, and of
            all videos, sample after sample.
        images_per_sample, videos_per_sample: how many of them each sample has. Without it every sample takes the next
            ones until it has no tokens left.

    Raises:
        TypeError, ValueError: an argument is not of this kind; a grid is not positive or not a multiple of
            ``merge_size``; tokens and features of a sample do not match: names the sample.
    """
    types = _host_integers("mm_token_type_ids", mm_token_type_ids)
    if types.ndim == 2 and types.shape[0] == 1:
        types = types[0]
    if types.ndim != 1:
        checks.refuse(ValueError, _OP, "mm_token_type_ids", "[T] or [1, T]", checks.describe(mm_token_type_ids))
    bounds = _host_integers("cu_seqlens", cu_seqlens)
    if bounds.ndim != 1 or not len(bounds) or int(bounds[0]) != 0 or int(bounds[-1]) != len(types):
        expected = f"[S + 1], from 0 to {len(types)}, the number of tokens"
        came = bounds.tolist() if bounds.ndim == 1 and len(bounds) < 9 else checks.describe(cu_seqlens)
        checks.refuse(ValueError, _OP, "cu_seqlens", expected, came)
    falling = (bounds.diff() < 0).nonzero()
    if len(falling):
        sample = int(falling[0])
        came = f"{int(bounds[sample + 1])} after {int(bounds[sample])} at the end of sample {sample}"
        checks.refuse(ValueError, _OP, "cu_seqlens", "in ascending order", came)
    if not isinstance(merge_size, int) or isinstance(merge_size, bool):
        checks.refuse(TypeError, _OP, "merge_size", "an int", checks.describe(merge_size))
    if merge_size < 1:
        checks.refuse(ValueError, _OP, "merge_size", "at least 1", merge_size)
    return VisionPositions(
        _positions(types == IMAGE, bounds, "image", image_grid_thw, images_per_sample, merge_size),
        _positions(types == VIDEO, bounds, "video", video_grid_thw, videos_per_sample, merge_size),
    )


def _positions(
    mask: Tensor,
    bounds: Tensor,
    kind: str,
    grid_thw: Tensor | None,
    per_sample: Sequence[int] | Tensor | None,
    merge_size: int,
) -> Tensor:
    positions = mask.nonzero()[:, 0]
    features = _features(f"{kind}_grid_thw", grid_thw, merge_size)  # [n]
    tokens = torch.searchsorted(positions, bounds).diff()  # [S]
    if per_sample is None:
        _match(tokens, features, kind)
        return positions
    name = f"{kind}s_per_sample"
    counts = _host_integers(name, per_sample if isinstance(per_sample, Tensor) else torch.as_tensor(per_sample))
    if counts.shape != tokens.shape or bool((counts < 0).any()) or int(counts.sum()) != len(features):
        expected = f"a count for each of {len(tokens)} samples, {len(features)} in all, as {kind}_grid_thw has"
        checks.refuse(ValueError, _OP, name, expected, counts.tolist() if counts.numel() < 9 else int(counts.sum()))
    ends = torch.cat([features.new_zeros(1), features.cumsum(0)])[torch.cat([counts.new_zeros(1), counts.cumsum(0)])]
    wrong = (ends.diff() != tokens).nonzero()
    if len(wrong):
        sample = int(wrong[0])
        _mismatch(sample, int(tokens[sample]), kind, f"{int(counts[sample])} have {int(ends.diff()[sample])} features")
    return positions


def _match(tokens: Tensor, features: Tensor, kind: str) -> None:
    """Every sample's tokens end where the features of an image do."""
    ends = torch.cat([features.new_zeros(1), features.cumsum(0)])
    reached = tokens.cumsum(0)
    place = torch.searchsorted(ends, reached).clamp(max=len(ends) - 1)
    wrong = (ends[place] != reached).nonzero()
    if len(wrong):
        sample = int(wrong[0])
        before = int(reached[sample] - tokens[sample])
        first = int(torch.searchsorted(ends, before))
        left = features[first : first + 5].tolist()
        more = ", …" if len(features) > first + 5 else ""
        _mismatch(sample, int(tokens[sample]), kind, f"from {kind} {first} on have [{str(left)[1:-1]}{more}] features")
    if int(ends[-1]) != int(tokens.sum()):
        sample, first = len(tokens) - 1, int(place[-1]) if len(place) else 0
        count = int(tokens[-1]) if len(tokens) else 0
        over = f"up to {kind} {first - 1} have as many features, and {len(features) - first} more are left"
        _mismatch(max(sample, 0), count, kind, over)


def _mismatch(sample: int, tokens: int, kind: str, features: str) -> None:
    raise ValueError(f"{_OP}: sample {sample} has {tokens} {kind} tokens, but its {kind}s {features}")


def _features(name: str, grid_thw: Tensor | None, merge_size: int) -> Tensor:
    """How many features each image gives."""
    if grid_thw is None:
        return torch.zeros(0, dtype=torch.int64)
    grids = _host_integers(name, grid_thw)
    if grids.ndim != 2 or grids.shape[1] != 3:
        checks.refuse(ValueError, _OP, name, "[n, 3]", checks.describe(grid_thw))
    bad = ((grids < 1).any(1) | (grids[:, 1:] % merge_size != 0).any(1)).nonzero()
    if len(bad):
        index = int(bad[0])
        raise ValueError(
            f"{_OP}: {name}[{index}] is {grids[index].tolist()}: expected positive t, h and w, with h and w multiples "
            f"of {merge_size}"
        )
    return grids.prod(1) // merge_size**2


def _host_integers(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex() or tensor.is_sparse:
        checks.refuse(TypeError, _OP, name, "a tensor of integers", checks.describe(tensor))
    if tensor.device.type != "cpu":
        expected = "on the CPU, where a batch is packed"
        checks.refuse(ValueError, _OP, name, expected, checks.describe(tensor))
    return tensor.to(torch.int64)
