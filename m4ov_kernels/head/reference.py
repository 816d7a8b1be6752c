"""The definition of the head's losses, in plain PyTorch: differentiable any number of times, exact in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """One loss per row, ``[T]``, 0 where ``target == ignore_index``. Logits in the dtype of ``input``, the rest in
    float32 (float64 for float64), as Hugging Face computes it."""
    input = torch.where((target != ignore_index)[:, None], input, 0.0)  # a NaN in such a row reaches no gradient
    logits = F.linear(input, linear_weight, linear_bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing)
