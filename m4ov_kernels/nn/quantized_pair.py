"""A gate and an up projection of quantised weights as one linear, with SwiGLU after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m4ov_kernels.dispatch import invariance_requested, is_compiling
from m4ov_kernels.gemm.panels import Panels, halves_of, pair_of
from m4ov_kernels.nn.plain import is_unhooked
from m4ov_kernels.nn.quantized import QuantizedLinear


def quantized_swiglu(gate: nn.Module, up: nn.Module, input: Tensor) -> Tensor | None:
    """``silu(gate(input)) · up(input)`` in float32, rounded once, by one quantised linear; ``None`` if the two are not
    of one scheme, have hooks, or gain nothing by it: where gradients are wanted (whose product would be in float32) and
    elsewhere than on the CPU (where nothing is measured). Nor inside :func:`m4ov_kernels.invariant`, where the bits do
    not depend on whether gradients are wanted.

    The two layers then share one copy of their weights, panels by turns; a layer that is called by itself takes its own
    again.
    """
    if not (isinstance(gate, QuantizedLinear) and isinstance(up, QuantizedLinear)) or invariance_requested():
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, gate.bias, up.bias)):
        return None
    pair = _pair(gate, up)
    if pair is None:
        return None
    input = gate.cast(input)
    biases: Any = (gate.bias, up.bias)
    bias = None if gate.bias is None else torch.cat(biases).to(input.dtype)
    return gate.linear(input, pair, bias, "swiglu")


def _pair(gate: QuantizedLinear[Any], up: QuantizedLinear[Any]) -> Panels | None:
    if not (is_unhooked(gate) and is_unhooked(up)):
        return None
    if gate.pair is not None and gate.pair is up.pair:
        return gate.pair
    if is_compiling() or type(gate) is not type(up) or gate.activation != up.activation:
        return None
    if (gate.bias is None) is not (up.bias is None):
        return None
    held, other = gate.held, up.held
    pair = pair_of(held, other) if isinstance(held, Panels) and isinstance(other, Panels) else None
    if pair is not None:
        for layer, half in zip((gate, up), halves_of(pair, held.form), strict=True):
            layer.share(half, pair)
    return pair
