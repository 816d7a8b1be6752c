"""The shapes, once, for benchmarks and tests. ``quick``: also measured in the short
run. ``compiled``: ``torch.compile`` is a peer (each costs seconds of compiling). ``memory``: the
peak of memory is measured (a process for each peer)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def _dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


@dataclass(frozen=True)
class NormCase:
    rows: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    residual: bool = False
    numerics: str = "hf"
    quick: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return f"[{self.rows}, {self.width}] {_dtype_name(self.dtype)}" + " + residual" * self.residual


@dataclass(frozen=True)
class GatedCase:
    rows: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    numerics: str = "hf"
    quick: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return f"[{self.rows}, {self.width}] {_dtype_name(self.dtype)}"


@dataclass(frozen=True)
class HeadCase:
    """``labelled``: the share of rows that have a target; the others hold ``ignore_index``."""

    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    labelled: float = 1.0
    quick: bool = False
    compiled: bool = False
    memory: bool = False

    def __str__(self) -> str:
        share = f", {self.labelled:.0%} labelled" if self.labelled < 1 else ""
        return f"M {self.rows}, D {self.width}, V {self.vocabulary} {_dtype_name(self.dtype)}{share}"


@dataclass(frozen=True)
class AttentionCase:
    """``sizes``: the lengths of the sequences; ``dim``: of a head."""

    name: str
    sizes: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    causal: bool
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    compiled: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.sizes)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, over all heads."""
        return self.heads * sum(n * (n + 1) // 2 if self.causal else n * n for n in self.sizes)

    def __str__(self) -> str:
        lengths = (
            f"{len(self.sizes)} x {self.sizes[0]}"
            if len(set(self.sizes)) == 1
            else (f"{len(self.sizes)} of {min(self.sizes)}-{max(self.sizes)}")
        )
        heads = f"{self.heads}/{self.kv_heads} heads of {self.dim}"
        return f"{self.name}: {lengths}, {heads}, {'causal' if self.causal else 'full'}, {_dtype_name(self.dtype)}"


NORM = (
    NormCase(4096, 4096, quick=True, compiled=True),
    NormCase(4096, 4096, residual=True),
    NormCase(4096, 4096, dtype=torch.float32),
    NormCase(1024, 512),
)
ACTIVATION = (
    GatedCase(4096, 4096, quick=True, compiled=True),
    GatedCase(4096, 4096, dtype=torch.float32),
    GatedCase(1024, 1536),
)
ATTENTION = (  # the first two are those of the training step
    AttentionCase("text", (1024,), 4, 2, 128, causal=True, quick=True, compiled=True),
    AttentionCase("images", (1024, 1024), 4, 4, 64, causal=False),
    AttentionCase("short", (4, 64, 16, 7, 33, 60, 50, 12) * 4, 4, 2, 128, causal=True, quick=True, compiled=True),
    AttentionCase("tiny", (5, 64, 16, 7, 33, 60, 50, 21) * 4, 4, 2, 32, causal=True),
    AttentionCase("tower", (576,) * 4, 16, 16, 72, causal=False),
    AttentionCase("text", (1024,), 4, 2, 128, causal=True, dtype=torch.float32),
)
HEAD = (
    HeadCase(1024, 1024, 32000, compiled=True, memory=True),
    HeadCase(1024, 1024, 32000, labelled=0.25),
    HeadCase(256, 1024, 32000, quick=True),
)


def targets(case: HeadCase, generator: torch.Generator | None = None, ignore_index: int = -100) -> torch.Tensor:
    """int64 ``[M]``: random classes, with ``ignore_index`` in the rows that are not labelled, spread at random."""
    target = torch.randint(case.vocabulary, (case.rows,), generator=generator)
    unlabelled = torch.randperm(case.rows, generator=generator)[round(case.rows * case.labelled) :]
    target[unlabelled] = ignore_index
    return target
