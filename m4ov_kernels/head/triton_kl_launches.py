"""What launches the Triton kernels of ``linear_kl``, for ``triton_kl.py``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m4ov_kernels import configs, gpu
from m4ov_kernels.gpu import Config, current_device
from m4ov_kernels.head import kl_state as states
from m4ov_kernels.head import triton_logprob_launches as logprob
from m4ov_kernels.head.rows import Rows
from m4ov_kernels.head.triton_kl_kernels import (
    _linear_kl_bwd_kernel,
    _linear_kl_fwd_kernel,
    _linear_kl_merge_kernel,
)


def table_of(kernel: str, flags: dict[str, Any], architecture: str) -> str:
    """Two tiles of 128 × 128 logits fit into the registers of eight warps, if little else happens to a logit; not where
    sm_100's forward loads by descriptors. AMD's masks are scalar registers, and run short in other tiles."""
    light = not (flags["FIRST_BIAS"] or flags["SECOND_BIAS"] or flags["ROUNDED"])
    light = light and not flags.get("JSD") and flags.get("KIND") != states.KINDS.index("jsd")
    light = light and not (flags["DESCRIPTORS"] and kernel.endswith("fwd") and architecture not in logprob.WIDE)
    if architecture.startswith("gfx"):
        return kernel + ("_wide" if light and not flags["SCALED"] else "_gfx")
    return kernel + "_descriptors" * flags["DESCRIPTORS"] + "_wide" * light


class Head:
    """Hidden states ``[T, D]``, weight ``[V, D]`` and bias of one head."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight = logprob._dense(hidden), logprob._dense(weight)
        self.bias = None if bias is None else bias.contiguous()

    def operands(self, config: Config, descriptors: bool) -> list[Any]:
        operands: list[Any] = []
        for matrix, block in ((self.hidden, "BLOCK_T"), (self.weight, "BLOCK_V")):
            tile = [config.constexprs[block], config.constexprs["BLOCK_D"]]
            operands += [TensorDescriptor.from_tensor(matrix, tile) if descriptors else matrix, matrix.stride(0)]
        return [*operands, self.weight if self.bias is None else self.bias]


class Call:
    """The arguments that every kernel of a call shares. Rows that do not count come last, or hold finite values."""

    def __init__(self, rows: Rows, policy: Head, reference: Head, temperature: float, rounded: bool) -> None:
        self.target, self.policy, self.reference = rows.target, policy, reference
        self.tokens = rows.target.shape[0]
        self.vocab = policy.weight.shape[0]
        matrices = (policy.hidden, policy.weight, reference.hidden, reference.weight)
        self.descriptors = logprob._by_descriptors(*matrices)
        device = rows.target.device
        counted = torch.arange(1, self.tokens + 1, device=device).masked_fill_(self.target < 0, 0)
        self.live = counted.amax() if self.tokens else counted  # rows from here on do not count
        self.scale = temperature if rounded else 1.0 / temperature
        self.flags = {"DESCRIPTORS": self.descriptors, "ROUNDED": rounded, "SCALED": temperature != 1.0}

    def state(self, first: Head, second: Head, normalizer: Tensor | None) -> Tensor:
        """Of every row before ``live``; others hold anything. See ``kl_state.py``."""
        jsd = normalizer is not None
        like = torch.empty(0, dtype=torch.float32, device=self.target.device)
        state = like.new_zeros(states.JSD_STATES if jsd else states.STATES, self.tokens)
        if not self.tokens:
            return state
        flags = {**self._flags(first, second), "JSD": jsd}
        config, merge = self._config("linear_kl_fwd", flags), configs.get("linear_kl_merge", state)
        sizes = config.constexprs
        splits = triton.cdiv(self.vocab, sizes["BLOCK_V"] * sizes["TILES"])
        partial = state.new_empty(splits, *state.shape)
        units = splits * triton.cdiv(self.tokens, sizes["BLOCK_T"])
        with current_device(state):
            _linear_kl_fwd_kernel[self._grid(units)](
                *self._operands(config, first, second),
                self.live,
                partial if normalizer is None else normalizer,
                partial,
                *self._sizes(first, second),
                self.scale,
                **flags,
                **config.options(),
            )
            grid = (triton.cdiv(self.tokens, merge.constexprs["BLOCK_T"]),)
            _linear_kl_merge_kernel[grid](partial, state, splits, self.tokens, JSD=jsd, **merge.options())
        return state

    def room(self, columns: int) -> Tensor:
        """Of a chunk, in whole tiles; rows that are not computed stay 0."""
        rows = -(-self.tokens // logprob._MOST_ROWS) * logprob._MOST_ROWS
        return torch.zeros(rows, columns, dtype=self.policy.hidden.dtype, device=self.target.device)

    def chunk(
        self, result: Tensor, begin: int, end: int, coefficients: Tensor, kind: str, need_bias: bool = False
    ) -> Tensor:
        """The gradient of the policy's logits of the words from ``begin`` to ``end``, into ``result``. Returns its sums
        by blocks of rows, float32 ``[blocks, columns of result]``, if wanted."""
        kinds = {"KIND": states.KINDS.index(kind), "NEED_BIAS": need_bias}
        flags = {**self._flags(self.policy, self.reference), **kinds}
        config = self._config("linear_kl_bwd", flags)
        sizes = config.constexprs
        blocks = triton.cdiv(self.tokens, sizes["BLOCK_T"])
        assert result.shape[0] >= blocks * sizes["BLOCK_T"]
        # Blocks that are not computed add nothing.
        parts = result.new_zeros(blocks if need_bias else 0, result.shape[1], dtype=torch.float32)
        block = [sizes["BLOCK_T"], sizes["BLOCK_V"]]
        to = TensorDescriptor.from_tensor(result, block) if self.descriptors else result
        tiles = blocks * triton.cdiv(end - begin, sizes["BLOCK_V"])
        with current_device(result):
            _linear_kl_bwd_kernel[self._grid(tiles)](
                *self._operands(config, self.policy, self.reference),
                self.target,
                self.live,
                coefficients,
                to,
                result.stride(0),
                parts if need_bias else result,
                *self._sizes(self.policy, self.reference),
                begin,
                end,
                self.scale,
                **flags,
                **config.options(),
            )
        return parts

    def _config(self, kernel: str, flags: dict[str, Any]) -> Config:
        architecture = gpu.architecture(self.policy.hidden.device)
        return configs.get(table_of(kernel, flags, architecture), self.policy.hidden)

    def _operands(self, config: Config, first: Head, second: Head) -> list[Any]:
        return [*first.operands(config, self.descriptors), *second.operands(config, self.descriptors)]

    def _sizes(self, first: Head, second: Head) -> tuple[int, int, int, int]:
        return self.tokens, self.vocab, first.weight.shape[1], second.weight.shape[1]

    def _flags(self, first: Head, second: Head) -> dict[str, bool]:
        return {**self.flags, "FIRST_BIAS": first.bias is not None, "SECOND_BIAS": second.bias is not None}

    def _grid(self, units: int) -> tuple[int]:
        programs = logprob._PROGRAMS_PER_PROCESSOR[self.descriptors]
        return (min(units, logprob._processors(self.target.device) * programs),)
