"""What every format's reader and writer does with tensors and configs: take, check, refuse."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from m4ov_kernels.checks import describe, refuse
from m4ov_kernels.gemm.weights import bits
from m4ov_kernels.gemm.weights.fp8 import Fp8Weight
from m4ov_kernels.gemm.weights.int4 import GROUP_SIZES, WHOLE_ROW, Int4Weight
from m4ov_kernels.gemm.weights.int8 import Int8Weight
from m4ov_kernels.gemm.weights.validate import SCALE_DTYPES, name_of

Weight = Int4Weight | Int8Weight | Fp8Weight
Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]

# Every name that some quantised format gives to a tensor of one weight. A file that holds one which the format at hand
# does not define says more than its reader would hear.
LEAVES = frozenset(
    {"g_idx", "pre_quant_scale", "qweight", "qzeros", "scales", "scales_and_zp", "weight"}
    | {f"input_{what}" for what in ("global_scale", "scale", "zero_point")}
    | {f"weight_{what}" for what in ("g_idx", "global_scale", "packed", "shape", "zero_point")}
    | {f"weight_scale{what}" for what in ("", "_2", "_inv")}
)


@dataclass(frozen=True)
class Leaves:
    """The tensors of one weight: `prefix` + a name that the format defines."""

    format: str
    tensors: Tensors
    prefix: str

    def name(self, leaf: str) -> str:
        return f"{self.prefix}.{leaf}" if self.prefix else leaf

    def only(self, *leaves: str) -> None:
        """Refuse a file that holds, for this weight, a quantised format's tensor other than these."""
        for leaf in sorted(LEAVES - set(leaves)):
            if self.name(leaf) in self.tensors:
                self.refuse(leaf, f"absent (a {self.format} weight has {', '.join(leaves)})", self.get(leaf))

    def has(self, leaf: str) -> bool:
        return self.name(leaf) in self.tensors

    def get(self, leaf: str) -> Any:
        return self.tensors[self.name(leaf)]

    def take(self, leaf: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int | str, ...]) -> Tensor:
        """One tensor, contiguous; `sizes` are integers, or names of sizes that are free but not 0."""
        expected = f"a {' or '.join(map(name_of, dtypes))} tensor [{', '.join(map(str, sizes))}]"
        if not self.has(leaf):
            self.refuse(leaf, expected, None)
        value = self.get(leaf)
        if not isinstance(value, Tensor) or value.dtype not in dtypes or value.layout is not torch.strided:
            self.refuse(leaf, expected, value, TypeError)
        fits = value.dim() == len(sizes) and all(
            size == want if isinstance(want, int) else size > 0 for size, want in zip(value.shape, sizes, strict=True)
        )
        if not fits:
            self.refuse(leaf, expected, value)
        return bits.dense(value.detach())

    def scales(self, leaf: str, sizes: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES) -> Tensor:
        value = self.take(leaf, dtypes, sizes)
        if value.device.type == "cpu" and not bool(torch.isfinite(value).all()):
            self.refuse(leaf, "finite", f"{int((~torch.isfinite(value)).sum())} NaN or infinite values")
        return value

    def scalar(self, leaf: str, dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES) -> Tensor:
        """A scale of one value, [1] or []: [1]."""
        sizes: tuple[int, ...] = (1,)
        if self.has(leaf) and isinstance(self.get(leaf), Tensor) and self.get(leaf).dim() == 0:
            sizes = ()
        return self.scales(leaf, sizes, dtypes).reshape(1)

    def fp8(self, leaf: str = "weight") -> Tensor:
        value = self.take(leaf, (torch.float8_e4m3fn,), ("N", "K"))
        if value.device.type == "cpu" and bool(((value.view(torch.uint8) & 0x7F) == 0x7F).any()):
            self.refuse(leaf, "free of NaN", "NaN")
        return value

    def group_index(self, leaf: str, in_features: int, groups: int) -> Tensor:
        value = self.take(leaf, (torch.int32, torch.int64), (in_features,))
        if value.device.type == "cpu" and not 0 <= int(value.min()) <= int(value.max()) < groups:
            self.refuse(leaf, f"groups of 0..{groups - 1}", f"{int(value.min())}..{int(value.max())}")
        return value.to(torch.int32)

    def refuse(self, leaf: str, expected: str, got: Any, kind: type[Exception] = ValueError) -> NoReturn:
        if isinstance(got, Tensor):
            got = describe(got)
        elif got is None:
            got = f"no such tensor (of this weight there are {self.present() or 'none'})"
        refuse(kind, self.format, self.name(leaf), expected, got)

    def present(self) -> list[str]:
        return [leaf for leaf in sorted(LEAVES) if self.has(leaf)]


@dataclass(frozen=True)
class Settings:
    """A config, or a part of one, and where it stands; what is read from it is checked."""

    format: str
    values: Any
    where: str = "config"

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            refuse(TypeError, self.format, self.where, "a mapping", describe(self.values))

    def get(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """One setting, one of `allowed`. ``True`` is not 1, and a missing key is `default`, which must be allowed."""
        value = self.values.get(key, default)
        if not any(value == choice and type(value) is type(choice) for choice in allowed):
            self.refuse(key, "one of " + ", ".join(map(repr, allowed)), value)
        return value

    def group_size(self, key: str = "group_size") -> int:
        return self.get(key, (*GROUP_SIZES, WHOLE_ROW))

    def part(self, key: str) -> Settings:
        return Settings(self.format, self.values.get(key), f"{self.where}[{key!r}]")

    def names(self, key: str) -> list[str]:
        value = self.values.get(key) or []
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
            self.refuse(key, "a list of module names", value)
        return list(value)

    def refuse(self, key: str, expected: str, got: Any) -> NoReturn:
        refuse(ValueError, self.format, f"{self.where}[{key!r}]", expected, repr(got))


def matches(format: str, pattern: str, prefix: str) -> bool:
    """Whether a regular expression of a config matches from a name's start."""
    try:
        return re.match(pattern, prefix) is not None
    except re.error as error:
        refuse(ValueError, format, "config", "of regular expressions", f"{pattern!r} ({error})")


def named(prefix: str, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Full names; what is ``None`` is left out."""
    return {f"{prefix}.{k}" if prefix else k: v for k, v in tensors.items() if v is not None}


def cannot(format: str, weight: Weight, reason: str) -> NoReturn:
    refuse(ValueError, f"write to {format}", "weight", "one that the format can express", f"{_kind(weight)}: {reason}")


def _kind(weight: Weight) -> str:
    size = "×".join(map(str, weight.shape))
    if isinstance(weight, Int4Weight):
        return f"Int4Weight {size}, group_size {weight.group_size}"
    return f"Fp8Weight {size}, {weight.granularity}" if isinstance(weight, Fp8Weight) else f"Int8Weight {size}"


def half_scales(format: str, weight: Int4Weight) -> Tensor:
    """Scales as formats with 16-bit scales keep them: float32 ones only if they fit one of the two exactly."""
    if weight.scales.dtype is not torch.float32:
        return weight.scales
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(weight.scales.to(dtype).float(), weight.scales):
            return weight.scales.to(dtype)
    cannot(format, weight, "its float32 scales are exact neither in float16 nor in bfloat16, which the format stores")
