"""Running Qwen3-VL on packed batches in which several samples share an image."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration


class PackedInputs(Protocol):
    """The tensors of a packed batch: several samples in one row of T tokens, N images, S samples with one image each.

    ``input_ids``, ``labels``, ``mm_token_type_ids``: ``[1, T]``; ``position_ids`` ``[4, 1, T]``; ``pixel_values``
    ``[patches, …]`` and ``image_grid_thw`` ``[N, 3]``, each image once; ``image_of_sample`` ``[S]``.
    """

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def mm_token_type_ids(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def pixel_values(self) -> Tensor: ...
    @property
    def image_grid_thw(self) -> Tensor: ...
    @property
    def image_of_sample(self) -> Tensor: ...


# transformers 5.14 takes no image features that were computed before; there, images are repeated instead.
_TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(Qwen3VLForConditionalGeneration.forward).parameters


def forward(model: nn.Module, batch: PackedInputs, *, with_labels: bool = True) -> Any:
    """The model's output on a packed batch: the vision tower sees each image once, however many samples ask about it.

    Args:
        model: ``Qwen3VLForConditionalGeneration``, patched or not; both keep samples apart by the text positions.
        with_labels: compute the loss, the mean over all labels of the batch.
    """
    hf: Any = model
    merge_size = hf.config.vision_config.spatial_merge_size
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "mm_token_type_ids": batch.mm_token_type_ids,
        "use_cache": False,
    }
    if with_labels:
        inputs["labels"] = batch.labels
    if not _TAKES_FEATURES:
        inputs["pixel_values"] = batch.pixel_values.index_select(0, _rows(batch, 1))
        inputs["image_grid_thw"] = batch.image_grid_thw.index_select(0, batch.image_of_sample)
        return hf(**inputs)
    features = hf.model.get_image_features(batch.pixel_values, batch.image_grid_thw, return_dict=True)
    rows = _rows(batch, merge_size)
    features.pooler_output = [torch.cat(tuple(features.pooler_output)).index_select(0, rows)]
    features.deepstack_features = [
        [(layer if isinstance(layer, Tensor) else torch.cat(tuple(layer))).index_select(0, rows)]
        for layer in features.deepstack_features
    ]
    return hf(**inputs, image_grid_thw=batch.image_grid_thw, mm_encoder_outputs={"image": features})


def _rows(batch: PackedInputs, merge_size: int) -> Tensor:
    """The rows of each sample's image, sample after sample, in what has a row for ``merge_size²`` patches: int64."""
    sizes = batch.image_grid_thw.prod(dim=1) // merge_size**2  # [N]
    starts = sizes.cumsum(0) - sizes
    counts = sizes[batch.image_of_sample]  # [S]
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return starts[batch.image_of_sample].repeat_interleave(counts) + within
