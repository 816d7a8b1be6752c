"""Patch embedding as the matrix product that it is."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbed(nn.Module):
    """Projects flattened patches. The weight is held by a ``Conv3d``, so that checkpoints load as they are.

    A convolution whose stride equals its kernel size, on an input of exactly one kernel, is a matrix product;
    convolution libraries take it by their general road (pytorch#174051: 10 to 20 times slower).

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
        weight = self.proj.weight.flatten(1)  # [hidden_size, C·T·P·P]
        return F.linear(hidden_states.reshape(-1, weight.shape[1]).to(weight.dtype), weight, self.proj.bias)
