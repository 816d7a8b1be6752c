"""From patches to features of the language model's width."""

from __future__ import annotations

from torch import Tensor, nn

from m4ov_kernels.nn.mlp import linear_gelu
from m4ov_kernels.nn.norm import LayerNorm


class PatchMerger(nn.Module):
    """``linear_fc2(gelu(linear_fc1(norm(x))))`` of neighbouring patches as one; parameters named as in Hugging Face's
    Qwen3-VL.

    Args:
        hidden_size: width of a patch.
        merge_size: patches a side of one feature.
        out_hidden_size: width of the features.
        use_postshuffle_norm: normalise the joined patches, not each.
    """

    def __init__(
        self, hidden_size: int, merge_size: int, out_hidden_size: int, *, use_postshuffle_norm: bool = False
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size * merge_size**2
        self.use_postshuffle_norm = use_postshuffle_norm
        self.norm = LayerNorm(self.hidden_size if use_postshuffle_norm else hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.hidden_size, self.hidden_size)
        self.linear_fc2 = nn.Linear(self.hidden_size, out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, hidden_size]``, blocks of ``merge_size²`` patches one after the other → ``[N / merge_size², out]``."""
        x = self.norm(x.view(-1, self.hidden_size) if self.use_postshuffle_norm else x)
        return self.linear_fc2(linear_gelu(self.linear_fc1, x.view(-1, self.hidden_size), "none"))
