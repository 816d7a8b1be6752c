"""Front of Qwen-VL's inner model: M-RoPE positions by ``mrope_positions`` instead of a loop over tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m4ov_kernels.rope import mrope_positions


class MRopePositions:
    """Replaces ``get_rope_index``, the same integers."""

    kind = "qwen3_vl"

    def get_rope_index(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """``[B, T]`` → positions ``[3, B, T]`` and deltas ``[B, 1]``. On a GPU a mask costs a synchronisation."""
        model: Any = self
        rows, length = input_ids.shape
        device = input_ids.device
        keep = None if attention_mask is None else attention_mask.to(device).bool()
        if keep is None:
            tokens, types = input_ids.flatten(), mm_token_type_ids.flatten()
            cu_seqlens = torch.arange(rows + 1, device=device) * length
        else:
            tokens, types = input_ids[keep], mm_token_type_ids[keep]
            cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0))
        vision = model.config.vision_config
        only = {} if self.kind == "qwen3_vl" else {"tokens_per_second": float(vision.tokens_per_second)}
        if second_per_grid_ts is not None and self.kind != "qwen3_vl":
            seconds = torch.as_tensor(second_per_grid_ts, dtype=torch.float32)
            only["second_per_grid_ts"] = seconds.to(device, non_blocking=True)  # type: ignore[assignment]
        positions, deltas = mrope_positions(
            tokens.long(),
            cu_seqlens=cu_seqlens,
            mm_token_type_ids=types if types.dtype in (torch.int32, torch.int64) else types.long(),
            image_grid_thw=_on(image_grid_thw, device),
            video_grid_thw=_on(video_grid_thw, device),
            image_token_id=model.config.image_token_id,
            video_token_id=model.config.video_token_id,
            merge_size=vision.spatial_merge_size,
            kind=self.kind,
            **only,  # type: ignore[arg-type]
        )
        if keep is None:
            positions = positions.view(3, rows, length)
        else:
            positions = positions.new_zeros(3, rows, length).masked_scatter(keep, positions)
        return positions.to(input_ids.dtype), deltas[:, None]


class Qwen2_5MRopePositions(MRopePositions):  # noqa: N801
    kind = "qwen2_5_vl"


def _on(grid: Tensor | None, device: torch.device) -> Tensor | None:
    return None if grid is None else grid.to(device, torch.int64, non_blocking=True)
