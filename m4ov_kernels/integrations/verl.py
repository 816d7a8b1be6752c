"""verl's fused head by ``linear_logprob``: a function with the signature and the results of verl's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.head import linear_logprob

_OP = "linear_cross_entropy for verl"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``, on any device, for any width.

    Args:
        hidden: ``[..., H]``, bfloat16, float16, float32 or float64.
        weight: ``[V, H]``, same dtype and device; with ``dist_process_group``, this rank's rows of the vocabulary.
        labels: ``[...]`` int64; one of -100 (verl has none) gives 0, and no gradient.
        temperature: above 0.
        reduction: of the log-probabilities: ``"none"``, ``"sum"`` or ``"mean"`` (over all tokens).
        dist_process_group: group over whose ranks ``weight`` is spread; the gradient of ``hidden`` is then the part of
            this rank's, for the caller to sum, as verl's is.

    Returns:
        ``(logprobs, entropy)``, float32 (float64 for float64): log-probabilities ``[N]`` of the N tokens in one row, as
        verl's are whatever the shape of ``labels``, or a scalar; entropies ``[N]``, never reduced. Both differentiable.

    Raises:
        TypeError, ValueError: as :func:`m4ov_kernels.linear_logprob`, or an unknown reduction.

    Logits are never rounded. Source: verl 0.9, verl/utils/kernel/linear_cross_entropy.py.
    """
    checks.float_tensor(_OP, "hidden", hidden)
    if not isinstance(reduction, str):
        checks.refuse(TypeError, _OP, "reduction", "a string", checks.describe(reduction))
    checks.one_of(_OP, "reduction", reduction.lower(), ("none", "sum", "mean"))
    group_name = None if dist_process_group is None else dist_process_group.group_name
    with torch.autocast(hidden.device.type, enabled=False):  # as verl's, in the dtype that came
        found = linear_logprob(hidden, weight, labels, temperature=temperature, entropy=True, group_name=group_name)
    assert found.entropy is not None
    logprobs, entropy = found.logprob.flatten(), found.entropy.flatten()
    if reduction.lower() == "none":
        return logprobs, entropy
    return (logprobs.sum() if reduction.lower() == "sum" else logprobs.mean()), entropy
