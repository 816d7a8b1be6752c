"""The mean divergence of two heads: ours, its definition, and as trainers have it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_kernels import linear_kl
from m4ov_kernels.head import reference


def ours(kind: str, *heads: Tensor) -> Tensor:
    return linear_kl(*heads, kind=kind).mean()


def definition(kind: str, *heads: Tensor) -> Tensor:
    """In plain PyTorch, with float32 logits (float64 of float64)."""
    return reference.linear_kl(*heads, None, None, None, kind, 1.0, False).mean()


def eager(kind: str, hidden_states: Tensor, weight: Tensor, ref_hidden_states: Tensor, ref_weight: Tensor) -> Tensor:
    """As trainers have it: logits in the model's dtype, then float32."""
    log_p = F.log_softmax(F.linear(hidden_states, weight).float(), -1)
    with torch.no_grad():
        log_q = F.log_softmax(F.linear(ref_hidden_states, ref_weight).float(), -1)
    if kind == "forward":
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    if kind == "reverse":
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    parts = [F.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q)]
    return (parts[0] + parts[1]) / 2
