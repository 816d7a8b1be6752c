"""Every compilation of the Triton kernels of ``linear_logprob`` that ships."""

from __future__ import annotations

from m4ov_kernels import configs
from m4ov_kernels.gpu import SIZES, Build, Config, Work
from m4ov_kernels.head.triton_logprob_kernels import (
    _linear_logprob_bwd_kernel,
    _linear_logprob_fwd_kernel,
    _linear_logprob_merge_kernel,
)
from m4ov_kernels.head.triton_logprob_launches import DESCRIPTORS, GPU_CHUNK_BYTES, WIDE, table_of


def _work(dtype: str, kind: str) -> Work:
    """Of 8192 rows, D 4096 and V 131072; of the backward, one chunk: each input and output once, and the products."""
    rows, dim, vocab = 8192, 4096, 131072
    if kind == "bwd":
        vocab = GPU_CHUNK_BYTES // SIZES[dtype] // rows
    moved, count = (rows + vocab) * dim * SIZES[dtype] + 8 * rows, rows * vocab
    if kind == "fwd":  # the state of one split at least
        return Work(f"[{rows}, {dim}] × [{vocab}, {dim}]", moved + 3 * 4 * rows, count * (2 * dim + 4))
    moved += 4 * 6 * rows + count * SIZES[dtype]
    return Work(f"[{rows}, {dim}] × [{vocab}, {dim}]", moved, count * (2 * dim + 4))


def _signature(kind: str, config: Config, flags: dict[str, bool]) -> str:
    def matrix(*blocks: str) -> str:
        sizes = ",".join(str(config.constexprs[name]) for name in blocks)
        return f"tensordesc<T[{sizes}]>" if flags["DESCRIPTORS"] else "*T/16"

    weights = "*fp32/16" if flags["WEIGHTED"] else "*i64/16"
    both = f"{matrix('BLOCK_T', 'BLOCK_D')} i32/16 {matrix('BLOCK_V', 'BLOCK_D')} i32/16"
    start = f"{both} *T/16 {weights} *i64/16 *i64/16"
    if kind == "fwd":
        return f"{start} *fp32/16 i32 i32 i32/16 i32 fp32 fp32"
    parts = "*fp32/16" if flags["NEED_BIAS"] or flags["LOGITS"] else "*T/16"
    made = "*i64/16 *fp32/16" if flags["LOGITS"] else f"*fp32/16 {matrix('BLOCK_T', 'BLOCK_V')}"
    return f"{start} {made} i32/16 {parts} i32 i32 i32/16 i32 i32 i32 fp32 fp32"


_FLAGS = ("HAS_BIAS", "ROUNDED", "SCALED", "CAPPED", "WEIGHTED")
_FORWARD = (*_FLAGS, "CENTRED", "TOTAL")
_BACKWARD = (*_FLAGS, "GENERAL", "NEED_BIAS", "LOGITS")
# What is declared of each kernel, in bf16, besides the plainest; the last one is nobody's call.
FORWARDS = {
    "entropy": ("CENTRED",),
    "hf": ("ROUNDED",),
    "temperature, entropy": ("SCALED", "CENTRED"),
    "hf, bias, temperature": ("ROUNDED", "HAS_BIAS", "SCALED"),
    "softcap": ("CAPPED",),
    "total": ("TOTAL",),
    "all": _FORWARD,
}
BACKWARDS = {
    "entropy": ("GENERAL",),
    "hf": ("ROUNDED",),
    "temperature, entropy": ("SCALED", "GENERAL"),
    "hf, bias, temperature": ("ROUNDED", "HAS_BIAS", "NEED_BIAS", "SCALED"),
    "softcap": ("CAPPED",),
    "all": _BACKWARD[:-1],
    "logits": ("LOGITS",),
}


def _declared() -> list[Build]:
    """Every row of the tables for every dtype that it serves; in bf16 with what a call may ask for."""
    builds: list[Build] = []

    def declare(kind: str, dtype: str, descriptors: bool, note: str, chosen: tuple[str, ...]) -> None:
        kernel, names = {
            "fwd": (_linear_logprob_fwd_kernel, _FORWARD),
            "bwd": (_linear_logprob_bwd_kernel, _BACKWARD),
        }[kind]
        flags = {"DESCRIPTORS": descriptors, **{name: name in chosen for name in names}}
        for wide in (False, True)[: 1 + descriptors]:
            table = table_of(f"linear_logprob_{kind}", flags, wide)
            if wide and not table.endswith("wide"):
                continue
            light = table_of("", flags, True) == "_wide"
            only = WIDE if wide else tuple(t for t in DESCRIPTORS if not light or t not in WIDE)
            for row, targets in configs.shipped(table, dtype):
                served = tuple(target for target in targets if not descriptors or target in only)
                # AMD's matrix units have float32's precision.
                parts = ([t for t in served if t.startswith("sm")], [t for t in served if not t.startswith("sm")])
                for some, matrix in zip(parts if dtype == "fp32" else (served,), (dtype != "fp32", True), strict=False):
                    title = (table.partition(f"_{kind}")[2].strip("_"), note, "mfma" * (matrix and dtype == "fp32"))
                    build = Build(
                        kernel,
                        dtype,
                        _signature(kind, row.config, flags),
                        {**flags, **row.config.constexprs},
                        row.config.num_warps,
                        row.config.num_stages,
                        hot=note not in ("all", "logits"),
                        note=", ".join(part for part in title if part),
                        work=_work(dtype, kind),
                        matrix=matrix,
                        targets=tuple(some),
                    )
                    builds.append(build)

    for dtype in SIZES:
        for descriptors in (False, True)[: 1 + (dtype != "fp32")]:
            for kind, variants in (("fwd", FORWARDS), ("bwd", BACKWARDS)):
                declare(kind, dtype, descriptors, "", ())
                for note, chosen in variants.items() if dtype == "bf16" else ():
                    declare(kind, dtype, descriptors, note, chosen)
    for row, targets in configs.shipped("linear_logprob_merge", "fp32"):
        splits, rows = 128, 8192
        for centred, total in ((False, False), (True, False), (True, True)):
            read = 3 + centred + total
            builds.append(
                Build(
                    _linear_logprob_merge_kernel,
                    "fp32",
                    "*fp32/16 *fp32/16 i32 i32",
                    {"CENTRED": centred, "TOTAL": total, **row.config.constexprs},
                    row.config.num_warps,
                    row.config.num_stages,
                    note=", ".join(["entropy"] * centred + ["total"] * total),
                    work=Work(f"[{splits}, {read}, {rows}]", 4 * rows * (splits * read + 5), 4 * splits * rows),
                    targets=targets,
                )
            )
    return builds


KERNELS = _declared()
