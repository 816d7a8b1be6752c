"""Samples as Qwen3-VL reads them, and batches of samples that may share images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from m4ov.data.images import ImageGeometry
from m4ov.data.tokenizer import IMAGE, TURN_END, VIDEO, completion, prompt, token_id
from m4ov_kernels.packing import PackedBatch, Patches
from m4ov_kernels.packing import Sample as Encoded

IGNORE = -100


class Encoder:
    """Encodes questions about one image each; remembers what it encoded, because questions repeat."""

    def __init__(self, tokenizer: Tokenizer, geometry: ImageGeometry) -> None:
        self.tokenizer, self.geometry = tokenizer, geometry
        self.image_token, self.video_token = token_id(tokenizer, IMAGE), token_id(tokenizer, VIDEO)
        self.end_token = token_id(tokenizer, TURN_END)
        self._known: dict[tuple[str, str], Encoded] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what it remembers: another process would get a file descriptor for every tensor."""
        return {**self.__dict__, "_known": {}}

    def __call__(self, question: str, answer: str) -> Encoded:
        """``input_ids``: the question, the answer and its end token; ``labels``: those at the answer and its end token,
        -100 elsewhere, not shifted. Without its image."""
        key = (question, answer)
        if key not in self._known:
            self._known[key] = self._encode(question, answer)
        return self._known[key]

    def _encode(self, question: str, answer: str) -> Encoded:
        asked = self.tokenizer.encode(prompt(question, self.geometry.tokens)).ids
        answered = self.tokenizer.encode(completion(answer)).ids
        input_ids = torch.tensor(asked + answered, dtype=torch.int64)
        return Encoded(input_ids, torch.tensor([IGNORE] * len(asked) + answered, dtype=torch.int64))

    def pack(
        self,
        samples: Sequence[Encoded],
        image_of_sample: Sequence[int] | np.ndarray,
        pixel_values: np.ndarray | Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> PackedBatch:
        """One row of several samples; a batch has an image once, however many samples ask about it.

        Args:
            samples: at least one, from this encoder.
            image_of_sample: for each sample, the index of its image in ``pixel_values``.
            pixel_values: float32 ``[N * patches, …]``, from :func:`m4ov.data.images.patchify`.
            dtype: of the batch's ``pixel_values``.

        Raises:
            ValueError: no sample, or an index without an image.
        """
        count = len(pixel_values) // self.geometry.patches
        owner = np.asarray(image_of_sample, dtype=np.int64)
        if not len(samples) or owner.shape != (len(samples),):
            got = f"{len(samples)} samples, {len(owner)} images"
            raise ValueError(f"pack needs samples and one image for each; got {got}")
        if owner.min() < 0 or owner.max() >= count:
            raise ValueError(f"image_of_sample must lie in 0 to {count - 1}; got {owner.min()} to {owner.max()}")
        images = Patches.split(torch.as_tensor(pixel_values), [self.geometry.grid_thw] * count)
        return PackedBatch.from_samples(
            [replace(sample, images=[images[image]]) for sample, image in zip(samples, owner, strict=True)],
            image_token_id=self.image_token,
            video_token_id=self.video_token,
            merge_size=self.geometry.merge_size,
            dtype=dtype,
        )
