"""The shapes, once, for benchmarks and tests. ``quick``: also measured in the short
run. ``compiled``: ``torch.compile`` is a peer (each costs seconds of compiling). ``memory``: the
peak of memory is measured (a process for each peer)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m4ov_bench import cases_quantize


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
    operator: str = "rms_norm"

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
    operator: str = "swiglu"

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
class GeluCase:
    """``bias``: of the linear layer before it, added on the way."""

    rows: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    approximate: str = "tanh"
    bias: bool = True
    quick: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        name = {"tanh": "tanh", "none": "erf"}[self.approximate]
        return f"[{self.rows}, {self.width}] {_dtype_name(self.dtype)}, {name}" + " + bias" * self.bias


@dataclass(frozen=True)
class LinearCase:
    """``backward``: measured too."""

    rows: int
    width: int
    columns: int
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False
    quick: bool = False

    def __str__(self) -> str:
        return f"M {self.rows}, K {self.width}, N {self.columns} {_dtype_name(self.dtype)}"


@dataclass(frozen=True)
class LogprobCase:
    """As :class:`HeadCase`; ``entropy``: of each row too."""

    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    labelled: float = 1.0
    entropy: bool = False
    quick: bool = False
    compiled: bool = False
    memory: bool = False

    def __str__(self) -> str:
        share = f", {self.labelled:.0%} labelled" if self.labelled < 1 else ""
        entropy = ", with entropy" if self.entropy else ""
        return f"M {self.rows}, D {self.width}, V {self.vocabulary} {_dtype_name(self.dtype)}{share}{entropy}"


@dataclass(frozen=True)
class KlCase:
    """Two heads of one width; ``kind``: of the divergence."""

    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    kind: str = "forward"
    quick: bool = False
    compiled: bool = False
    memory: bool = False

    def __str__(self) -> str:
        return f"M {self.rows}, D {self.width}, V {self.vocabulary} {_dtype_name(self.dtype)}, {self.kind}"


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


@dataclass(frozen=True)
class RopeCase:
    """``norm``: with the norms of queries and keys; ``grid``: of an image, whose patches are the tokens, for the
    rotation of a vision tower."""

    name: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    norm: bool = True
    grid: tuple[int, int, int] | None = None
    dtype: torch.dtype = torch.bfloat16
    numerics: str = "hf"
    quick: bool = False
    compiled: bool = False

    @property
    def sections(self) -> list[int]:
        """Of Qwen3-VL, in proportion."""
        side = self.dim // 2 * 20 // 64
        return [self.dim // 2 - 2 * side, side, side]

    def __str__(self) -> str:
        norm = "" if self.norm or self.grid else ", no norm"
        return (
            f"{self.name}: T {self.tokens}, {self.heads}/{self.kv_heads} heads of {self.dim}, "
            f"{_dtype_name(self.dtype)}{norm}"
        )


@dataclass(frozen=True)
class PositionsCase:
    """``samples`` of ``length`` tokens, with ``images`` of ``rows`` by ``columns`` merged patches each."""

    samples: int
    length: int
    images: int
    rows: int = 20
    columns: int = 20
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.samples} x {self.length} tokens, {self.images} images of {self.rows} x {self.columns} each"


@dataclass(frozen=True)
class PackingCase:
    """``mix``: of lengths, see ``packing.lengths``."""

    sequences: int
    capacity: int
    mix: str
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.sequences} {self.mix} into {self.capacity}"


@dataclass(frozen=True)
class FeatureRowsCase:
    """``share`` of the rows take a vision feature."""

    tokens: int
    width: int
    share: float
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return f"[{self.tokens}, {self.width}] {_dtype_name(self.dtype)}, {self.share:.0%} vision"


@dataclass(frozen=True)
class PositionEmbeddingsCase:
    """``grids``: frames, rows and columns of patches; ``side``: of the table."""

    name: str
    grids: tuple[tuple[int, int, int], ...]
    width: int
    side: int = 48
    merge_size: int = 2
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    compiled: bool = False

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.grids)

    def __str__(self) -> str:
        return f"{self.name}: {self.patches} patches, D {self.width} {_dtype_name(self.dtype)}"


@dataclass(frozen=True)
class DecodingCase:
    """One query for each of ``sequences``, each of ``keys`` keys; ``dim``: of a head."""

    sequences: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.dim}"
        return f"decoding: {self.sequences} queries, {self.keys} keys each, {heads}, {_dtype_name(self.dtype)}"


NORM = (
    NormCase(4096, 4096, quick=True, compiled=True),
    NormCase(4096, 4096, residual=True),
    NormCase(4096, 4096, dtype=torch.float32),
    NormCase(1024, 512),
    NormCase(65536, 128),  # the norm of heads
    NormCase(16384, 1152, operator="layer_norm", quick=True, compiled=True),  # Qwen3-VL's tower
    NormCase(16384, 1152, operator="layer_norm", residual=True),
    NormCase(16384, 1152, operator="layer_norm", dtype=torch.float32),
    NormCase(1024, 1280, operator="layer_norm"),
)
ACTIVATION = (
    GatedCase(4096, 4096, quick=True, compiled=True),
    GatedCase(4096, 4096, dtype=torch.float32),
    GatedCase(1024, 1536),
    GeluCase(4096, 4304, quick=True, compiled=True),  # Qwen3-VL's tower, and the merger below
    GeluCase(4096, 4608, approximate="none", bias=False, compiled=True),
    GeluCase(4096, 4304, dtype=torch.float32),
    GatedCase(4096, 4096, operator="geglu", compiled=True),
)
ROPE = (
    RopeCase("text", 4096, 32, 8, 128, quick=True, compiled=True),
    RopeCase("text", 4096, 28, 4, 128, norm=False),
    RopeCase("text", 4096, 32, 8, 128, dtype=torch.float32),
    RopeCase("decode", 8, 32, 8, 128),
)
VISION_ROPE = (
    RopeCase("vision", 4096, 16, 16, 72, grid=(1, 64, 64), quick=True, compiled=True),
    RopeCase("vision", 16384, 16, 16, 72, grid=(4, 64, 64)),
    RopeCase("vision", 16384, 16, 16, 80, grid=(4, 64, 64)),
)
ATTENTION = (  # the first two are those of the training step
    AttentionCase("text", (1024,), 4, 2, 128, causal=True, quick=True, compiled=True),
    AttentionCase("images", (1024, 1024), 4, 4, 64, causal=False),
    AttentionCase("short", (4, 64, 16, 7, 33, 60, 50, 12) * 4, 4, 2, 128, causal=True, quick=True, compiled=True),
    AttentionCase("tiny", (5, 64, 16, 7, 33, 60, 50, 21) * 4, 4, 2, 32, causal=True),
    AttentionCase("tower", (576,) * 4, 16, 16, 72, causal=False),
    AttentionCase("text", (1024,), 4, 2, 128, causal=True, dtype=torch.float32),
)
DECODING = (
    DecodingCase(4, 4096, 16, 8, 128),
    DecodingCase(64, 256, 16, 8, 128),
    DecodingCase(4, 2048, 16, 8, 128, dtype=torch.float32),
)
HEAD = (
    HeadCase(1024, 1024, 32000, compiled=True, memory=True),
    HeadCase(1024, 1024, 32000, kept=64 << 20, memory=True),
    HeadCase(1024, 1024, 32000, labelled=0.25),
    HeadCase(256, 1024, 32000, quick=True),
)
LOGPROB = (
    LogprobCase(1024, 1024, 32000, quick=True, compiled=True, memory=True),
    LogprobCase(1024, 1024, 32000, entropy=True),
    LogprobCase(1024, 1024, 32000, labelled=0.2),
    LogprobCase(256, 2048, 151936),
    LogprobCase(1024, 1024, 32000, dtype=torch.float32),
)
KL = (
    KlCase(1024, 1024, 32000, quick=True, compiled=True, memory=True),
    KlCase(1024, 1024, 32000, kind="reverse"),
    KlCase(1024, 1024, 32000, kind="jsd"),
    KlCase(256, 2048, 151936),
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
FEATURE_ROWS = (
    FeatureRowsCase(8192, 2048, 0.75, quick=True, compiled=True),
    FeatureRowsCase(8192, 4096, 0.5),
    FeatureRowsCase(1024, 1024, 0.75),
    FeatureRowsCase(8192, 2048, 0.75, torch.float32),
)
POSITION_EMBEDDINGS = (
    PositionEmbeddingsCase("4 images", ((1, 64, 64),) * 4, 1152, quick=True, compiled=True),
    PositionEmbeddingsCase("2 of 1920x1080", ((1, 68, 120),) * 2, 1152),
    PositionEmbeddingsCase("64 small images", ((1, 16, 16),) * 64, 1152),
    PositionEmbeddingsCase("a video", ((16, 24, 42),), 1152),
    PositionEmbeddingsCase("4 images", ((1, 64, 64),) * 4, 1152, dtype=torch.float32),
)
HEAD_MEMORY = tuple(HeadCase(rows, 1024, 32000) for rows in (256, 512, 1024, 2048, 4096))  # memory alone, by tokens

POSITIONS = (
    PositionsCase(64, 8192, 8, quick=True),
    PositionsCase(1, 131072, 16),
    PositionsCase(256, 512, 1, rows=12, columns=16),
)
PACKING = (
    PackingCase(1_000_000, 8192, "chats", quick=True),
    PackingCase(1_000_000, 8192, "documents"),
    PackingCase(1_000_000, 16384, "images"),
)

# On a GPU (``m4ov_bench.gpu``): sizes of Qwen3-VL 2B to 8B with 8,192 tokens, several times any L2 cache. A head's rows
# keep all logits of eager PyTorch within reach, so that it can be measured.
GPU_NORM = (
    NormCase(8192, 4096, compiled=True),
    NormCase(8192, 4096, residual=True, compiled=True),
    NormCase(8192, 2048),
    NormCase(131072, 128),  # the queries' norm: 8,192 tokens of 16 heads
    NormCase(8192, 4096, dtype=torch.float32),
    NormCase(32768, 1152, operator="layer_norm", compiled=True),
    NormCase(32768, 1152, operator="layer_norm", residual=True),
)
GPU_ACTIVATION = (
    GatedCase(8192, 6144, compiled=True),
    GatedCase(8192, 12288),
    GatedCase(8192, 6144, torch.float32),
    GeluCase(32768, 4304, compiled=True),
    GeluCase(32768, 4608, approximate="none", bias=False),
    GatedCase(8192, 6144, operator="geglu"),
)
GPU_HEAD = (
    HeadCase(8192, 2048, 151936, compiled=True, memory=True),
    HeadCase(8192, 2048, 151936, labelled=0.25, memory=True),
    HeadCase(4096, 4096, 151936, memory=True),
)
GPU_LOGPROB = (
    HeadCase(8192, 4096, 131072, memory=True),
    HeadCase(8192, 4096, 262144, memory=True),
    HeadCase(8192, 2048, 151936, labelled=0.25, memory=True),
)
GPU_KL = (
    KlCase(8192, 4096, 131072, memory=True),
    KlCase(8192, 2048, 151936, kind="reverse"),
    KlCase(4096, 2048, 151936, kind="jsd"),
)
GPU_ROPE = (
    RopeCase("text", 16384, 32, 8, 128, compiled=True),
    RopeCase("text", 16384, 28, 4, 128, norm=False),
)
GPU_VISION_ROPE = (RopeCase("vision", 32768, 16, 16, 72, grid=(8, 64, 64), compiled=True),)
GPU_ATTENTION = (
    AttentionCase("text", (512, 640, 768, 896, 1152, 1280, 1408, 1536), 16, 8, 128, causal=True, compiled=True),
    AttentionCase("images", (1024,) * 8, 16, 16, 64, causal=False),
)
GPU_POSITIONS = (PositionsCase(64, 8192, 8), PositionsCase(1, 131072, 16))
GPU_FEATURE_ROWS = (FeatureRowsCase(16384, 4096, 0.75, compiled=True), FeatureRowsCase(16384, 2048, 0.5))
GPU_POSITION_EMBEDDINGS = (
    PositionEmbeddingsCase("16 images", ((1, 64, 64),) * 16, 1152, compiled=True),
    PositionEmbeddingsCase("a video", ((64, 24, 42),), 1152),
)
# The same code where kernels are interpreted; float32, for interpreted bfloat16 stores truncate.
TINY_NORM = (
    NormCase(4, 64, dtype=torch.float32),
    NormCase(3, 32, dtype=torch.float32, residual=True),
    NormCase(4, 48, dtype=torch.float32, operator="layer_norm"),
)
TINY_ACTIVATION = (
    GatedCase(4, 48, dtype=torch.float32, compiled=True),
    GatedCase(4, 48, dtype=torch.float32, operator="geglu"),
    GeluCase(4, 48, dtype=torch.float32),
)
TINY_ROPE = (RopeCase("tiny", 5, 4, 2, 16, dtype=torch.float32),)
TINY_VISION_ROPE = (RopeCase("tiny", 8, 2, 2, 8, grid=(2, 2, 2), dtype=torch.float32),)
# Enough rows that errors of float32 are judged by more than chance: of 14 rows one run in 30 was red.
TINY_ATTENTION = (AttentionCase("tiny", (300, 500), 2, 1, 16, causal=True, dtype=torch.float32),)
TINY_PIXELS = (PixelCase(2, 50, 70, 4096, min_pixels=64, patch_size=4),)
TINY_POSITIONS = (PositionsCase(3, 60, 2, rows=2, columns=3),)
TINY_DECODING = (DecodingCase(2, 9, 4, 2, 16, dtype=torch.float32),)
TINY_LOGPROB = (LogprobCase(8, 16, 96, dtype=torch.float32, labelled=0.5, entropy=True),)
TINY_KL = (KlCase(8, 16, 96, dtype=torch.float32, memory=True),)
TINY_HEAD = (HeadCase(8, 16, 96, dtype=torch.float32, labelled=0.5, memory=True),)

TINY_FEATURE_ROWS = (FeatureRowsCase(12, 48, 0.5, dtype=torch.float32),)
TINY_POSITION_EMBEDDINGS = (PositionEmbeddingsCase("tiny", ((1, 2, 4), (2, 2, 2)), 24, side=3, dtype=torch.float32),)


def targets(
    case: HeadCase | LogprobCase, generator: torch.Generator | None = None, ignore_index: int = -100
) -> torch.Tensor:
    """int64 ``[M]``: random classes, with ``ignore_index`` in the rows that are not labelled, spread at random."""
    target = torch.randint(case.vocabulary, (case.rows,), generator=generator)
    unlabelled = torch.randperm(case.rows, generator=generator)[round(case.rows * case.labelled) :]
    target[unlabelled] = ignore_index
    return target


TINY_LINEAR = (LinearCase(5, 32, 24, backward=True),)
LINEAR = (
    LinearCase(1, 2048, 2048, quick=True),
    LinearCase(16, 2048, 2048),
    LinearCase(1024, 2048, 2048, backward=True, quick=True),
    LinearCase(1, 2048, 2048, torch.float32),
    LinearCase(512, 2048, 2048, torch.float32, backward=True),
)
QUANTIZE, REQUANTIZE = cases_quantize.QUANTIZE, cases_quantize.REQUANTIZE
GPU_QUANTIZE = cases_quantize.GPU_QUANTIZE
TINY_QUANTIZE, TINY_REQUANTIZE = cases_quantize.TINY_QUANTIZE, cases_quantize.TINY_REQUANTIZE
