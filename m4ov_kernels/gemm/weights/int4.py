"""``Int4Weight``: four-bit codes with a scale, and perhaps a zero point, for each group of input features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.checks import describe, refuse
from m4ov_kernels.gemm.weights import bits, validate
from m4ov_kernels.gemm.weights.cached import Cached

GROUP_SIZES = (32, 64, 128)
WHOLE_ROW = -1
SYMMETRIC_ZERO = 8
_NAME = "Int4Weight"


def groups_of(in_features: int, group_size: int) -> int:
    return 1 if group_size == WHOLE_ROW else -(-in_features // group_size)


def natural_groups(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """The group of each input feature without act-order: int32 [K], k // group_size; the last group may be short."""
    columns = torch.arange(in_features, dtype=torch.int32, device=device)
    return columns * 0 if group_size == WHOLE_ROW else columns // group_size


@dataclass(frozen=True, eq=False, repr=False)
class Int4Weight(Cached):
    """W[n, k] = (q[n, k] − z[n, g])·s[n, g], g the group of k; z = 8 where there are no zero points.

    Attributes:
        packed: uint8 [N, 4·⌈K/8⌉], the codes 0..15, two a byte, even k in the low nibble, 0 past K. These are the bytes
            of compressed-tensors' int32 ``weight_packed`` (and, transposed by words, of GPTQ's ``qweight``).
        scales: float32, bfloat16 or float16 [N, G], finite.
        in_features: K ≥ 1.
        group_size: 32, 64, 128, or −1: a whole row is one group. G = ⌈K/group_size⌉; the last group may be short.
        zeros: uint8 [N, G] of 0..15, or ``None``: symmetric around 8.
        g_idx: int32 [K], the group of each input feature (act-order), or ``None``: k // group_size. One that says
            just that becomes ``None``, so that a weight has one form.
        pre_quant_scale: a float tensor [K] by which the *input* is multiplied (ModelOpt's AWQ), or ``None``.

    Two weights are never compared with ``==``; ``equal`` compares bits.
    """

    packed: Tensor
    scales: Tensor
    in_features: int
    group_size: int
    zeros: Tensor | None = None
    g_idx: Tensor | None = None
    pre_quant_scale: Tensor | None = None

    def __post_init__(self) -> None:
        K, g = self.in_features, self.group_size
        if not isinstance(K, int) or isinstance(K, bool) or K < 1:
            refuse(ValueError, _NAME, "in_features", "an integer of at least 1", repr(K))
        if not isinstance(g, int) or g not in (*GROUP_SIZES, WHOLE_ROW):
            refuse(ValueError, _NAME, "group_size", "32, 64, 128 or -1 (a whole row)", repr(g))
        N = self.packed.shape[0] if isinstance(self.packed, Tensor) and self.packed.dim() else 0
        validate.tensor_of(_NAME, "packed", self.packed, (torch.uint8,), (max(N, 1), 4 * bits.words_for(K)))
        G = groups_of(K, g)
        validate.tensor_of(_NAME, "scales", self.scales, validate.SCALE_DTYPES, (N, G))
        validate.finite(_NAME, "scales", self.scales)
        if self.zeros is not None:
            validate.tensor_of(_NAME, "zeros", self.zeros, (torch.uint8,), (N, G))
            if self.zeros.device.type == "cpu" and int(self.zeros.max()) > 15:
                refuse(ValueError, _NAME, "zeros", "codes of 0..15", int(self.zeros.max()))
        if self.pre_quant_scale is not None:
            validate.tensor_of(_NAME, "pre_quant_scale", self.pre_quant_scale, validate.SCALE_DTYPES, (K,))
            validate.finite(_NAME, "pre_quant_scale", self.pre_quant_scale)
        if self.g_idx is not None:
            validate.tensor_of(_NAME, "g_idx", self.g_idx, (torch.int32,), (K,))
            self._check_groups(G)
        validate.one_device(_NAME, self._tensors())
        self._check_padding()

    def _check_groups(self, G: int) -> None:
        assert self.g_idx is not None
        if self.g_idx.device.type != "cpu":
            return
        low, high = int(self.g_idx.min()), int(self.g_idx.max())
        if low < 0 or high >= G:
            refuse(ValueError, _NAME, "g_idx", f"groups of 0..{G - 1}", f"{low}..{high}")
        if torch.equal(self.g_idx, natural_groups(self.in_features, self.group_size)):
            object.__setattr__(self, "g_idx", None)

    def _check_padding(self) -> None:
        if self.packed.device.type == "cpu":
            whole, odd = divmod(self.in_features, 2)
            past = self.packed[:, whole + odd :]
            if bool(past.any()) or (odd and bool((self.packed[:, whole] >> 4).any())):
                refuse(ValueError, _NAME, "packed", f"0 past column {self.in_features}", "other codes there")

    def _tensors(self) -> dict[str, Tensor | None]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("in_features", "group_size")}

    @property
    def shape(self) -> torch.Size:
        """[N, K] = [out_features, in_features]."""
        return torch.Size((self.packed.shape[0], self.in_features))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values() if tensor is not None)

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    def codes(self) -> Tensor:
        """The codes one a byte: uint8 [N, K] of 0..15."""
        return bits.unpack(self.packed, self.in_features)

    def groups(self) -> Tensor:
        """The group of each input feature: int32 [K]."""
        if self.g_idx is not None:
            return self.g_idx
        return natural_groups(self.in_features, self.group_size, self.device)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[N, K] in `dtype` (default: the scales'). (q − z)·s is rounded once: it is exact in float64, and in float32
        when the scales are 16 bits wide. ``pre_quant_scale`` belongs to the input and isn't applied."""
        dtype = validate.output_dtype(_NAME, dtype, self.scales.dtype)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        group = self.groups().long()
        codes = self.codes().to(wide)
        codes -= SYMMETRIC_ZERO if self.zeros is None else self.zeros.to(wide)[:, group]
        return (codes * self.scales.to(wide)[:, group]).to(dtype)

    def equal(self, other: object) -> bool:
        """The same weight, bit for bit."""
        if not isinstance(other, Int4Weight) or (self.in_features, self.group_size) != (
            other.in_features,
            other.group_size,
        ):
            return False
        theirs = other._tensors()
        return all(bits.same(tensor, theirs[name]) for name, tensor in self._tensors().items())

    def to(self, device: torch.device | str) -> Int4Weight:
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in self._tensors().items()}
        return replace(self, **moved)

    def rows(self, begin: int, end: int) -> Int4Weight:
        """Output features ``begin`` to ``end``, at least one of them; the tensors are views."""
        zeros = None if self.zeros is None else self.zeros[begin:end]
        return replace(self, packed=self.packed[begin:end], scales=self.scales[begin:end], zeros=zeros)

    def with_zeros(self) -> Int4Weight:
        """The same weight with its zero points written out (8 where it is symmetric)."""
        zeros = torch.full_like(self.scales, SYMMETRIC_ZERO, dtype=torch.uint8) if self.zeros is None else self.zeros
        return replace(self, zeros=zeros)

    def without_zeros(self) -> Int4Weight:
        """The same weight as a symmetric one; refused unless every zero point is 8."""
        if self.zeros is not None and bool((self.zeros != SYMMETRIC_ZERO).any()):
            refuse(ValueError, _NAME, "zeros", "8 throughout to be symmetric", "other zero points")
        return replace(self, zeros=None)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, *, group_size: int, **rest: Any) -> Int4Weight:
        """From codes one a byte: uint8 [N, K] of 0..15."""
        if not isinstance(codes, Tensor) or codes.dtype is not torch.uint8 or codes.dim() != 2:
            refuse(TypeError, _NAME, "codes", "a uint8 tensor [N, K]", describe(codes))
        if codes.device.type == "cpu" and codes.numel() and int(codes.max()) > 15:
            refuse(ValueError, _NAME, "codes", "of 0..15", int(codes.max()))
        return cls(bits.pack(codes), scales.contiguous(), codes.shape[1], group_size, **rest)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        g_idx: Tensor | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> Int4Weight:
        """Round to nearest (RTN), in float32 whatever the weight's dtype; compressed-tensors' min-max rule.

        Symmetric: s = max|w|/7.5, q = clamp(rne(w/s) + 8, 0, 15). Asymmetric, with lo = min(0, min w) and hi =
        max(0, max w): s = (hi − lo)/15, z = clamp(rne(−lo/s), 0, 15), q = clamp(rne(w/s) + z, 0, 15). rne is round
        half to even; s is first rounded to `scale_dtype` (default: the weight's own if 16 bits wide, else float32),
        so codes belong to the scale that is stored. A group of zeros gets s = 1 and dequantises to 0 exactly; no
        other scale rounds to 0. Symmetric groups clip +max|w| to 7·s: an error of s/2, like any other rounding.

        Args:
            weight: float [N, K]; NaN, infinities and magnitudes past 7/8 of float32's range are refused.
            g_idx: int32 [K], the group of each input feature, or ``None``.

        Raises:
            ValueError: also if `scale_dtype` cannot hold a scale (a float16 past 65504).
        """
        wide = validate.matrix(_NAME, weight)
        dtype = validate.scale_dtype_of(_NAME, weight, scale_dtype)
        N, K = wide.shape
        if group_size not in (*GROUP_SIZES, WHOLE_ROW):
            refuse(ValueError, _NAME, "group_size", "32, 64, 128 or -1 (a whole row)", repr(group_size))
        G = groups_of(K, group_size)
        if g_idx is not None:
            validate.tensor_of(_NAME, "g_idx", g_idx, (torch.int32,), (K,))
            if g_idx.device.type == "cpu" and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < G:
                refuse(ValueError, _NAME, "g_idx", f"groups of 0..{G - 1}", f"{int(g_idx.min())}..{int(g_idx.max())}")
        group = (natural_groups(K, group_size, wide.device) if g_idx is None else g_idx).long()
        start = wide.new_zeros((N, G))
        index = group.expand(N, K)
        low = start.scatter_reduce(1, index, wide, "amin", include_self=True)
        high = start.scatter_reduce(1, index, wide, "amax", include_self=True)
        ideal = torch.maximum(-low, high) / 7.5 if symmetric else high / 15 - low / 15
        scales = validate.rounded_scales(_NAME, ideal, dtype)
        step = scales.float()
        zeros = None if symmetric else (-low / step).clamp(0, 15).round()
        shift = SYMMETRIC_ZERO if zeros is None else zeros[:, group]
        codes = ((wide / step[:, group]).round() + shift).clamp(0, 15).to(torch.uint8)
        return cls.from_codes(
            codes,
            scales,
            group_size=group_size,
            zeros=None if zeros is None else zeros.to(torch.uint8),
            g_idx=g_idx,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Canonical and exact: compressed-tensors' names and order of bits, plus what those leave to a config."""
        state = {
            "weight_packed": bits.to_words(self.packed),
            "weight_scale": self.scales,
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
            "group_size": torch.tensor(self.group_size, dtype=torch.int64),
        }
        if self.zeros is not None:
            state["weight_zero_point"] = pack_zeros(self.zeros)
        if self.g_idx is not None:
            state["weight_g_idx"] = self.g_idx
        if self.pre_quant_scale is not None:
            state["pre_quant_scale"] = self.pre_quant_scale
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Int4Weight:
        """The inverse of ``state_dict``, bit for bit; anything else is refused."""
        validate.keys_of(
            _NAME,
            state,
            ("weight_packed", "weight_scale", "weight_shape", "group_size"),
            ("weight_zero_point", "weight_g_idx", "pre_quant_scale"),
        )
        for name, size in (("weight_shape", (2,)), ("group_size", ())):
            validate.tensor_of(_NAME, f"state_dict[{name!r}]", state[name], (torch.int64,), size)
        N, K = map(int, state["weight_shape"])
        if min(N, K) < 1:
            refuse(ValueError, _NAME, "state_dict['weight_shape']", "[N, K] of at least 1", [N, K])
        words, zeros = state["weight_packed"], state.get("weight_zero_point")
        shape = (N, bits.words_for(K))
        validate.tensor_of(_NAME, "state_dict['weight_packed']", words, (torch.int32,), shape)
        if zeros is not None:
            G = groups_of(K, int(state["group_size"])) if int(state["group_size"]) in (*GROUP_SIZES, WHOLE_ROW) else 0
            shape = (bits.words_for(N), G)
            validate.tensor_of(_NAME, "state_dict['weight_zero_point']", zeros, (torch.int32,), shape)
            zeros = unpack_zeros(zeros, N)
        return cls(
            bits.from_words(words),
            state["weight_scale"],
            K,
            int(state["group_size"]),
            zeros,
            state.get("weight_g_idx"),
            state.get("pre_quant_scale"),
        )


def pack_zeros(zeros: Tensor) -> Tensor:
    """Zero points [N, G] as compressed-tensors packs them: int32 [⌈N/8⌉, G], lowest nibble = lowest n."""
    return bits.pack_words(zeros.T.contiguous()).T.contiguous()


def unpack_zeros(words: Tensor, out_features: int) -> Tensor:
    return bits.unpack_words(words.T.contiguous(), out_features).T.contiguous()
