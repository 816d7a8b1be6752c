"""Activation-aware quantisation: scales of inputs, folded into what makes the input, and clipped ranges.

Multiplying the columns of a weight by s and dividing its input by s changes nothing but what is rounded: columns whose
inputs are large are rounded more finely. s = mean|x|^α, α by a grid; folded, it costs nothing when the model runs.
Source: Lin et al., "AWQ: Activation-aware Weight Quantization", MLSys 2024; written from the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m4ov.quantize.calibration import Inputs
from m4ov.quantize.linears import Fold, Group, linear
from m4ov.quantize.schemes import WHOLE_ROW, Scheme

ALPHAS = tuple(step / 20 for step in range(21))
RATIOS = tuple(1 - step / 20 for step in range(1, 11))
# Scores of attention are products of two of these: clipped, they lose their peaks.
_NOT_CLIPPED = ("q_proj", "k_proj", "qkv")


def search(
    weights: Sequence[Tensor], inputs: Inputs, fold: Fold, scheme: Scheme, group_size: int, dtype: torch.dtype
) -> Tensor | None:
    """The scale of each feature of the fold, float32 [features], with which the group's outputs on the sampled rows
    are nearest to the unquantised ones in mean square; ``None``: no scale is better than none.

    Args:
        weights: [N, K] of each linear of the group.
    """
    rows, index = inputs.rows.float(), fold.index
    wide = [weight.detach().float() for weight in weights]
    wanted = [rows @ weight.t() for weight in wide]
    shared = torch.bincount(index, minlength=fold.features)
    mean = torch.zeros(fold.features).index_add_(0, index, inputs.mean.float()) / shared

    def loss(scale: Tensor) -> float:
        columns = scale[index]
        total = 0.0
        for weight, exact in zip(wide, wanted, strict=True):
            rounded = scheme.pack(weight * columns, group_size, dtype).dequantize(torch.float32)
            total += float((scheme.output(rows / columns, rounded) - exact).square().mean())
        return total

    best, least = None, loss(torch.ones(fold.features))
    for alpha in ALPHAS[1:]:
        scale = mean.pow(alpha).clamp_min(1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        found = loss(scale)
        if found < least:
            best, least = scale, found
    return best


@torch.no_grad()
def apply(model: nn.Module, group: Group, scale: Tensor) -> None:
    """Multiply the columns of the group's weights and divide what makes their input, in place. The model computes what
    it did, but for rounding in its own dtype."""
    fold = group.fold
    assert fold is not None
    source = model.get_submodule(fold.module)
    rows = slice(fold.first, fold.first + fold.features)
    for name in ("weight", "bias"):
        parameter = getattr(source, name, None)
        if parameter is not None:
            part = parameter[rows]  # divided in float32 or wider, rounded to its own dtype
            part.copy_(part / scale.view(-1, *[1] * (part.ndim - 1)))
    columns = scale[fold.index]
    for name in group.names:
        weight = linear(model, name).weight
        weight.copy_(weight * columns)


@torch.no_grad()
def clip(name: str, weight: Tensor, inputs: Inputs, scheme: Scheme, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight with each group of each row clamped to the share of its range that, rounded, gives the outputs nearest
    to the unclamped ones on the sampled rows. Four bits alone gain from it.

    Args:
        weight: float32 [N, K].
    """
    if scheme.name != "w4" or name.rpartition(".")[2] in _NOT_CLIPPED:
        return weight
    K = weight.shape[1]
    size = K if group_size == WHOLE_ROW else group_size
    grouped = inputs.rows.float().unflatten(-1, (K // size, size))  # [R, G, g]
    gram = torch.einsum("rgk,rgl->gkl", grouped, grouped)
    parts = weight.unflatten(-1, (K // size, size))  # [N, G, g]
    largest = parts.abs().amax(-1, keepdim=True)

    def loss(clamped: Tensor) -> Tensor:  # [N, G]
        rounded = scheme.pack(clamped.flatten(1), group_size, dtype).dequantize(torch.float32)
        off = rounded.unflatten(-1, (K // size, size)) - parts
        return torch.einsum("ngk,gkl,ngl->ng", off, gram, off)

    best, least = parts, loss(parts)
    for ratio in RATIOS:
        clamped = torch.minimum(parts.abs(), largest * ratio).copysign(parts)
        found = loss(clamped)
        better = found < least
        best = torch.where(better[..., None], clamped, best)
        least = torch.where(better, found, least)
    return best.flatten(1)
