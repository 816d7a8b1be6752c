"""Tunable kernels of the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m4ov_bench.tunables.problem import Problem, Size, Tunable, poison, randn, tiles
from m4ov_kernels.gpu import Config
from m4ov_kernels.head import state as states
from m4ov_kernels.head.rows import Rows
from m4ov_kernels.head.triton_logprob_launches import Call


def _logprob(width: int, dtype: torch.dtype, device: torch.device, size: Size, name: str) -> Call:
    """A call that is served by the tiles of this name: a bias takes narrow ones, odd rows take pointers."""
    width = min(width, 4096)
    rows, vocab = max(2, size.elements // width), 8 * width
    hidden, weight = randn((rows, width + 1), dtype, device)[:, :width], randn((vocab, width), dtype, device)
    weight *= width**-0.5
    targets = torch.randint(vocab, (rows,), device=device)
    bias = randn((vocab,), dtype, device) if name == "descriptors" else None
    rows_of = Rows(hidden.contiguous() if name else hidden, targets, None, None)
    return Call(rows_of, weight, bias, None, 1.0, 0.0, False, 0)


def _logits_of(call: Call, dtype: torch.dtype) -> Tensor:
    logits = call.hidden.to(dtype) @ call.weight.to(dtype).t()
    return logits if call.bias is None else logits + call.bias.to(dtype)


def _logprob_fwd(name: str) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        call = _logprob(width, dtype, device, size, name)
        state = torch.empty(states.STATES, call.tokens, device=device)

        def judged(dtype: torch.dtype) -> list[Tensor]:
            logits = _logits_of(call, dtype)
            return [logits.logsumexp(-1), logits.gather(1, call.target[:, None])[:, 0]]

        return Problem(
            lambda: poison([state]),
            lambda: call.forward(state, False, False),
            lambda: (state[1].log() + state[0], state[2]),
            ("logsumexp", "target's logit"),
            judged(torch.float32),
            judged(torch.float64),
        )

    return problem


def _logprob_bwd(name: str) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        call = _logprob(width, dtype, device, size, name)
        vocab = call.weight.shape[0]
        exact = _logits_of(call, torch.float64)
        largest = exact.amax(-1)
        log_sum = (exact - largest[:, None]).logsumexp(-1)
        grad = torch.rand(call.tokens, device=device) + 0.5
        none = torch.zeros_like(grad)
        coefficients = torch.stack((largest.float(), log_sum.float(), -grad, none, grad, none))
        room = call.room(-(-vocab // 2048) * 2048, dtype)

        def judged(wide: torch.dtype) -> list[Tensor]:
            made = -_logits_of(call, wide).softmax(-1)
            made.scatter_add_(1, call.target[:, None], torch.ones_like(made[:, :1]))
            return [made * grad[:, None].to(wide)]

        return Problem(
            lambda: poison([room]),
            lambda: call.chunk(room, 0, vocab, coefficients),
            lambda: (room[: call.tokens, :vocab],),
            ("gradient",),
            [tensor.to(dtype) for tensor in judged(torch.float32)],
            judged(torch.float64),
        )

    return problem


def _matrix_tiles(forward: bool, *shapes: tuple[int, int, int, int, int]) -> Callable[[int | None], Iterator[Config]]:
    """Tokens, words and hidden columns of a tile, warps, stages; a split of the vocabulary has 1024 words."""

    def candidates(_: int | None) -> Iterator[Config]:
        for tokens, words, columns, warps, stages in shapes:
            for group in (16, 8):
                sizes = {"BLOCK_T": tokens, "BLOCK_V": words, "BLOCK_D": columns}
                if forward:
                    sizes["TILES"] = 1024 // words
                yield Config({**sizes, "GROUP": group}, warps, stages)

    return candidates


_TILES = {
    "": ((128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 64, 32, 4, 2)),
    "descriptors": ((128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 128, 8, 2), (64, 128, 64, 4, 4)),
    "wide": ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
}


TUNABLES = (
    *(
        Tunable(
            "linear_logprob_" + "_".join(part for part in (kind, name) if part),
            _matrix_tiles(kind == "fwd", *shapes),
            problem(name),
        )
        for kind, problem in (("fwd", _logprob_fwd), ("bwd", _logprob_bwd))
        for name, shapes in _TILES.items()
    ),
    Tunable(
        "linear_logprob_merge",
        tiles("BLOCK_SPLITS", "BLOCK_T", (32, 32), (64, 16), (16, 64), (32, 64), (8, 128)),
        _logprob_fwd("wide"),
    ),
)
