"""Logits of the next token in float32, and log-probabilities of what was drawn from them, by the trainer's kernel."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from m4ov_kernels.head.logprob import LINEAR_LOGPROB
from m4ov_kernels.nn import CausalLMHead
from m4ov_kernels.nn.plain import is_plain


class Logits(NamedTuple):
    """Of T rows, float32.

    Attributes:
        values: ``[T, V]``, divided by the temperature.
        largest, log_sum: ``[T]``; the log of the sum of ``exp(values)`` is their sum. Not finite, or NaN: a logit of
            the row is not.
        columns: ``[V, T]`` and more columns, contiguous: where the compiled kernel has kept ``values``, if it has.
    """

    values: Tensor
    largest: Tensor
    log_sum: Tensor
    columns: Tensor | None = None

    def logprobs(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """float32 ``[n]``, of tokens ``[n]`` of some rows: the sum that :func:`m4ov_kernels.linear_logprob` makes, to
        the bit."""
        return (self.values[rows, tokens] - self.largest[rows]) - self.log_sum[rows]


def logits(head: nn.Module, hidden_states: Tensor, temperature: float) -> Logits:
    """Of hidden states ``[T, D]``; ``head``: a linear of any kind.

    Where the compiled CPU kernel of ``linear_logprob`` serves, its own float32 logits, which it keeps as it would for a
    backward: one product makes what is drawn from and what is reported of it.
    """
    weight, bias = head._parameters.get("weight"), head._parameters.get("bias")
    if weight is not None and is_plain(head, nn.Linear, CausalLMHead):
        same = weight.dtype is hidden_states.dtype and (bias is None or bias.dtype is weight.dtype)
        implementation = LINEAR_LOGPROB.select(hidden_states.device, hidden_states.dtype if same else None)
        if implementation is not None and implementation.backend == "native":
            from m4ov_kernels.head.native_logprob import linear_logits

            columns, largest, log_sum = linear_logits(hidden_states, weight, bias, temperature)
            return Logits(columns[:, : hidden_states.shape[0]].t(), largest, log_sum, columns)
        made = F.linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())
    else:
        made = head(hidden_states).float()
    values = made / temperature
    largest = values.amax(-1)
    return Logits(values, largest, (values - largest[:, None]).exp().sum(-1).log())
