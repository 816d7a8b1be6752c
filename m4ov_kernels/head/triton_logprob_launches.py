"""What launches the Triton kernels of ``linear_logprob``, for ``triton_logprob.py``."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m4ov_kernels import configs, gpu
from m4ov_kernels.gpu import Config, current_device
from m4ov_kernels.head.rows import Rows
from m4ov_kernels.head.triton_logprob_kernels import (
    _linear_logprob_bwd_kernel,
    _linear_logprob_fwd_kernel,
    _linear_logprob_merge_kernel,
)

# What a chunk of the vocabulary may take: the gradient of its logits in the backward; its logits and their sort keys
# where the likeliest words are asked for. By the shape alone, never measured.
GPU_CHUNK_BYTES = 128 << 20
_CHUNK_WORDS, _MOST_ROWS = 2048, 256  # chunks are multiples of them, and so of every tile
# Architectures that load tiles by tensor descriptors (TMA); others would take pointers apart again. sm_90 keeps a tile
# of 128 × 256 logits in the registers of two warp groups, if not too much else happens to a logit.
DESCRIPTORS, WIDE = ("sm_90", "sm_100", "cpu"), ("sm_90", "cpu")  # cpu: interpreted
_PROGRAMS_PER_PROCESSOR = {True: 1, False: 2}  # with descriptors and without: float32's small tiles


def columns_of_a_chunk(bytes_each: int, vocab: int) -> int:
    """Words of a chunk; of the last one as many as there are."""
    most = max(1, GPU_CHUNK_BYTES // max(1, bytes_each) // _CHUNK_WORDS)
    return _CHUNK_WORDS * min(most, -(-vocab // _CHUNK_WORDS))


def table_of(kernel: str, flags: dict[str, bool], wide: bool) -> str:
    if not flags["DESCRIPTORS"]:
        return kernel
    often = any(flags.get(name) for name in ("HAS_BIAS", "CAPPED", "WEIGHTED", "TOTAL", "LOGITS"))
    light = not often and not (flags["ROUNDED"] and flags["SCALED"])
    return f"{kernel}_{'wide' if wide and light else 'descriptors'}"


class Call:
    """The arguments that every kernel of a call shares."""

    def __init__(
        self,
        rows: Rows,
        weight: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        temperature: float,
        softcap: float,
        rounded: bool,
        first: int,
    ) -> None:
        self.hidden, self.weight, self.target = _dense(rows.input), _dense(weight), rows.target
        self.tokens, self.first = rows.target.shape[0], first
        self.descriptors = _by_descriptors(self.hidden, self.weight)
        counted = torch.arange(1, self.tokens + 1, device=weight.device).masked_fill_(self.target < 0, 0)
        self.live = counted.amax() if self.tokens else counted  # rows from here on are ignored
        self.bias = None if bias is None else bias.contiguous()
        self.class_weight = None if class_weight is None else class_weight.to(torch.float32).contiguous()
        self.scalars = (temperature if rounded else 1.0 / temperature, softcap)
        self.flags = {
            "DESCRIPTORS": self.descriptors,
            "HAS_BIAS": bias is not None,
            "ROUNDED": rounded,
            "SCALED": temperature != 1.0,
            "CAPPED": softcap != 0.0,
            "WEIGHTED": class_weight is not None,
        }

    def config(self, kernel: str, flags: dict[str, bool]) -> Config:
        architecture = gpu.architecture(self.hidden.device)
        return configs.get(table_of(kernel, flags, architecture in WIDE), self.hidden)

    def room(self, columns: int, dtype: torch.dtype) -> Tensor:
        """Of a chunk, in whole tiles; rows that are not computed stay 0."""
        rows = -(-self.tokens // _MOST_ROWS) * _MOST_ROWS
        return torch.zeros(rows, columns, dtype=dtype, device=self.weight.device)

    def forward(self, state: Tensor, centred: bool, total: bool) -> None:
        """Of every row before ``live``; others hold anything."""
        wanted = {"CENTRED": centred, "TOTAL": total}
        flags = {**self.flags, **wanted, "WEIGHTED": total and self.class_weight is not None}
        config, merge = self.config("linear_logprob_fwd", flags), configs.get("linear_logprob_merge", state)
        sizes = config.constexprs
        splits = triton.cdiv(self.weight.shape[0], sizes["BLOCK_V"] * sizes["TILES"])
        partial = state.new_empty(splits, 3 + centred + total, self.tokens)
        vectors = (self.class_weight if total else None, self.target, self.live, partial)
        units = splits * triton.cdiv(self.tokens, sizes["BLOCK_T"])
        with current_device(state):
            _linear_logprob_fwd_kernel[self._grid(units)](
                *self._operands(config, vectors),
                *self._sizes(),
                self.first,
                *self.scalars,
                **flags,
                **config.options(),
            )
            grid = (triton.cdiv(self.tokens, merge.constexprs["BLOCK_T"]),)
            _linear_logprob_merge_kernel[grid](partial, state, splits, self.tokens, **wanted, **merge.options())

    def chunk(
        self,
        result: Tensor,
        begin: int,
        end: int,
        coefficients: Tensor | None,
        general: bool = False,
        need_bias: bool = False,
    ) -> Tensor:
        """The logits' gradient of the words from ``begin`` to ``end``, or without ``coefficients`` their logits, into
        ``result``. Returns the gradient's sums by blocks of rows, float32 ``[blocks, columns of result]``, if wanted.
        """
        given = self.target if coefficients is None else coefficients
        vectors = (self.class_weight if general else None, self.target, self.live, given)
        flags = {
            **self.flags,
            "GENERAL": general,
            "WEIGHTED": general and self.class_weight is not None,
            "NEED_BIAS": need_bias,
            "LOGITS": coefficients is None,
        }
        config = self.config("linear_logprob_bwd", flags)
        sizes = config.constexprs
        blocks = triton.cdiv(self.tokens, sizes["BLOCK_T"])
        assert result.shape[0] >= blocks * sizes["BLOCK_T"]
        # Blocks that are not computed add nothing.
        parts = result.new_zeros(blocks if need_bias else 0, result.shape[1], dtype=torch.float32)
        by_descriptor = self.descriptors and coefficients is not None
        to = TensorDescriptor.from_tensor(result, [sizes["BLOCK_T"], sizes["BLOCK_V"]]) if by_descriptor else result
        tiles = blocks * triton.cdiv(end - begin, sizes["BLOCK_V"])
        with current_device(result):
            _linear_logprob_bwd_kernel[self._grid(tiles)](
                *self._operands(config, vectors),
                to,
                result.stride(0),
                parts if need_bias else result,
                *self._sizes(),
                self.first,
                begin,
                end,
                *self.scalars,
                **flags,
                **config.options(),
            )
        return parts

    def likeliest(self, count: int) -> tuple[Tensor, Tensor]:
        """``[T, k]``: logits and words, the likeliest first, the smaller word first where they are equal."""
        like = self.hidden
        if count == 0 or self.tokens == 0:
            shape = (self.tokens, count)
            return like.new_zeros(shape, dtype=torch.float32), like.new_zeros(shape, dtype=torch.int64)
        vocab = self.weight.shape[0]
        columns = columns_of_a_chunk(self.tokens * (4 + 8 + 8), vocab)
        logits = self.room(columns, torch.float32)
        best = like.new_empty((self.tokens, 0), dtype=torch.int64)
        for begin in range(0, vocab, columns):
            end = min(begin + columns, vocab)
            self.chunk(logits, begin, end, None)
            keys = _keys(logits[: self.tokens, : end - begin], self.first + begin)
            found = keys.topk(min(count, end - begin), dim=1).values
            best = torch.cat((best, found), 1)
            best = best.topk(min(count, best.shape[1]), dim=1).values
        return _values_of(best)

    def _operands(self, config: Config, vectors: tuple[Tensor | None, ...]) -> list[Any]:
        operands: list[Any] = []
        for matrix, block in ((self.hidden, "BLOCK_T"), (self.weight, "BLOCK_V")):
            tile = [config.constexprs[block], config.constexprs["BLOCK_D"]]
            operands += [TensorDescriptor.from_tensor(matrix, tile) if self.descriptors else matrix, matrix.stride(0)]
        operands.append(self.weight if self.bias is None else self.bias)
        return operands + [self.target if vector is None else vector for vector in vectors]

    def _sizes(self) -> tuple[int, int, int]:
        return (self.tokens, *self.weight.shape)

    def _grid(self, units: int) -> tuple[int]:
        return (min(units, _processors(self.hidden.device) * _PROGRAMS_PER_PROCESSOR[self.descriptors]),)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _by_descriptors(*matrices: Tensor) -> bool:
    """float32 has no tensor cores' precision, and so nothing to hurry for."""
    if matrices[0].dtype is torch.float32 or gpu.architecture(matrices[0].device) not in DESCRIPTORS:
        return False
    return all(
        matrix.numel() > 0
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        for matrix in matrices
    )


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_LAST_WORD = 2**32 - 1


def _keys(logits: Tensor, first: int) -> Tensor:
    """int64 whose order is that of the logits, NaN above all, and the smaller word above where they are equal."""
    bits = logits.add(0.0).nan_to_num_(math.nan, math.inf, -math.inf).view(torch.int32)  # no -0, one NaN
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    word = torch.arange(first, first + logits.shape[1], device=logits.device)
    return (ordered << 32) | (_LAST_WORD - word)


def _values_of(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), _LAST_WORD - (keys & _LAST_WORD)
