"""``PackedBatch``: samples one after the other in one row, with everything that belongs to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.packing import vision
from m4ov_kernels.packing.vision import Patches, VisionInputs
from m4ov_kernels.rope import mrope_positions
from m4ov_kernels.rope.values import types_of

IGNORE = -100  # the label of a token that does not count


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation, on the host.

    Attributes:
        input_ids: int64 ``[L]``, with one image (video) token for every merged feature of the images (videos).
        labels: int64 ``[L]``, not shifted; ``None``: nothing counts.
        images, videos: in the order of their tokens.
        mm_token_type_ids: int64 ``[L]``, 0 at text, 1 at image, 2 at video tokens; ``None``: as the token ids say.
    """

    input_ids: Tensor
    labels: Tensor | None = None
    images: Sequence[Patches] = field(default=())
    videos: Sequence[Patches] = field(default=())
    mm_token_type_ids: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """N samples in one row of T tokens, which do not see each other.

    ``batch[2]``, ``batch[1:4]`` and ``batch[[3, 0]]`` are batches of some of the samples; :meth:`concatenate` joins
    batches. Whatever is done, a sample keeps its labels, positions, images and videos.

    Attributes:
        input_ids, labels: int64 ``[T]``. Labels are not shifted; the first of each sample is -100, so that in a shifted
            loss no sample predicts the beginning of the next.
        mm_token_type_ids: int64 ``[T]``: 0 at text, 1 at image, 2 at video tokens.
        position_ids: int64 ``[3, T]``, M-RoPE positions of each sample for itself.
        text_position_ids: int64 ``[T]``, counting from 0 in each sample.
        rope_deltas: int64 ``[N]``, see :func:`m4ov_kernels.mrope_positions`.
        cu_seqlens: int32 ``[N + 1]``: sample ``n`` has the tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``.
        images, videos: ``None`` where there are none.
        lengths, labelled: tokens, and tokens that count, of each sample; on the host.
    """

    input_ids: Tensor
    labels: Tensor
    mm_token_type_ids: Tensor
    position_ids: Tensor
    text_position_ids: Tensor
    rope_deltas: Tensor
    cu_seqlens: Tensor
    images: VisionInputs | None
    videos: VisionInputs | None
    lengths: tuple[int, ...]
    labelled: tuple[int, ...]

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[Sample],
        *,
        image_token_id: int,
        video_token_id: int,
        merge_size: int,
        kind: str = "qwen3_vl",
        tokens_per_second: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedBatch:
        """Pack samples, and check what the host knows.

        Args:
            samples: at least one, on the CPU.
            image_token_id, video_token_id, merge_size, kind, tokens_per_second: see
                :func:`m4ov_kernels.mrope_positions`.
            dtype: of the batch's ``pixel_values``; ``None``: theirs.

        Raises:
            TypeError, ValueError: naming the sample and what is wrong with it: shapes, dtypes, grids that are not of as
                many patches, or vision tokens that are not as many as the features of its images or videos.
        """
        if not len(samples):
            raise ValueError("PackedBatch: samples must be at least one; got none")
        for index, sample in enumerate(samples):
            _check_tokens(index, sample)
        lengths = tuple(sample.input_ids.shape[0] for sample in samples)
        cu_seqlens = _bounds(lengths)
        input_ids = torch.cat([sample.input_ids for sample in samples])
        mm_token_type_ids = _types(samples, input_ids, image_token_id, video_token_id)
        for code, name in ((1, "image"), (2, "video")):
            counts = _counts(mm_token_type_ids == code, cu_seqlens)
            for index, (sample, count) in enumerate(zip(samples, counts, strict=True)):
                _check_patches(index, name, sample.images if code == 1 else sample.videos, count, merge_size)
        labels = torch.cat([_labels(sample) for sample in samples])
        labels[cu_seqlens[:-1][cu_seqlens.diff() > 0].long()] = IGNORE
        videos = [video for sample in samples for video in sample.videos]
        seconds = [video.second_per_grid for video in videos if video.second_per_grid is not None]
        if seconds and len(seconds) < len(videos):
            raise ValueError("PackedBatch: second_per_grid must be given for all videos or for none; got both")
        position_ids, deltas = mrope_positions(
            input_ids,
            cu_seqlens=cu_seqlens,
            mm_token_type_ids=mm_token_type_ids,
            image_grid_thw=_grids([image for sample in samples for image in sample.images]),
            video_grid_thw=_grids(videos),
            second_per_grid_ts=torch.tensor(seconds, dtype=torch.float32) if seconds else None,
            image_token_id=image_token_id,
            video_token_id=video_token_id,
            merge_size=merge_size,
            kind=kind,
            tokens_per_second=tokens_per_second,
        )
        inputs = []
        for code, patches_of in ((1, [s.images for s in samples]), (2, [s.videos for s in samples])):
            positions = (mm_token_type_ids == code).nonzero()[:, 0]
            inputs.append(vision.collect(patches_of, positions, merge_size, dtype))
        return cls(
            input_ids=input_ids,
            labels=labels,
            mm_token_type_ids=mm_token_type_ids,
            position_ids=position_ids,
            text_position_ids=torch.cat([torch.arange(length) for length in lengths]),
            rope_deltas=deltas,
            cu_seqlens=cu_seqlens,
            images=inputs[0],
            videos=inputs[1],
            lengths=lengths,
            labelled=tuple(_counts(labels != IGNORE, cu_seqlens)),
        )

    @classmethod
    def concatenate(cls, batches: Sequence[PackedBatch]) -> PackedBatch:
        """The samples of several batches in one, in order.

        Raises:
            ValueError: there is none, or they were not made alike (``merge_size``, devices, dtypes).
        """
        if not len(batches):
            raise ValueError("PackedBatch: batches must be at least one; got none")
        lengths = tuple(length for batch in batches for length in batch.lengths)
        begins = [0, *accumulate(batch.tokens for batch in batches)]
        parts = list(zip(batches, begins, strict=False))
        return cls(
            **{name: torch.cat([getattr(batch, name) for batch in batches], -1) for name in _TOKENS},
            rope_deltas=torch.cat([batch.rope_deltas for batch in batches]),
            cu_seqlens=_bounds(lengths).to(batches[0].cu_seqlens.device),
            images=vision.concatenate([(batch.images, len(batch), begin) for batch, begin in parts]),
            videos=vision.concatenate([(batch.videos, len(batch), begin) for batch, begin in parts]),
            lengths=lengths,
            labelled=tuple(count for batch in batches for count in batch.labelled),
        )

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def num_labels(self) -> int:
        """Tokens that count in a loss."""
        return sum(self.labelled)

    def __getitem__(self, which: int | slice | Sequence[int]) -> PackedBatch:
        """The batch of some samples (an index, a slice, several indices in any order), with what belongs to them.

        Raises:
            IndexError: there is no such sample, or none is asked for.
        """
        count = len(self)
        wanted = (
            [which] if isinstance(which, int) else range(*which.indices(count)) if isinstance(which, slice) else which
        )
        if not len(wanted) or not all(-count <= sample < count for sample in wanted):
            raise IndexError(f"PackedBatch: samples must be some of 0 to {count - 1}; got {which}")
        chosen = [sample % count for sample in wanted]
        lengths = tuple(self.lengths[sample] for sample in chosen)
        old, new = [0, *accumulate(self.lengths)], [0, *accumulate(lengths)]
        spans = [slice(old[sample], old[sample + 1]) for sample in chosen]
        return PackedBatch(
            **{name: torch.cat([getattr(self, name)[..., span] for span in spans], -1) for name in _TOKENS},
            rope_deltas=torch.cat([self.rope_deltas[sample : sample + 1] for sample in chosen]),
            cu_seqlens=_bounds(lengths).to(self.cu_seqlens.device),
            images=None if self.images is None else self.images.select(chosen, old, new[:-1]),
            videos=None if self.videos is None else self.videos.select(chosen, old, new[:-1]),
            lengths=lengths,
            labelled=tuple(self.labelled[sample] for sample in chosen),
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> PackedBatch:
        """On another device; ``dtype``: of ``pixel_values``, the only tensors of which it may change."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self._apply(move, lambda pixels: pixels.to(device, dtype, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """In pinned memory, from which ``to(device, non_blocking=True)`` copies while the host goes on."""
        return self._apply(Tensor.pin_memory, Tensor.pin_memory)

    def _apply(self, function: Callable[[Tensor], Tensor], pixels: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            name: function(getattr(self, name)) for name in (*_TOKENS, "rope_deltas", "cu_seqlens")
        }
        for name in ("images", "videos"):
            inputs: VisionInputs | None = getattr(self, name)
            changed[name] = None if inputs is None else inputs.apply(function, pixels)
        return replace(self, **changed)


_TOKENS = ("input_ids", "labels", "mm_token_type_ids", "position_ids", "text_position_ids")


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _grids(patches: Sequence[Patches]) -> Tensor | None:
    return torch.tensor([item.grid_thw for item in patches], dtype=torch.int64) if patches else None


def _labels(sample: Sample) -> Tensor:
    return torch.full_like(sample.input_ids, IGNORE) if sample.labels is None else sample.labels


def _counts(mask: Tensor, bounds: Tensor) -> list[int]:
    """True elements between each bound and the next."""
    sums = torch.zeros(mask.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(mask, 0, out=sums[1:])
    counts: list[int] = sums[bounds.long()].diff().tolist()
    return counts


def _types(samples: Sequence[Sample], input_ids: Tensor, image_token_id: int, video_token_id: int) -> Tensor:
    """Types of all tokens: those that are given, else as the token ids say."""
    types = types_of(input_ids, None, image_token_id, video_token_id)
    if all(sample.mm_token_type_ids is None for sample in samples):
        return types
    parts = zip(samples, types.split([sample.input_ids.shape[0] for sample in samples]), strict=True)
    given = [part if sample.mm_token_type_ids is None else sample.mm_token_type_ids for sample, part in parts]
    return torch.cat(given)


def _check_tokens(index: int, sample: Sample) -> None:
    shape = None
    for name in ("input_ids", "labels", "mm_token_type_ids"):
        tensor = getattr(sample, name)
        if tensor is None and name != "input_ids":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype is not torch.int64 or tensor.device.type != "cpu":
            what = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"PackedBatch: samples[{index}].{name} must be an int64 tensor on the CPU; got {what}")
        shape = shape or tensor.shape
        if tensor.ndim != 1 or tensor.shape != shape:
            expected = "[L]" if name == "input_ids" else f"{list(shape)}, as input_ids"
            raise ValueError(f"PackedBatch: samples[{index}].{name} must be {expected}; got {list(tensor.shape)}")


def _check_patches(index: int, name: str, patches: Sequence[Patches], tokens: int, merge_size: int) -> None:
    features = 0
    for place, item in enumerate(patches):
        where = f"PackedBatch: samples[{index}].{name}s[{place}]"
        if min(item.grid_thw) < 1 or item.grid_thw[1] % merge_size or item.grid_thw[2] % merge_size:
            expected = f"patches in time, height and width, both sides multiples of {merge_size}"
            raise ValueError(f"{where}.grid_thw must be {expected}; got {item.grid_thw}")
        size = math.prod(item.grid_thw)
        if item.pixel_values.ndim != 2 or item.pixel_values.shape[0] != size:
            expected = f"[{size}, C·T·P·P], as its grid {item.grid_thw} says"
            raise ValueError(f"{where}.pixel_values must be {expected}; got {list(item.pixel_values.shape)}")
        features += size // merge_size**2
    if features != tokens:
        raise ValueError(
            f"PackedBatch: samples[{index}] must have as many {name} tokens as its {len(patches)} {name}s have "
            f"features, {features}; got {tokens}"
        )
