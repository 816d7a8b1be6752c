"""Patch embedding as the matrix product that it is."""

from __future__ import annotations

from torch import Tensor, nn

from m4ov_kernels.nn.plain import is_plain
from m4ov_kernels.vision import patch_embed


class PatchEmbed(nn.Module):
    """Projects flattened patches. The weight is held by a ``Conv3d``, so that checkpoints load as they are.

    See :func:`m4ov_kernels.patch_embed`.

    Args:
        in_channels, temporal_patch_size, patch_size: shape of one patch, ``[C, T, P, P]``.
        hidden_size: width of the output.
    """

    def __init__(self, in_channels: int, temporal_patch_size: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        kernel = (temporal_patch_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=kernel, stride=kernel)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[N, C·T·P·P]`` (or ``[N, C, T, P, P]``) → ``[N, hidden_size]``, in the dtype of the weight."""
        weight = self.proj.weight
        if not is_plain(self.proj, nn.Conv3d):
            return self.proj(hidden_states.reshape(-1, *weight.shape[1:]).to(weight.dtype)).flatten(1)
        return patch_embed(hidden_states.reshape(-1, weight.shape[1:].numel()), weight, self.proj.bias)
