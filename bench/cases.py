"""The shapes, once, for benchmarks and tests."""

from __future__ import annotations

import torch

from m4ov_bench import cases_quantize
from m4ov_bench.case import (
    AttentionCase,
    DecodingCase,
    FeatureRowsCase,
    GatedCase,
    GeluCase,
    HeadCase,
    KlCase,
    LinearCase,
    LogprobCase,
    MoECase,
    NormCase,
    PackingCase,
    PixelCase,
    PositionEmbeddingsCase,
    PositionsCase,
    QuantizedCase,
    RopeCase,
    SftCase,
)

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
    GeluCase(1024, 1152),
    GatedCase(4096, 4096, operator="geglu", compiled=True),
)
ROPE = (
    RopeCase("text", 4096, 32, 8, 128, quick=True, compiled=True),
    RopeCase("text", 4096, 28, 4, 128, norm=False),
    RopeCase("text", 4096, 32, 8, 128, dtype=torch.float32),
    RopeCase("text", 1024, 16, 8, 128),
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

# Qwen3-VL-30B-A3B's experts; the others are small enough for backwards of peers.
MOE = (
    MoECase("grouped_linear", 512, 16, 4, 1024, 512, backward=True, quick=True),
    MoECase("grouped_linear", 4096, 128, 8, backward=True),
    MoECase("grouped_linear", 4096, 128, 8, width=768, columns=2048),
    MoECase("grouped_linear", 4, 128, 8),  # decoding: bound by reading the weights
    MoECase("grouped_linear", 512, 16, 4, 1024, 512, dtype=torch.float32, backward=True),
    MoECase("experts", 4096, 128, 8, columns=768),
    MoECase("experts", 512, 16, 4, 1024, 512, backward=True, quick=True),
    MoECase("permute", 4096, 128, 8, backward=True, quick=True),
    MoECase("unpermute", 4096, 128, 8, backward=True, quick=True),
    MoECase("route_topk", 4096, 128, 8, dtype=torch.float32, backward=True, quick=True),
)
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

SFT = (  # every sample with an image of its own; and as the quickstart, whose peers repeat images
    SftCase("curriculum", 55, 17, quick=True),
    SftCase("quickstart", 48, 12, questions=2),
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
GPU_MOE = (
    MoECase("grouped_linear", 8192, 128, 8, backward=True),
    MoECase("grouped_linear", 8192, 128, 8, width=768, columns=2048, backward=True),
    MoECase("permute", 8192, 128, 8, backward=True),
    MoECase("unpermute", 8192, 128, 8, backward=True),
    MoECase("route_topk", 8192, 128, 8, dtype=torch.float32, backward=True),
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
TINY_MOE = (
    MoECase("grouped_linear", 20, 4, 2, 16, 24, torch.float32, backward=True),
    MoECase("permute", 6, 4, 2, 16, dtype=torch.float32, backward=True),
    MoECase("unpermute", 6, 4, 2, 16, dtype=torch.float32, backward=True),
    MoECase("route_topk", 9, 6, 2, dtype=torch.float32, backward=True),
)
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
TINY_SFT = (SftCase("tiny", 10, 4),)
TINY_QUANTIZED = (
    QuantizedCase(5, 256, 96),
    QuantizedCase(1, 256, 96, activation="bf16"),
    QuantizedCase(5, 96, 64, "int8"),
    QuantizedCase(5, 96, 64, "fp8", "bf16"),
)
# A row that one core and cold memory bound, rows where arithmetic does, and the widths of a vision tower.
QUANTIZED = (
    QuantizedCase(1, activation="bf16", quick=True),
    QuantizedCase(1, activation="bf16", threads=2),
    QuantizedCase(8, activation="bf16"),
    QuantizedCase(32, activation="bf16"),
    QuantizedCase(128, activation="bf16"),
    QuantizedCase(32),
    QuantizedCase(128, quick=True),
    QuantizedCase(512),
    QuantizedCase(512, threads=2),
    QuantizedCase(128, kind="int8"),
    QuantizedCase(128, 1152, 4304, "int8", quick=True),
    QuantizedCase(128, 4304, 1152, "int8"),
    QuantizedCase(512, kind="int8", threads=2),
    QuantizedCase(128, kind="fp8", activation="bf16"),
)
QUANTIZE, REQUANTIZE = cases_quantize.QUANTIZE, cases_quantize.REQUANTIZE
GPU_QUANTIZE = cases_quantize.GPU_QUANTIZE
TINY_QUANTIZE, TINY_REQUANTIZE = cases_quantize.TINY_QUANTIZE, cases_quantize.TINY_REQUANTIZE
