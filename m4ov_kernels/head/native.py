"""``linear_cross_entropy`` through the compiled kernels (CPU): ``chunked.py`` with C++ passes over the logits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.head import chunked
from m4ov_kernels.head.native_kl import linear_kl_bwd, linear_kl_fwd
from m4ov_kernels.head.native_logprob import linear_logprob_bwd, linear_logprob_fwd
from m4ov_kernels.layout import DTYPES


def _reduce(logits: Tensor, target: Tensor, first: int, state: Tensor, want_total: bool) -> None:
    _C.cross_entropy_fwd(
        state.data_ptr(),
        logits.data_ptr(),
        target.data_ptr(),
        *logits.shape,
        logits.shape[1],
        first,
        want_total,
        DTYPES[logits.dtype],
        torch.get_num_threads(),
    )


def _differentiate(
    logits: Tensor,
    gradient: Tensor,
    target: Tensor,
    first: int,
    normalizer: Tensor,
    grad_loss: Tensor,
    target_weight: float,
    uniform_weight: float,
) -> None:
    _C.cross_entropy_bwd(
        gradient.data_ptr(),
        logits.data_ptr(),
        target.data_ptr(),
        normalizer.data_ptr(),
        grad_loss.data_ptr(),
        *logits.shape,
        logits.shape[1],
        first,
        target_weight,
        uniform_weight,
        DTYPES[logits.dtype],
        torch.get_num_threads(),
    )


def _add(accumulator: Tensor, addend: Tensor, output: Tensor | None, assign: bool) -> None:
    _C.accumulate(
        accumulator.data_ptr(),
        0 if output is None else output.data_ptr(),
        addend.data_ptr(),
        addend.numel(),
        assign,
        DTYPES[addend.dtype],
        torch.get_num_threads(),
    )


__all__ = [
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "linear_kl_bwd",
    "linear_kl_fwd",
    "linear_logprob_bwd",
    "linear_logprob_fwd",
]

EPILOGUE = chunked.Epilogue(_reduce, _differentiate, _add)

# chunked.forward and chunked.backward with these passes; see there for arguments and results.
linear_cross_entropy_fwd = partial(chunked.forward, EPILOGUE)
linear_cross_entropy_bwd = partial(chunked.backward, EPILOGUE)
