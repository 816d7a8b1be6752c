"""Running Qwen3-VL on packed batches in which several samples share an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from m4ov.data.packing import PackedBatch


def forward(model: Qwen3VLForConditionalGeneration, batch: PackedBatch, *, with_labels: bool = True) -> Any:
    """The model's output on a packed batch: the vision tower sees each image once, however many samples ask about it.

    Args:
        model: patched or not; both keep samples apart by the text positions.
        with_labels: compute the loss, the mean over all labels of the batch.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "mm_token_type_ids": batch.mm_token_type_ids,
        "image_grid_thw": batch.image_grid_thw,
        "use_cache": False,
    }
    if with_labels:
        inputs["labels"] = batch.labels
    features = model.model.get_image_features(batch.pixel_values, batch.image_grid_thw, return_dict=True)
    index = _token_index(batch, model.config.vision_config.spatial_merge_size)
    features.pooler_output = [torch.cat(tuple(features.pooler_output)).index_select(0, index)]
    features.deepstack_features = [
        [(layer if isinstance(layer, Tensor) else torch.cat(tuple(layer))).index_select(0, index)]
        for layer in features.deepstack_features
    ]
    return model(**inputs, mm_encoder_outputs={"image": features})


def _token_index(batch: PackedBatch, merge_size: int) -> Tensor:
    """For each image token of the row, which row of the image features it takes: int64 ``[image tokens]``."""
    tokens = batch.image_grid_thw.prod(dim=1) // merge_size**2  # [N]
    starts = tokens.cumsum(0) - tokens
    counts = tokens[batch.image_of_sample]  # [S]
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return starts[batch.image_of_sample].repeat_interleave(counts) + within
