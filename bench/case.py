"""What a case of each operator is: its sizes, its dtype, and how it is called in tables.

``quick``: also measured in the short run. ``compiled``: ``torch.compile`` is a peer (each costs seconds of compiling).
``memory``: the peak of memory is measured (a process for each peer).
"""

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
class MoECase:
    """``tokens`` that choose ``top_k`` of ``experts`` by Zipf's law; ``width`` of a token; ``columns``: of what an
    expert makes of it (``operator`` ``"grouped_linear"``), or of its gate (``"experts"``, the block as a whole).
    ``backward``: measured too."""

    operator: str
    tokens: int
    experts: int
    top_k: int
    width: int = 2048
    columns: int = 1536
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False
    quick: bool = False

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    def __str__(self) -> str:
        sizes = {
            "route_topk": "",
            "permute": f", H {self.width}",
            "unpermute": f", H {self.width}",
            "grouped_linear": f", {self.width} → {self.columns}",
            "experts": f", H {self.width}, I {self.columns}",
        }[self.operator]
        chosen = f"{self.tokens} tokens × {self.top_k} of {self.experts}"
        return f"{'block: ' * (self.operator == 'experts')}{chosen}{sizes} {_dtype_name(self.dtype)}"


@dataclass(frozen=True)
class QuantizedCase:
    """A linear with a quantised weight ``[columns, width]``: ``kind`` int4 (by ``group`` and around 8), int8 or fp8 (by
    rows). ``activation``: what the input is rounded to."""

    rows: int
    width: int = 4096
    columns: int = 12288
    kind: str = "int4"
    activation: str = "int8"
    group: int = 128
    threads: int = 1
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False

    @property
    def cold(self) -> bool:
        """Bound by reading the weight."""
        return self.rows == 1

    def __str__(self) -> str:
        weight = {"int4": f"W4, groups of {self.group}", "int8": "W8", "fp8": "fp8"}[self.kind]
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return (
            f"{weight}, {self.activation} activations, M {self.rows}, K {self.width}, N {self.columns} "
            f"{_dtype_name(self.dtype)}, {threads}"
        )


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


@dataclass(frozen=True)
class SftCase:
    """A step of a recipe: ``images`` of easy-vqa with ``questions`` of each, which share it where the loop can, and
    ``digits`` with one."""

    recipe: str
    images: int
    digits: int
    questions: int = 1
    quick: bool = False

    def __str__(self) -> str:
        asked = f" × {self.questions} questions" if self.questions > 1 else ""
        return f"{self.recipe}: {self.images} images{asked} + {self.digits} digits, bf16"
