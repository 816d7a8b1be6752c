"""The feed-forward blocks: gated, of language models, and with GELU, of vision towers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from m4ov_kernels.activation import gelu, swiglu
from m4ov_kernels.nn.plain import is_plain
from m4ov_kernels.nn.quantized_pair import quantized_swiglu


class SwiGLUMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) · up_proj(x))``; parameters named as in Hugging Face's modules. Projections that
    are quantised alike become one linear: :func:`m4ov_kernels.nn.quantized_pair.quantized_swiglu`.

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
        activated = quantized_swiglu(self.gate_proj, self.up_proj, x)
        if activated is None:
            activated = swiglu(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(activated)


class GELU(nn.GELU):
    """:func:`m4ov_kernels.gelu` as PyTorch's module; an ``nn.GELU`` becomes one by a change of its class."""

    def forward(self, input: Tensor) -> Tensor:
        """``[...]`` → ``[...]``."""
        return gelu(input, approximate=self.approximate)


class VisionMLP(nn.Module):
    """``linear_fc2(gelu(linear_fc1(x)))``; parameters named as in Hugging Face's Qwen3-VL.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width of the activation.
        approximate: see :func:`m4ov_kernels.gelu`.
    """

    approximate = "tanh"  # on the class too: a patched Hugging Face module has no such attribute of its own

    def __init__(self, hidden_size: int, intermediate_size: int, *, approximate: str = "tanh") -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(hidden_size, intermediate_size)
        self.linear_fc2 = nn.Linear(intermediate_size, hidden_size)
        if approximate != self.approximate:
            self.approximate = approximate

    def forward(self, hidden_state: Tensor) -> Tensor:
        """``[..., hidden_size]`` → ``[..., hidden_size]``."""
        return self.linear_fc2(linear_gelu(self.linear_fc1, hidden_state, self.approximate))


def linear_gelu(linear: nn.Module, input: Tensor, approximate: str) -> Tensor:
    """``gelu(linear(input))``. Where ``linear`` is a plain ``nn.Linear`` without hooks its bias is added by the
    activation, which sums the bias's gradient while it computes its own; anything else (a LoRA layer, a linear that
    FSDP or a quantiser has changed) is called as it is."""
    if not (isinstance(linear, nn.Linear) and is_plain(linear, nn.Linear)) or linear.bias is None:
        return gelu(linear(input), approximate=approximate)
    product = F.linear(input, linear.weight)
    return gelu(product, bias=linear.bias.to(product.dtype), approximate=approximate)  # autocast changes the dtype
