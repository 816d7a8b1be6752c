"""Which of the engines' fast kernels take a product: the conditions that vLLM's code states. No engine is run, and a
kernel that takes a shape may still be absent from a build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m4ov.checkpoints.folder import Weight
from m4ov_kernels.gemm.weights import Fp8Weight, Int8Weight
from m4ov_kernels.gemm.weights.int4 import WHOLE_ROW


@dataclass(frozen=True)
class Product:
    """One matrix product of a server: a weight, or several that it joins, on one rank.

    Attributes:
        out_features, in_features: N and K on the rank.
        kind: "int4", "int8" or "fp8".
        group_size: of int4; −1: a whole row.
        symmetric: int4 without zero points.
        act_order: a group index that is not k // group_size.
        granularity: of fp8's scales.
        activations: "16", "int8" or "fp8": what the configuration has the input turned into.
        ranks: over which tensor parallelism splits it.
        splits_inputs: K is split, not N.
    """

    out_features: int
    in_features: int
    kind: str
    group_size: int = WHOLE_ROW
    symmetric: bool = True
    act_order: bool = False
    granularity: str = "channel"
    activations: str = "16"
    ranks: int = 1
    splits_inputs: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel: GPUs it is for, kinds of weights, and what it says against a product (``None``: it takes it)."""

    name: str
    gpus: str
    takes: Callable[[Product], bool]
    against: Callable[[Product], str | None]


def _multiples(product: Product, n: int, k: int) -> str | None:
    wrong = [
        f"{name} = {size} is no multiple of {step}"
        for name, size, step in (("N", product.out_features, n), ("K", product.in_features, k))
        if size % step
    ]
    return "; ".join(wrong) or None


def _groups(product: Product, sizes: tuple[int, ...]) -> str | None:
    size = product.group_size
    if size not in sizes:
        return f"groups of {size}; it has {', '.join(map(str, sizes))}"
    if size != WHOLE_ROW and product.in_features % size:
        return f"K = {product.in_features} is in no whole groups of {size}"
    if product.act_order and product.splits_inputs and product.ranks > 1:
        return "act-order over inputs that are split"
    return None


def _marlin(product: Product) -> str | None:
    if product.act_order and not product.symmetric:
        return "act-order with zero points"
    return _groups(product, (WHOLE_ROW, 32, 64, 128)) or _multiples(product, 64, 128)


def _machete(product: Product) -> str | None:
    return _groups(product, (WHOLE_ROW, 64, 128)) or _multiples(product, 128, 64)


def _cutlass_w4a8(product: Product) -> str | None:
    if product.activations != "fp8":
        return "activations of 16 bits (it is for fp8 ones)"
    if product.act_order or not product.symmetric:
        return "act-order or zero points"
    return _groups(product, (128,)) or _multiples(product, 128, 128)


KERNELS = (
    Kernel("Marlin", "sm_80 and newer", lambda product: product.kind == "int4", _marlin),
    Kernel("Machete", "sm_90", lambda product: product.kind == "int4", _machete),
    Kernel("CUTLASS W4A8", "sm_90", lambda product: product.kind == "int4", _cutlass_w4a8),
    Kernel("CUTLASS int8", "sm_75 and newer", lambda p: p.kind == "int8", lambda p: _multiples(p, 16, 16)),
    Kernel(
        "CUTLASS fp8",
        "sm_89 and newer",
        lambda p: p.kind == "fp8" and p.granularity != "block",
        lambda p: _multiples(p, 16, 16),
    ),
    Kernel(
        "CUTLASS block fp8",
        "sm_90 and newer",
        lambda p: p.kind == "fp8" and p.granularity == "block",
        lambda p: _multiples(p, 128, 128),
    ),
    Kernel(
        "DeepGEMM",
        "sm_90, sm_100",
        lambda p: p.kind == "fp8" and p.granularity == "block",
        lambda p: _multiples(p, 64, 128),
    ),
)


def eligible(product: Product) -> dict[str, str | None]:
    """Kernel that is for such weights → what stands against it; ``None``: it takes the product."""
    return {kernel.name: kernel.against(product) for kernel in KERNELS if kernel.takes(product)}


def described(weight: Weight) -> dict[str, Any]:
    """The fields of a :class:`Product` that a weight itself tells."""
    if isinstance(weight, Int8Weight):
        return {"kind": "int8"}
    if isinstance(weight, Fp8Weight):
        return {"kind": "fp8", "granularity": weight.granularity}
    return {
        "kind": "int4",
        "group_size": weight.group_size,
        "symmetric": weight.symmetric,
        "act_order": weight.g_idx is not None,
    }


def activations_of(format: str, config: Mapping[str, Any]) -> str:
    """What a configuration has the inputs of its quantised weights turned into: "16", "int8" or "fp8"."""
    if format in ("block-fp8", "modelopt-fp8"):
        return "fp8"
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        given = group.get("input_activations") if isinstance(group, Mapping) else None
        if isinstance(given, Mapping):
            return "int8" if given.get("type", "int") == "int" else "fp8"
    return "16"
