"""The gated feed-forward block of Llama-like language models."""

from __future__ import annotations

from torch import Tensor, nn

from m4ov_kernels.activation import swiglu


class SwiGLUMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) · up_proj(x))``; parameters named as in Hugging Face's modules.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width of the gate.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` → ``[..., hidden_size]``."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
