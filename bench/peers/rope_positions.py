"""Peers of the rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from m4ov_bench.peers.base import Absent, Peer, transformers_module


def get_rope_index(samples: int, image_grid_thw: Tensor, image_token_id: int, merge_size: int) -> dict[str, Peer]:
    """Hugging Face's own, of samples of one length as the rows of one batch; a function of ``input_ids`` ``[T]``."""
    module = transformers_module("transformers.models.qwen3_vl.modeling_qwen3_vl")
    if isinstance(module, Absent):
        return {"get_rope_index": module}
    # It reads nothing of the model but this number.
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge_size)))
    model.get_vision_position_ids = module.Qwen3VLModel.get_vision_position_ids.__get__(model)
    theirs: Callable[..., Any] = module.Qwen3VLModel.get_rope_index

    def call(input_ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = input_ids.view(samples, -1)
        positions, deltas = theirs(model, rows, (rows == image_token_id).to(torch.int32), image_grid_thw)
        return positions.flatten(1), deltas[:, 0]

    return {"get_rope_index": call}
