"""The vision tower: patches of images and of frames, packed, to features for the language model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m4ov.models.qwen3_vl.config import VisionConfig
from m4ov_kernels.nn import (
    LayerNorm,
    PatchEmbed,
    PatchMerger,
    PatchOrder,
    PositionEmbedding,
    VisionAttention,
    VisionMLP,
)


class Frames(NamedTuple):
    """Where images and the frames of videos begin among all patches: attention stays inside one.

    Attributes:
        cu_seqlens: int32 ``[F + 1]``.
        max_seqlen: patches of the largest.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, grid_thw: Tensor, grids: tuple[tuple[int, int, int], ...]) -> Frames:
        """Of the grids, on the device and on the host; without a synchronisation."""
        frames, largest = sum(t for t, _, _ in grids), max(h * w for _, h, w in grids)
        sizes = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0], output_size=frames)
        return cls(F.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0)), largest)


class VisionFeatures(NamedTuple):
    """What the tower makes of N patches: one row for ``spatial_merge_size²`` of them, of the language model's width.

    Attributes:
        merged: ``[V, D]``, in the place of the vision tokens.
        deepstack: of each block in ``deepstack_visual_indexes``, ``[V, D]``, for the language model's first layers.
    """

    merged: Tensor
    deepstack: tuple[Tensor, ...]


class VisionBlock(nn.Module):
    """Attention inside each frame, then an MLP; both pre-norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor, order: PatchOrder, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """``[N, hidden_size]`` → ``[N, hidden_size]``."""
        attended = self.attn(self.norm1(hidden_states), order, cu_seqlens, max_seqlen)
        normed, residual = self.norm2(attended, residual=hidden_states)
        return residual + self.mlp(normed)


class VisionTower(nn.Module):
    """Patches → features; parameters named as in Hugging Face's ``model.visual``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(
            config.in_channels, config.temporal_patch_size, config.patch_size, config.hidden_size
        )
        self.pos_embed = PositionEmbedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        shape = (config.hidden_size, config.spatial_merge_size, config.out_hidden_size)
        self.merger = PatchMerger(*shape)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(*shape, use_postshuffle_norm=True) for _ in config.deepstack_visual_indexes
        )

    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor, grids: tuple[tuple[int, int, int], ...]
    ) -> VisionFeatures:
        """All images and videos of a batch at once.

        Args:
            pixel_values: ``[N, C · T · P · P]``, floating; converted to the dtype of the weights.
            grid_thw: int64 ``[n, 3]``, on the device.
            grids: the same on the host.
        """
        merge_size = self.config.spatial_merge_size
        cu_seqlens, max_seqlen = Frames.of(grid_thw, grids)
        order = PatchOrder(grid_thw, merge_size, None, self.config.rope_theta)
        hidden_states = self.pos_embed(self.patch_embed(pixel_values), grid_thw, merge_size)
        deepstack: dict[int, Tensor] = {}
        mergers = dict(zip(self.config.deepstack_visual_indexes, self.deepstack_merger_list, strict=True))
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, order, cu_seqlens, max_seqlen)
            if index in mergers:
                deepstack[index] = mergers[index](hidden_states)
        # In the order of the blocks: Hugging Face appends them as they come, whatever the order of the indexes.
        return VisionFeatures(self.merger(hidden_states), tuple(deepstack.values()))
