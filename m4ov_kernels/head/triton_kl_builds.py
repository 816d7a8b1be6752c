"""Every compilation of the Triton kernels of ``linear_kl`` that ships."""

from __future__ import annotations

from typing import Any

from m4ov_kernels import configs
from m4ov_kernels.gpu import ARCHITECTURES, SIZES, Build, Config, Work
from m4ov_kernels.head.triton_kl_kernels import (
    _linear_kl_bwd_kernel,
    _linear_kl_fwd_kernel,
    _linear_kl_merge_kernel,
)
from m4ov_kernels.head.triton_kl_launches import table_of
from m4ov_kernels.head.triton_logprob_launches import DESCRIPTORS, GPU_CHUNK_BYTES

_FLAGS = ("FIRST_BIAS", "SECOND_BIAS", "ROUNDED", "SCALED")
_BIAS = ("FIRST_BIAS", "SECOND_BIAS")
# What is declared of each kernel, in bf16, besides the plainest; the last one is a rare call.
FORWARDS = {"jsd": ("JSD",), "temperature": ("SCALED",), "bias": _BIAS, "all": (*_FLAGS, "JSD")}
BACKWARDS = {
    "forward": (0, ()),
    "reverse": (1, ()),
    "jsd": (2, ()),
    "reverse, temperature": (1, ("SCALED",)),
    "forward, bias": (0, (*_BIAS, "NEED_BIAS")),
    "all": (2, (*_FLAGS, "NEED_BIAS")),
}


def _work(dtype: str, kind: str) -> Work:
    """Of 8192 rows, D 4096, V 131072, twice; of the backward, one chunk: each input and output once, the products."""
    rows, dim, vocab = 8192, 4096, 131072
    if kind == "bwd":
        vocab = GPU_CHUNK_BYTES // SIZES[dtype] // rows
    moved, count = 2 * (rows + vocab) * dim * SIZES[dtype] + 8 * rows, rows * vocab
    # The state of one split at least; coefficients and the gradient.
    moved += 4 * 5 * rows if kind == "fwd" else 4 * 6 * rows + count * SIZES[dtype]
    return Work(f"2 of [{rows}, {dim}] × [{vocab}, {dim}]", moved, count * (4 * dim + 8))


def _signature(kind: str, config: Config, flags: dict[str, Any]) -> str:
    def matrix(*blocks: str) -> str:
        sizes = ",".join(str(config.constexprs[name]) for name in blocks)
        return f"tensordesc<T[{sizes}]>" if flags["DESCRIPTORS"] else "*T/16"

    head = f"{matrix('BLOCK_T', 'BLOCK_D')} i32/16 {matrix('BLOCK_V', 'BLOCK_D')} i32/16 *T/16"
    if kind == "fwd":
        return f"{head} {head} *i64/16 *fp32/16 *fp32/16 i32 i32 i32/16 i32/16 fp32"
    parts = "*fp32/16" if flags["NEED_BIAS"] else "*T/16"
    made = f"*i64/16 *i64/16 *fp32/16 {matrix('BLOCK_T', 'BLOCK_V')} i32/16 {parts}"
    return f"{head} {head} {made} i32 i32 i32/16 i32/16 i32 i32 fp32"


def _declared() -> list[Build]:
    """Every row of the tables for every dtype that it serves; in bf16 with what a call may ask for."""
    builds: list[Build] = []

    def declare(kind: str, dtype: str, note: str, flags: dict[str, Any]) -> None:
        kernel = {"fwd": _linear_kl_fwd_kernel, "bwd": _linear_kl_bwd_kernel}[kind]
        able = [t for t in ARCHITECTURES if t in DESCRIPTORS or not flags["DESCRIPTORS"]]
        tables = {t: table_of(f"linear_kl_{kind}", flags, t) for t in able}
        rows = [(table, *found) for table in sorted(set(tables.values())) for found in configs.shipped(table, dtype)]
        for table, row, targets in rows:
            served = tuple(target for target in targets if tables.get(target) == table)
            # AMD's matrix units have float32's precision.
            parts = ([t for t in served if t.startswith("sm")], [t for t in served if not t.startswith("sm")])
            for some, matrix in zip(parts if dtype == "fp32" else (served,), (dtype != "fp32", True), strict=False):
                title = ("descriptors" * flags["DESCRIPTORS"], note, "mfma" * (matrix and dtype == "fp32"))
                build = Build(
                    kernel,
                    dtype,
                    _signature(kind, row.config, flags),
                    {**flags, **row.config.constexprs},
                    row.config.num_warps,
                    row.config.num_stages,
                    hot=note != "all",
                    note=", ".join(part for part in title if part),
                    work=_work(dtype, kind),
                    matrix=matrix,
                    targets=tuple(some),
                )
                builds.append(build)

    for dtype in SIZES:
        for descriptors in (False, True)[: 1 + (dtype != "fp32")]:
            for note, chosen in {"": (), **(FORWARDS if dtype == "bf16" else {})}.items():
                names = {name: name in chosen for name in (*_FLAGS, "JSD")}
                declare("fwd", dtype, note, {"DESCRIPTORS": descriptors, **names})
            for note, (kind, chosen) in BACKWARDS.items():
                if dtype == "bf16" or note == "forward":
                    names = {name: name in chosen for name in (*_FLAGS, "NEED_BIAS")}
                    declare("bwd", dtype, note, {"DESCRIPTORS": descriptors, **names, "KIND": kind})
    for row, targets in configs.shipped("linear_kl_merge", "fp32"):
        splits, rows = 128, 8192
        for jsd in (False, True):
            read = 2 if jsd else 5
            builds.append(
                Build(
                    _linear_kl_merge_kernel,
                    "fp32",
                    "*fp32/16 *fp32/16 i32 i32",
                    {"JSD": jsd, **row.config.constexprs},
                    row.config.num_warps,
                    row.config.num_stages,
                    note="jsd" * jsd,
                    work=Work(f"[{splits}, {read}, {rows}]", 4 * rows * read * (splits + 1), 8 * splits * rows),
                    targets=targets,
                )
            )
    return builds


KERNELS = _declared()
