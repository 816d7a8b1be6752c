"""The gradient of a quantised linear's input, by a weight that is dequantised some input features at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from m4ov_kernels.layout import output


def by_parts(
    grad_output: Tensor,
    in_features: int,
    parts: Iterable[tuple[slice | Tensor, Tensor]],
    multiply: Callable[[Tensor, Tensor], Tensor],
    out: Tensor | None,
) -> Tensor:
    """``[M, N]`` → ``grad_output @ weight``, ``[M, K]``: a bfloat16 gradient meets a weight rounded to bfloat16, others
    one in float32.

    ``parts``: which input features, and what the weight has there, float32 ``[features, N]``, made when it is their
    turn. ``multiply(grad, part)``: ``grad @ part.t()``, summed in float32.
    """
    result = output(out, (grad_output.shape[0], in_features), grad_output, grad_output.dtype)
    dtype = torch.bfloat16 if grad_output.dtype is torch.bfloat16 else torch.float32
    grad, largest = grad_output.to(dtype), torch.finfo(dtype).max
    for features, values in parts:
        part = values.clamp_(-largest, largest).to(dtype)  # what is finite stays so
        result[:, features] = multiply(grad, part).to(result.dtype)
    return result
