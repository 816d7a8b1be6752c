"""Front of Qwen2.5-VL's vision tower, whose layers attend within windows or within images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import vision_utils
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from m4ov_kernels.nn.attention import PatchOrder
from m4ov_kernels.patches.attention import Sequences
from m4ov_kernels.patches.packing import of_images, sequences_of
from m4ov_kernels.patches.vision_tower import theta_of


class OrderOfWindows:
    """Hands rows and columns of patches down to the attention, in the order of the windows."""

    keeps_signature = True

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        tower: Any = self
        device, count = hidden_states.device, hidden_states.shape[0]
        images = of_images(grid_thw, kwargs.pop("cu_seqlens", None), device)
        positions = vision_utils.get_vision_position_ids(grid_thw, tower.spatial_merge_size, kwargs=kwargs)
        index, bounds = vision_utils.get_vision_window_index(
            grid_thw,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
            kwargs=kwargs,
        )
        windows = sequences_of(bounds, device, kwargs.pop("max_window_seqlen", None))
        kwargs.pop("max_seqlen", None)
        index = index.to(device, non_blocking=True)

        def permuted(x: Tensor) -> Tensor:
            blocks = x.reshape(count // tower.spatial_merge_unit, tower.spatial_merge_unit, -1)
            return blocks[index].reshape(count, -1)

        hidden_states = permuted(tower.patch_embed(hidden_states))
        positions = permuted(positions.to(device, non_blocking=True))
        order = PatchOrder(None, tower.spatial_merge_size, positions, theta_of(tower))
        for number, block in enumerate(tower.blocks):
            here: Sequences = images if number in tower.fullatt_block_indexes else windows
            hidden_states = block(
                hidden_states,
                cu_seqlens=here.cu_seqlens,
                max_seqlen=here.longest,
                position_embeddings=order,
                **kwargs,
            )
        merged = tower.merger(hidden_states)[torch.argsort(index)]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=merged)
