"""What is kept of a quantised weight once it has been read and let go: what servers and other formats ask of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m4ov.checkpoints.folder import Weight
from m4ov.checkpoints.kernels import described
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight


@dataclass(frozen=True)
class Seen:
    """Attributes:
    format: a key of ``m4ov_kernels.gemm.weights.FORMATS``.
    shape: [N, K].
    nbytes: of its tensors.
    fields: of :class:`m4ov.checkpoints.kernels.Product`.
    scale_dtype: of its scales.
    scale, input_scale: of fp8 with one for the tensor; ``None`` otherwise.
    zeros: the least and greatest zero point that is stored, or ``None``.
    order, pre_quant_scale: digests of the group index and of the input's scale, or ``None``.
    """

    format: str
    shape: tuple[int, int]
    nbytes: int
    fields: dict[str, Any]
    scale_dtype: str
    scale: float | None = None
    input_scale: float | None = None
    zeros: tuple[int, int] | None = None
    order: str | None = None
    pre_quant_scale: str | None = None

    @property
    def scheme(self) -> str:
        """In words, as far as products are joined by it."""
        fields = self.fields
        if fields["kind"] == "int8":
            return "int8, a scale for each output"
        if fields["kind"] == "fp8":
            return f"fp8 e4m3, a scale for each {fields['granularity']}"
        groups = "whole rows" if fields["group_size"] == -1 else f"groups of {fields['group_size']}"
        zeros = "symmetric" if fields["symmetric"] else "zero points"
        return f"int4, {groups}, {zeros}{', act-order' if fields['act_order'] else ''}"


def look(weight: Weight, format: str) -> Seen:
    """At a weight."""
    N, K = weight.shape
    made: dict[str, Any] = {}
    if isinstance(weight, Fp8Weight):
        made["scale"] = float(weight.scales) if weight.granularity == "tensor" else None
        made["input_scale"] = None if weight.input_scale is None else float(weight.input_scale)
    if isinstance(weight, Int4Weight):
        if weight.zeros is not None:
            made["zeros"] = (int(weight.zeros.min()), int(weight.zeros.max()))
        made["order"] = digest(weight.g_idx)
        made["pre_quant_scale"] = digest(weight.pre_quant_scale)
    dtype = str(weight.scales.dtype).removeprefix("torch.")
    return Seen(format, (N, K), weight.nbytes, described(weight), dtype, **made)


def digest(tensor: Tensor | None) -> str | None:
    """SHA-256 of a tensor's bytes; ``None`` of none."""
    if tensor is None:
        return None
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
