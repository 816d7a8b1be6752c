"""Running Qwen3-VL on packed batches, in which several samples may share an image."""

from __future__ import annotations

import inspect
import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from m4ov_kernels.packing import PackedBatch, VisionInputs

# transformers 5.14 takes no image features that were computed before; there, images are repeated instead.
_TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(Qwen3VLForConditionalGeneration.forward).parameters


def forward(model: nn.Module, batch: PackedBatch, *, with_labels: bool = True) -> Any:
    """The model's output on a packed batch: the vision tower sees each image once, however many samples ask about it.

    Args:
        model: ``Qwen3VLForConditionalGeneration``, patched or not; both keep samples apart by the text positions.
        with_labels: compute the loss, the mean over all labels of the batch.
    """
    hf: Any = model
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids[None],
        "position_ids": torch.cat([batch.text_position_ids[None], batch.position_ids])[:, None],  # [4, 1, T]
        "mm_token_type_ids": batch.mm_token_type_ids[None],
        "use_cache": False,
    }
    if with_labels:
        inputs["labels"] = batch.labels[None]
    images, videos = batch.images, batch.videos
    if videos is not None:
        inputs["pixel_values_videos"], inputs["video_grid_thw"] = _of_every_place(videos)
    if images is None:
        return hf(**inputs)
    if not _TAKES_FEATURES:
        inputs["pixel_values"], inputs["image_grid_thw"] = _of_every_place(images)
        return hf(**inputs)
    features = hf.model.get_image_features(images.pixel_values, images.grid_thw, return_dict=True)
    features.pooler_output = [torch.cat(tuple(features.pooler_output)).index_select(0, images.features)]
    features.deepstack_features = [
        [(layer if isinstance(layer, Tensor) else torch.cat(tuple(layer))).index_select(0, images.features)]
        for layer in features.deepstack_features
    ]
    return hf(**inputs, image_grid_thw=images.grid_thw, mm_encoder_outputs={"image": features})


def _of_every_place(vision: VisionInputs) -> tuple[Tensor, Tensor]:
    """``(pixel_values, grid_thw)`` with an image for every place where one stands, shared or not."""
    if not vision.shared:
        return vision.pixel_values, vision.grid_thw
    bounds = [0, *accumulate(math.prod(grid) for grid in vision.grids)]
    places = [image for images in vision.shown for image in images]
    pixels = torch.cat([vision.pixel_values[bounds[image] : bounds[image + 1]] for image in places])
    return pixels, torch.cat([vision.grid_thw[image : image + 1] for image in places])
