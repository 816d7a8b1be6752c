"""Tunable kernels of the vision operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m4ov_bench import gate
from m4ov_bench.tunables.problem import Problem, Size, Tunable, blocks, poison, randn, warp_counts
from m4ov_kernels.gpu import Config
from m4ov_kernels.vision import reference
from m4ov_kernels.vision import triton as vision
from m4ov_kernels.vision.triton import scatter

Maker = Callable[[int, torch.dtype, torch.device, Size], Problem]


def _tiles(name: str, *sizes: int) -> Callable[[int | None], Iterator[Config]]:
    """Tiles as wide as the row's width, or of a choice of widths."""

    def candidates(width: int | None) -> Iterator[Config]:
        for size in sizes:
            for columns in (width,) if width else (256, 512, 1024, 2048):
                if columns <= size:
                    for warps in warp_counts(size):
                        yield Config({name: size // columns, "BLOCK_D": columns}, warps)

    return candidates


def _rows(kind: str) -> Maker:
    """``fwd``: ``deepstack_add``, which reads most; ``clear``, ``gather``: of the backward; ``index``: of positions."""

    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        rows = max(4, size.elements // width)
        base, positions = randn((rows, width), dtype, device), torch.randperm(rows, device=device)[: rows * 3 // 4]
        features = randn((len(positions), width), dtype, device)
        out = torch.empty_like(features if kind == "gather" else base)

        def expected(base: Tensor, features: Tensor) -> Tensor:
            if kind == "fwd":
                return reference.deepstack_add(base, features, positions)
            return base[positions] if kind == "gather" else base.index_fill(0, positions, 0.0)

        def run() -> None:
            if kind == "fwd":
                vision.deepstack_add_fwd(base, features, positions, out=out)
            elif kind == "gather":
                vision.deepstack_add_bwd(base, positions, out=out)
            else:
                vision.scatter_vision_bwd(base, positions, True, False, out=(out, base.new_empty(0)))

        plain, exact = expected(base, features), expected(base.double(), features.double())
        return Problem(lambda: poison([out]), run, lambda: (out,), ("out",), [plain], [exact])

    return problem


def _index(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    rows = max(4, size.elements // 1024)
    positions = torch.randperm(rows, device=device)[: rows * 3 // 4]
    found = [torch.empty(0)]

    def run() -> None:
        found[0] = scatter._source("scatter_vision", positions, rows)

    source = torch.full((rows,), -1.0, device=device)
    source[positions] = torch.arange(len(positions), dtype=torch.float32, device=device)
    return Problem(lambda: None, run, lambda: (found[0].float(),), ("source",), [source], [source.double()])


def _interpolate(backward: bool) -> Maker:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        side = 48 if size.elements > 2**20 else 3  # Qwen3-VL's table; a small one where kernels are interpreted
        frame = (64, 64) if size.elements > 2**20 else (2, 4)
        count = max(1, size.elements // (width * frame[0] * frame[1]))
        grid_thw = torch.tensor([(1, *frame)] * count, device=device)
        patches = count * frame[0] * frame[1]
        table, hidden = randn((side**2, width), dtype, device), randn((patches, width), dtype, device)
        out = torch.empty_like(table if backward else hidden)

        def definition(table: Tensor, hidden: Tensor) -> Tensor:
            return reference.interpolate_position_embeddings(table, grid_thw, hidden, patches, 2, "hf")

        def judged(*tensors: Tensor) -> list[Tensor]:
            if not backward:
                return [definition(*tensors)]
            leaf = tensors[0].detach().requires_grad_()
            return gate.differentiated(lambda table: definition(table, tensors[1]), [leaf], [tensors[1]])[1:]

        def run() -> None:
            if backward:
                vision.interpolate_position_embeddings_bwd(hidden, grid_thw, side**2, 2, out=out)
            else:
                vision.interpolate_position_embeddings_fwd(table, grid_thw, hidden, patches, 2, "hf", out=out)

        plain, exact = judged(table, hidden), judged(table.double(), hidden.double())
        return Problem(lambda: poison([out]), run, lambda: (out,), ("out",), plain, exact)

    return problem


TUNABLES = (
    Tunable("feature_rows_index", blocks("BLOCK", 128, 256, 512, 1024), _index),
    Tunable("feature_rows_fwd", _tiles("BLOCK_ROWS", 2048, 1024, 4096, 8192), _rows("fwd")),
    Tunable("feature_rows_clear", _tiles("BLOCK_ROWS", 2048, 1024, 4096, 8192), _rows("clear")),
    Tunable("feature_rows_gather", _tiles("BLOCK_ROWS", 2048, 1024, 4096, 8192), _rows("gather")),
    Tunable("interpolate_fwd", _tiles("BLOCK_ROWS", 1024, 512, 2048), _interpolate(False)),
    Tunable("interpolate_bwd", _tiles("BLOCK_PATCHES", 1024, 512, 2048), _interpolate(True)),
)
