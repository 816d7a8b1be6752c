"""Fronts of Qwen-VL's vision towers: positions of patches from their grids."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import vision_utils
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from m4ov_kernels.nn import PositionEmbedding
from m4ov_kernels.nn.attention import PatchOrder, VisionAttention
from m4ov_kernels.nn.plain import is_plain
from m4ov_kernels.patches.attention import VISION_ATTENTION, Sequences, vision_attention
from m4ov_kernels.patches.packing import of_images
from m4ov_kernels.patches.text_attention import attention_function

# What a caller may have computed before; the operators need none of it.
_PRECOMPUTED = ("interp_indices", "interp_weights", "bilinear_indices", "bilinear_weights", "position_ids")
_NEW = hasattr(vision_utils, "get_vision_interpolation_indices_and_weights")  # from 5.17 on


class VisionTower:
    """The forward of Qwen3-VL's tower in steps, of which the fronts below replace one each."""

    keeps_signature = True
    original: type[nn.Module]

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        tower: Any = self
        sequences = kwargs.get("sequences")
        given = kwargs.pop("cu_seqlens", None)
        kwargs.pop("max_seqlen", None)
        if sequences is None:  # another attention was chosen
            sequences = of_images(grid_thw, given, hidden_states.device)
        hidden_states = tower.patch_embed(hidden_states)
        order = self.order(hidden_states, grid_thw, kwargs)
        hidden_states = self.add_positions(hidden_states, grid_thw, kwargs)
        for name in _PRECOMPUTED:
            kwargs.pop(name, None)
        features = []
        for index, block in enumerate(tower.blocks):
            hidden_states = block(hidden_states, cu_seqlens=sequences.cu_seqlens, position_embeddings=order, **kwargs)
            if index in tower.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)]
                features.append(merger(hidden_states))
        outputs = sys.modules[self.original.__module__].BaseModelOutputWithDeepstackFeatures
        return outputs(
            last_hidden_state=hidden_states, pooler_output=tower.merger(hidden_states), deepstack_features=features
        )

    def add_positions(self, hidden_states: Tensor, grid_thw: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """As transformers does."""
        tower: Any = self
        options = {"num_grid_per_side": tower.num_grid_per_side, "spatial_merge_size": tower.spatial_merge_size}
        if _NEW:
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid_thw,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                kwargs=kwargs,
                **options,
            )
            embeddings = (tower.pos_embed(indices) * weights[:, :, None]).sum(1)
        else:
            indices, weights = vision_utils.get_vision_bilinear_indices_and_weights(grid_thw, kwargs=kwargs, **options)
            embeddings = (tower.pos_embed(indices) * weights[:, :, None]).sum(0)
        return hidden_states + embeddings.to(hidden_states.dtype)

    def order(self, hidden_states: Tensor, grid_thw: Tensor, kwargs: dict[str, Any]) -> Any:
        """As transformers does: sines and cosines."""
        return sines_and_cosines(self, hidden_states, grid_thw, kwargs)


def sines_and_cosines(tower: Any, hidden_states: Tensor, grid_thw: Tensor, kwargs: dict[str, Any]) -> Any:
    """Of every patch, by transformers."""
    position_ids = vision_utils.get_vision_position_ids(grid_thw, tower.spatial_merge_size, kwargs=kwargs)
    if _NEW:
        return tower.rotary_pos_emb(hidden_states, position_ids)
    angles = tower.rotary_pos_emb(position_ids).reshape(hidden_states.shape[0], -1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class InterpolatedPositions(VisionTower):
    """Position embeddings resampled and added in one pass."""

    def add_positions(self, hidden_states: Tensor, grid_thw: Tensor, kwargs: dict[str, Any]) -> Tensor:
        tower: Any = self
        if not is_plain(tower.pos_embed, nn.Embedding):
            return super().add_positions(hidden_states, grid_thw, kwargs)
        return PositionEmbedding.forward(tower.pos_embed, hidden_states, grid_thw, tower.spatial_merge_size)


class OrderOfPatches(VisionTower):
    """Hands the grids down to :class:`RotatedVisionAttention`."""

    def order(self, hidden_states: Tensor, grid_thw: Tensor, kwargs: dict[str, Any]) -> PatchOrder:
        tower: Any = self
        grid_thw = grid_thw.to(hidden_states.device, non_blocking=True)
        return PatchOrder(grid_thw, tower.spatial_merge_size, None, theta_of(tower))


def theta_of(tower: Any) -> float:
    parameters = getattr(tower.config, "rope_parameters", None)
    return float(parameters["rope_theta"]) if parameters else float(tower.rotary_pos_emb.theta)


class RotatedVisionAttention(VisionAttention):
    """Front of the attention of a vision tower, which takes the order of patches for ``position_embeddings``."""

    keeps_signature = True

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: PatchOrder, **kwargs: Any
    ) -> Tensor:
        attention: Any = self
        heads = [x.transpose(0, 1)[None] for x in self.project(hidden_states, position_embeddings)]  # [1, H, N, D]
        options: dict[str, Any] = {
            "scaling": attention.scaling,
            "dropout": attention.attention_dropout if attention.training else 0.0,
            "is_causal": False,
        }
        longest = kwargs.pop("max_seqlen", None)
        implementation, call = attention.config._attn_implementation, attention_function(attention)
        if implementation == VISION_ATTENTION:
            kwargs.setdefault("sequences", Sequences(cu_seqlens, longest))
            q, k, v = heads
            output, _ = vision_attention(self, q, k, v, None, **options, **kwargs)
        elif "flash" in implementation:
            longest = cu_seqlens.diff().max() if longest is None else longest
            ends = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            ends |= {"max_length_q": longest, "max_length_k": longest}
            output, _ = call(attention, *heads, attention_mask=None, **options, **ends, **kwargs)
        else:
            options |= {"attention_mask": None, **kwargs}
            options.pop("sequences", None)
            images = zip(*(x.split(cu_seqlens.diff().tolist(), dim=2) for x in heads), strict=True)
            output = torch.cat([call(attention, *image, **options)[0] for image in images], 1)
        return self.proj(output.reshape(hidden_states.shape[0], -1))


def not_bilinear(tower: Any) -> str | None:
    """Why a tower's position embeddings are not resampled as the operator does it."""
    if not _NEW or (tower.interpolation_mode == "bilinear" and tower.interpolation_align_corners):
        return None
    return f"its position embeddings are resampled {tower.interpolation_mode!r}, not bilinear between corners"
