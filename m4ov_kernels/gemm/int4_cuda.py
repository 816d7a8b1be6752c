"""``csrc/gemm/int4_linear.cu``: which calls it serves, and what ``m4ov kernels check`` compiles of it (entries for the
family's ``KERNELS``). What launches it is ``native_cuda.py``."""

from __future__ import annotations

from m4ov_kernels.gpu import CudaBuild, Work

_ROWS, _COLUMNS, _WIDTH = {1: 1, 2: 16}, 12288, 4096


MOST_ROWS = 64


def unserved(kind: str, rows: int, act_order: bool, activation: str, epilogue: str) -> str | None:
    """Why there is no CUDA C++ kernel for such a call; ``None`` if there is."""
    if kind != "int4" or activation != "bf16":
        return f"on a GPU it has int4 weights by bf16 activations; got {kind} by {activation}"
    if act_order:
        return "on a GPU it has no act-order (g_idx)"
    if epilogue != "none":
        return f"on a GPU it has no epilogue but bias and residual; got {epilogue!r}"
    if rows > MOST_ROWS:
        return f"on a GPU it is for {MOST_ROWS} rows at most; got {rows}"
    return None


def _builds() -> list[CudaBuild]:
    """One for each size of groups (128: a whole row too) and number of tiles of 8 rows of the input."""
    builds = []
    for group in (32, 64, 128):
        for tiles, rows in _ROWS.items():
            problem = f"M {rows}, N {_COLUMNS}, K {_WIDTH}, groups of {group}"
            # Codes, bf16 scales, input and output, once each.
            moved = _COLUMNS * (_WIDTH // 2 + 2 * _WIDTH // group) + 2 * rows * (_WIDTH + _COLUMNS)
            work = Work(problem, moved, 2 * rows * _COLUMNS * _WIDTH)
            name = f"int4_linear_kernel<{group}, {tiles}>"
            builds.append(CudaBuild(name, "bf16", work=work, matrix=True, wgmma=False))
    return builds


CUDA_KERNELS = _builds()
