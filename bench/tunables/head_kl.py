"""Tunable kernels of ``linear_kl``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m4ov_bench.tunables.problem import Problem, Size, Tunable, poison, randn, tiles
from m4ov_kernels.gpu import Config
from m4ov_kernels.head import kl_state, reference
from m4ov_kernels.head.kl_state import rows_of
from m4ov_kernels.head.triton_kl_launches import Call, Head


def _call(width: int, dtype: torch.dtype, device: torch.device, size: Size, name: str) -> Call:
    """A call that is served by the tiles of this name: a bias takes narrow ones, odd rows take pointers."""
    width = min(width, 4096)
    rows, vocab = max(2, size.elements // width), 2 * width
    heads = []
    for _ in range(2):
        hidden, weight = randn((rows, width + 1), dtype, device)[:, :width], randn((vocab, width), dtype, device)
        weight *= width**-0.5
        bias = None if "wide" in name else randn((vocab,), dtype, device)
        heads.append(Head(hidden.contiguous() if "descriptors" in name else hidden, weight, bias))
    return Call(rows_of(heads[0].hidden, None, None, False), *heads, 1.0, False)


def _tensors(call: Call, dtype: torch.dtype) -> list[Tensor | None]:
    heads = (call.policy, call.reference)
    found = [tensor.to(dtype) for head in heads for tensor in (head.hidden, head.weight)]
    return [*found, *(None if head.bias is None else head.bias.to(dtype) for head in heads)]


def _divergence(call: Call, dtype: torch.dtype) -> Tensor:
    return reference.linear_kl(*_tensors(call, dtype), None, "reverse", 1.0, False)  # type: ignore[arg-type]


def _fwd(name: str) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        call = _call(width, dtype, device, size, name)
        made: list[Tensor] = [torch.empty(0)]

        def run() -> None:
            made[0] = call.state(call.policy, call.reference, None)

        return Problem(
            lambda: made.__setitem__(0, torch.full((kl_state.STATES, call.tokens), float("nan"), device=device)),
            run,
            lambda: (kl_state.finish("reverse", made[0], lambda both: both)[0],),
            ("divergence",),
            [_divergence(call, torch.float32)],
            [_divergence(call, torch.float64)],
        )

    return problem


def _bwd(name: str) -> Callable[[int, torch.dtype, torch.device, Size], Problem]:
    def problem(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
        call = _call(width, dtype, device, size, name)

        def logs(wide: torch.dtype) -> list[Tensor]:
            hidden, weight, other, other_weight, *biases = _tensors(call, wide)
            pairs = ((hidden, weight, biases[0]), (other, other_weight, biases[1]))
            return [torch.nn.functional.linear(*head) for head in pairs]  # type: ignore[arg-type]

        exact = logs(torch.float64)
        parts = []
        for logits in exact:
            largest = logits.amax(-1)
            parts += [largest, (logits - largest[:, None]).logsumexp(-1)]
        grad = torch.rand(call.tokens, device=device) + 0.5
        offset = _divergence(call, torch.float64)
        coefficients = torch.stack([part.float() for part in (*parts, grad, offset)])
        room = call.room(-(-call.vocab // 2048) * 2048)

        def judged(wide: torch.dtype) -> Tensor:
            log_p, log_q = (logits.log_softmax(-1) for logits in logs(wide))
            return log_p.exp() * (log_p - log_q - offset[:, None].to(wide)) * grad[:, None].to(wide)

        return Problem(
            lambda: poison([room]),
            lambda: call.chunk(room, 0, call.vocab, coefficients, "reverse"),
            lambda: (room[: call.tokens, : call.vocab],),
            ("gradient",),
            [judged(torch.float32).to(dtype)],
            [judged(torch.float64)],
        )

    return problem


def _matrix_tiles(forward: bool, *shapes: tuple[int, int, int, int, int]) -> Callable[[int | None], Iterator[Config]]:
    """Tokens, words and hidden columns of a tile, warps, stages; a split of the vocabulary has 1024 words."""

    def candidates(_: int | None) -> Iterator[Config]:
        for tokens, words, columns, warps, stages in shapes:
            sizes = {"BLOCK_T": tokens, "BLOCK_V": words, "BLOCK_D": columns}
            if forward:
                sizes["TILES"] = 1024 // words
            yield Config({**sizes, "GROUP": 16}, warps, stages)

    return candidates


_TILES = {
    "": ((128, 64, 32, 8, 3), (128, 64, 64, 8, 3), (64, 64, 32, 4, 2)),
    "wide": ((128, 128, 32, 8, 3), (128, 64, 64, 8, 3), (64, 64, 32, 4, 2)),
    "descriptors": ((128, 64, 64, 8, 4), (128, 64, 128, 8, 2), (64, 128, 64, 4, 4)),
    "descriptors_wide": ((128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 64, 64, 8, 4)),
    "gfx": ((128, 64, 64, 8, 1), (128, 128, 32, 8, 2), (64, 64, 64, 4, 1)),
}

TUNABLES = (
    *(
        Tunable(
            "linear_kl_" + "_".join(part for part in (kind, name) if part),
            _matrix_tiles(kind == "fwd", *shapes),
            problem(name),
        )
        for kind, problem in (("fwd", _fwd), ("bwd", _bwd))
        for name, shapes in _TILES.items()
    ),
    Tunable(
        "linear_kl_merge",
        tiles("BLOCK_SPLITS", "BLOCK_T", (32, 32), (16, 64)),
        _fwd("descriptors_wide"),
    ),
)
