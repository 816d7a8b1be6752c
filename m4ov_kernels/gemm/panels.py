"""``Panels``: a quantised weight as the compiled CPU kernels read it, made of a weight and back, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from m4ov_kernels.checks import describe, refuse
from m4ov_kernels.dispatch import native_extension
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight, bits
from m4ov_kernels.gemm.weights.cached import summary
from m4ov_kernels.gemm.weights.fp8 import BLOCK, GRANULARITIES
from m4ov_kernels.gemm.weights.int4 import WHOLE_ROW, groups_of
from m4ov_kernels.layout import as_rows

Weight = Int4Weight | Int8Weight | Fp8Weight
PANEL = 64  # output features
PLACES = {"int4": 8, "int8": 4, "fp8": 2}  # input features of one output feature that stand together: 32, 32, 16 bits
KINDS = {Int4Weight: "int4", Int8Weight: "int8", Fp8Weight: "fp8"}


@dataclass(frozen=True, eq=False, repr=False)
class Panels:
    """A weight ``[N, K]`` in P panels of 64 output features; ``weight()`` gives it back.

    Input features stand in *places*, in G groups of ``group`` places each: of ``Int4Weight`` its groups (of a whole
    row, K rounded up), of ``Fp8Weight`` in blocks 128, else the row. Kp = G·group, but the last group ends where K,
    rounded up to a multiple of 8 (int4), 4 (int8) or 2 (fp8), ends. With act-order, features are sorted by group,
    stably, ``group`` is the largest group rounded up to 8, and Kp = G·group.

    Attributes:
        kind: "int4", "int8" or "fp8".
        codes: int4: uint8 [P, Kp/8, 64, 4], a little-endian word of 8 codes, the lowest nibble the first place;
            int8: uint8 [P, Kp/4, 64, 4], codes + 128; fp8: uint8 [P, Kp/2, 64, 2], the bits of e4m3. Past the end of
            the weight: the code 0 of int4 and fp8, 128 of int8.
        scales: [P, G, 64] in the weight's dtype of scales; 0 past the end.
        zeros: uint8 [P, G, 64], or ``None``.
        order: int32 [Kp], the feature at each place, −1 for none; ``None`` where it is the place itself (or, past K,
            none).
        shape: [N, K].
        group: places of a group.
        paired: of a weight whose rows are [gate; up]: panel 2p holds gate rows 64p.., panel 2p + 1 up rows 64p..,
            each half padded by itself. Else panel p holds rows 64p...
        form: what else makes the weight: ``group_size`` of int4, the index of the granularity of fp8.
        input_scale, pre_quant_scale: the weight's.
    """

    kind: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    shape: torch.Size
    group: int
    paired: bool
    form: int
    input_scale: Tensor | None = None
    pre_quant_scale: Tensor | None = None

    def __repr__(self) -> str:
        return summary(self)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def weight(self) -> Weight:
        """The weight of which these were made, bit for bit; its tensors are new."""
        N, K = self.shape
        words = _out_of_panels(_words(self.codes, self.kind), N, self.paired)  # [N, Kp/places]
        scales = _out_of_panels(self.scales, N, self.paired)  # [N, G]
        if self.kind == "int4":
            zeros = None if self.zeros is None else _out_of_panels(self.zeros, N, self.paired)
            packed, g_idx = bits.from_words(words), None
            if self.order is not None:
                places = torch.nonzero(self.order >= 0).flatten()
                features = self.order[places].long()
                codes = torch.empty((N, K), dtype=torch.uint8, device=self.device)
                codes[:, features] = bits.unpack(packed, len(self.order))[:, places]
                packed = bits.pack(codes)
                g_idx = torch.empty(K, dtype=torch.int32, device=self.device)
                g_idx[features] = (places // self.group).int()
            return Int4Weight(packed, scales, K, self.form, zeros, g_idx, self.pre_quant_scale)
        codes = bits.dense(words).view(torch.uint8)[:, :K].contiguous()
        if self.kind == "int8":
            return Int8Weight((codes ^ 128).view(torch.int8), scales)
        granularity = GRANULARITIES[self.form]
        step = {"tensor": N, "channel": 1, "block": BLOCK}[granularity]
        values = codes.view(torch.float8_e4m3fn)
        return Fp8Weight(values, scales[::step].contiguous(), granularity, self.input_scale)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[N, K], as the weight's."""
        return self.weight().dequantize(dtype)


def lay_out(weight: Any, *, paired: bool = False) -> Panels:
    """The panels of a weight, made anew; ``weight.panels()`` keeps them.

    Raises:
        TypeError: it is no quantised weight.
        ValueError: ``paired`` and an odd number of rows.
    """
    if type(weight) not in KINDS:
        refuse(TypeError, "Panels", "weight", "an Int4Weight, Int8Weight or Fp8Weight", describe(weight))
    if paired and weight.shape[0] % 2:
        refuse(ValueError, "Panels", "weight", "of an even number of rows, [gate; up]", list(weight.shape))
    # Whatever the caller is inside of (inference_mode, fake tensors), these outlive it.
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        if isinstance(weight, Int4Weight):
            return _of_int4(weight, paired)
        return _of_int8(weight, paired) if isinstance(weight, Int8Weight) else _of_fp8(weight, paired)


def pair_of(gate: Panels, up: Panels) -> Panels | None:
    """The paired panels of two weights ``[I, K]`` as of one, ``[gate; up]``; ``None`` where these are not alike, or no
    weight is both."""
    if gate.paired or up.paired or gate.order is not None or up.order is not None:
        return None
    if (gate.kind, gate.shape, gate.group, gate.form) != (up.kind, up.shape, up.group, up.form):
        return None
    if gate.scales.dtype is not up.scales.dtype or (gate.zeros is None) is not (up.zeros is None):
        return None
    if not (bits.same(gate.input_scale, up.input_scale) and bits.same(gate.pre_quant_scale, up.pre_quant_scale)):
        return None
    form = gate.form
    if gate.kind == "fp8" and GRANULARITIES[form] == "block" and gate.shape[0] % BLOCK:
        return None
    if gate.kind == "fp8" and GRANULARITIES[form] == "tensor":  # two of them
        form = GRANULARITIES.index("channel")
    tensors = {name: torch.stack((value, getattr(up, name)), 1).flatten(0, 1) for name, value in _by_panel(gate)}
    return _with(gate, 2 * gate.shape[0], True, form, tensors)


def halves_of(pair: Panels, form: int) -> tuple[Panels, Panels]:
    """The inverse of :func:`pair_of`, in the memory of the pair; ``form``: of the halves."""
    rows = pair.shape[0] // 2
    gate, up = ({name: value[half::2] for name, value in _by_panel(pair)} for half in (0, 1))
    return _with(pair, rows, False, form, gate), _with(pair, rows, False, form, up)


def own(panels: Panels) -> Panels:
    """The same panels in memory of their own, dense."""
    tensors: Any = {name: value.clone(memory_format=torch.contiguous_format) for name, value in _by_panel(panels)}
    return replace(panels, **tensors)


def _by_panel(panels: Panels) -> list[tuple[str, Tensor]]:
    values = {"codes": panels.codes, "scales": panels.scales, "zeros": panels.zeros}
    return [(name, value) for name, value in values.items() if value is not None]


def _with(panels: Panels, rows: int, paired: bool, form: int, tensors: dict[str, Any]) -> Panels:
    return replace(panels, shape=torch.Size((rows, panels.shape[1])), paired=paired, form=form, **tensors)


def _of_int4(weight: Int4Weight, paired: bool) -> Panels:
    K, G = weight.in_features, groups_of(weight.in_features, weight.group_size)
    packed, order = weight.packed, None
    group = _up(K, 8) if weight.group_size == WHOLE_ROW else weight.group_size
    if weight.g_idx is not None:
        order, group = _act_order(weight.g_idx, G)
        codes = weight.codes()[:, order.long().clamp(min=0)]
        packed = bits.pack(codes.masked_fill_(order < 0, 0))
    zeros = weight.zeros
    return Panels(
        "int4",
        _packed("int4", packed, paired),
        _into_panels(weight.scales, paired),
        None if zeros is None else _into_panels(zeros, paired),
        order,
        weight.shape,
        group,
        paired,
        weight.group_size,
        pre_quant_scale=_own(weight.pre_quant_scale),
    )


def _act_order(g_idx: Tensor, G: int) -> tuple[Tensor, int]:
    """The feature at each place, and the places of a group."""
    counts = torch.bincount(g_idx, minlength=G)
    group = _up(int(counts.max()), 8)
    features = torch.argsort(g_idx, stable=True)
    groups = g_idx[features].long()
    within = torch.arange(len(groups), device=g_idx.device) - (counts.cumsum(0) - counts)[groups]
    order = torch.full((G * group,), -1, dtype=torch.int32, device=g_idx.device)
    order[groups * group + within] = features.int()
    return order, group


def _of_int8(weight: Int8Weight, paired: bool) -> Panels:
    K = weight.shape[1]
    codes = _packed("int8", weight.codes.view(torch.uint8), paired)
    return Panels("int8", codes, _into_panels(weight.scales, paired), None, None, weight.shape, _up(K, 4), paired, 0)


def _of_fp8(weight: Fp8Weight, paired: bool) -> Panels:
    N, K = weight.shape
    scales = weight.scales.expand(N, 1) if weight.granularity == "tensor" else weight.scales
    if weight.granularity == "block":
        scales = scales.repeat_interleave(BLOCK, 0)[:N]
    return Panels(
        "fp8",
        _packed("fp8", weight.values.view(torch.uint8), paired),
        _into_panels(scales, paired),
        None,
        None,
        weight.shape,
        BLOCK if weight.granularity == "block" else _up(K, 2),
        paired,
        GRANULARITIES.index(weight.granularity),
        _own(weight.input_scale),
    )


def _packed(kind: str, codes: Tensor, paired: bool) -> Tensor:
    """uint8 [N, C], bytes of int4, int8 or e4m3 codes, → [P, ⌈C/size⌉, 64, size], size the bytes of a word."""
    size, flip = 2 if kind == "fp8" else 4, 128 if kind == "int8" else 0
    rows, columns = codes.shape
    extension, _ = native_extension()
    if extension is not None and codes.device.type == "cpu" and type(codes) is Tensor:  # not one without memory
        halves = 2 if paired else 1
        panels = halves * -(-rows // halves // PANEL)
        result = codes.new_empty((panels, -(-columns // size), PANEL, size))
        codes, stride = as_rows(codes)
        addresses = (result.data_ptr(), codes.data_ptr())
        extension.pack_panels(*addresses, rows, columns, stride, size, flip, paired, torch.get_num_threads())
        return result
    codes = bits.dense(F.pad(codes, (0, -columns % size)) ^ flip)
    words = codes.view(torch.int16 if size == 2 else torch.int32)
    fill = int.from_bytes(bytes([flip] * size), "little", signed=True)
    return _into_panels(words, paired, fill).view(torch.uint8).unflatten(-1, (PANEL, size))


def _words(codes: Tensor, kind: str) -> Tensor:
    """The codes [P, W, 64, bytes] as words [P, W, 64]."""
    return codes.flatten(2).view(torch.int16 if kind == "fp8" else torch.int32)


def _into_panels(matrix: Tensor, paired: bool, fill: int = 0) -> Tensor:
    """[N, C] → [P, C, 64], in memory of its own; rows that there are not are full of ``fill``."""
    halves = 2 if paired else 1
    rows, columns = matrix.shape[0] // halves, matrix.shape[1]
    lanes = matrix.view(halves, rows, columns) if matrix.is_contiguous() else matrix.reshape(halves, rows, columns)
    if rows % PANEL:
        lanes = F.pad(lanes, (0, 0, 0, -rows % PANEL), value=fill)
    lanes = lanes.unflatten(1, (-1, PANEL)).transpose(0, 1).flatten(0, 1)  # [P, 64, C]
    return lanes.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _out_of_panels(panels: Tensor, rows: int, paired: bool) -> Tensor:
    """The inverse of :func:`_into_panels`: [P, C, 64] → [N, C], contiguous."""
    halves = 2 if paired else 1
    lanes = panels.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # [P, 64, C]
    lanes = lanes.unflatten(0, (-1, halves)).transpose(0, 1)  # [halves, P / halves, 64, C]
    return lanes.flatten(1, 2)[:, : rows // halves].flatten(0, 1).contiguous()


def _own(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
