"""Next-token loss straight from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m4ov_kernels.head import linear_cross_entropy


def causal_lm_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items_in_batch: int | float | Tensor | None = None,
    num_valid: int | None = None,
    group_name: str | None = None,
) -> Tensor:
    """Cross entropy of the next token, logits never whole in memory: Hugging Face's ``ForCausalLMLoss``.

    Args:
        hidden_states: ``[B, T, D]``.
        weight, bias: of the head, ``[V, D]`` and ``[V]``.
        labels: ``[B, T]`` int64, not shifted: row t is scored against ``labels[:, t + 1]``, the last row not at all.
        shift_labels: ``[B, T]``, already shifted; wins over ``labels``.
        ignore_index, num_items_in_batch, num_valid, group_name: see :func:`m4ov_kernels.linear_cross_entropy`.

    Returns:
        A scalar, float32 (float64 for float64 input). Under autocast the product runs in autocast's dtype, as the
        head's own does.

    Raises:
        ValueError: neither kind of labels is given, or they do not have a label for each hidden state.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss: labels or shift_labels must be given")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows = hidden_states.shape[:-1].numel()
    if shift_labels.numel() != rows:
        raise ValueError(
            f"causal_lm_loss: {list(shift_labels.shape)} labels do not fit hidden states {list(hidden_states.shape)}"
        )
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return linear_cross_entropy(
        hidden_states.reshape(rows, -1),
        weight,
        shift_labels.reshape(rows).to(hidden_states.device),
        linear_bias=bias,
        ignore_index=ignore_index,
        num_items_in_batch=num_items_in_batch,
        num_valid=num_valid,
        group_name=group_name,
    )


class CausalLMHead(nn.Linear):
    """A linear head that gives logits, or, when called with labels, the loss without them.

    Attributes:
        group_name: of the process group over which the weight is sharded by rows, if it is; the logits are this rank's.
    """

    group_name: str | None = None

    def forward(
        self,
        input: Tensor,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        ignore_index: int = -100,
        num_items_in_batch: int | float | Tensor | None = None,
        num_valid: int | None = None,
    ) -> Tensor:
        """``[..., D]`` → logits ``[..., V]``; with ``labels`` or ``shift_labels`` → :func:`causal_lm_loss`."""
        if labels is None and shift_labels is None:
            return super().forward(input)
        return causal_lm_loss(
            input,
            self.weight,
            labels,
            shift_labels=shift_labels,
            bias=self.bias,
            ignore_index=ignore_index,
            num_items_in_batch=num_items_in_batch,
            num_valid=num_valid,
            group_name=getattr(self, "group_name", None),
        )
