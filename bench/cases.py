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
class PixelCase:
    """``pil``: the images are Pillow's, not NumPy arrays."""

    images: int
    height: int
    width: int
    max_pixels: int
    min_pixels: int = 1 << 16
    patch_size: int = 16
    dtype: torch.dtype = torch.float32
    pil: bool = False
    quick: bool = False

    def __str__(self) -> str:
        kind = " (PIL)" * self.pil
        size = f"{self.images} of {self.width} x {self.height}{kind}"
        return f"{size}, at most {self.max_pixels >> 10} Ki pixels, {_dtype_name(self.dtype)}"


@dataclass(frozen=True)
class HeadCase:
    """``labelled``: the share of rows that have a target; the others hold ``ignore_index``. ``kept``: logits that the
    forward may keep for the backward, in bytes; ``None``: as many as the operator keeps by itself."""

    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    labelled: float = 1.0
    kept: int | None = None
    quick: bool = False
    compiled: bool = False
    memory: bool = False

    def __str__(self) -> str:
        share = f", {self.labelled:.0%} labelled" if self.labelled < 1 else ""
        kept = "" if self.kept is None else f", {self.kept >> 20} MiB of logits kept"
        return f"M {self.rows}, D {self.width}, V {self.vocabulary} {_dtype_name(self.dtype)}{share}{kept}"


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
    HeadCase(1024, 1024, 32000, kept=64 << 20, memory=True),
    HeadCase(1024, 1024, 32000, labelled=0.25),
    HeadCase(256, 1024, 32000, quick=True),
)
PIXELS = (
    PixelCase(32, 1080, 1920, 1 << 20),
    PixelCase(32, 1080, 1920, 1 << 20, pil=True),
    PixelCase(8, 1080, 1920, 1 << 20, dtype=torch.bfloat16, pil=True),
    PixelCase(8, 1080, 1920, 1 << 24),  # Qwen3-VL's own limit: rows are enlarged to 1088
    PixelCase(8, 1088, 1920, 1 << 24),  # not resized
    PixelCase(8, 1088, 1920, 1 << 24, dtype=torch.bfloat16),
    PixelCase(3, 1080, 1920, 1 << 20, quick=True),
)
HEAD_MEMORY = tuple(HeadCase(rows, 1024, 32000) for rows in (256, 512, 1024, 2048, 4096))  # memory alone, by tokens

# On a GPU (``m4ov_bench.gpu``): sizes of Qwen3-VL 2B to 8B with 8,192 tokens, several times any L2 cache. A head's rows
# keep all logits of eager PyTorch within reach, so that it can be measured.
GPU_NORM = (
    NormCase(8192, 4096, compiled=True),
    NormCase(8192, 4096, residual=True, compiled=True),
    NormCase(8192, 2048),
    NormCase(131072, 128),  # the queries' norm: 8,192 tokens of 16 heads
    NormCase(8192, 4096, dtype=torch.float32),
)
GPU_ACTIVATION = (GatedCase(8192, 6144, compiled=True), GatedCase(8192, 12288), GatedCase(8192, 6144, torch.float32))
GPU_HEAD = (
    HeadCase(8192, 2048, 151936, compiled=True, memory=True),
    HeadCase(8192, 2048, 151936, labelled=0.25, memory=True),
    HeadCase(4096, 4096, 151936, memory=True),
)
GPU_ATTENTION = (
    AttentionCase("text", (512, 640, 768, 896, 1152, 1280, 1408, 1536), 16, 8, 128, causal=True, compiled=True),
    AttentionCase("images", (1024,) * 8, 16, 16, 64, causal=False),
)
# The same code where kernels are interpreted; float32, for interpreted bfloat16 stores truncate.
TINY_NORM = (NormCase(4, 64, dtype=torch.float32), NormCase(3, 32, dtype=torch.float32, residual=True))
TINY_ACTIVATION = (GatedCase(4, 48, dtype=torch.float32, compiled=True),)
TINY_ATTENTION = (AttentionCase("tiny", (5, 9), 2, 1, 16, causal=True, dtype=torch.float32),)
TINY_HEAD = (HeadCase(8, 16, 96, dtype=torch.float32, labelled=0.5, memory=True),)


def targets(case: HeadCase, generator: torch.Generator | None = None, ignore_index: int = -100) -> torch.Tensor:
    """int64 ``[M]``: random classes, with ``ignore_index`` in the rows that are not labelled, spread at random."""
    target = torch.randint(case.vocabulary, (case.rows,), generator=generator)
    unlabelled = torch.randperm(case.rows, generator=generator)[round(case.rows * case.labelled) :]
    target[unlabelled] = ignore_index
    return target
