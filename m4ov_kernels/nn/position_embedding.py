"""A learned square table of position embeddings, resampled to the grid of each image."""

from __future__ import annotations

from torch import Tensor, nn

from m4ov_kernels.vision import interpolate_position_embeddings


class PositionEmbedding(nn.Embedding):
    """:func:`m4ov_kernels.interpolate_position_embeddings` with its table.

    Args:
        num_position_embeddings: S·S.
        hidden_size: width.
    """

    def __init__(self, num_position_embeddings: int, hidden_size: int) -> None:
        super().__init__(num_position_embeddings, hidden_size)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, merge_size: int) -> Tensor:  # type: ignore[override]
        """``[N, hidden_size]`` and ``[n, 3]`` → their sum with the embeddings of their places."""
        return interpolate_position_embeddings(
            self.weight, grid_thw, merge_size=merge_size, hidden_states=hidden_states
        )
