"""``linear_cross_entropy`` through the compiled kernels (CPU): ``chunked.py`` with C++ passes over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.head import chunked
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
    target: Tensor,
    first: int,
    normalizer: Tensor,
    grad_loss: Tensor,
    target_weight: float,
    uniform_weight: float,
) -> None:
    _C.cross_entropy_bwd(
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


EPILOGUE = chunked.Epilogue(_reduce, _differentiate, _add)


def linear_cross_entropy_fwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    num_valid: int | None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(loss, normalizer)``; see ``chunked.forward``."""
    return chunked.forward(
        EPILOGUE, input, linear_weight, target, linear_bias, ignore_index, label_smoothing, num_valid, out
    )


def linear_cross_entropy_bwd(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    normalizer: Tensor,
    ignore_index: int,
    label_smoothing: float,
    num_valid: int | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_input, grad_weight, grad_bias)``, an empty tensor for each not needed; see ``chunked.backward``."""
    return chunked.backward(
        EPILOGUE,
        grad_loss,
        input,
        linear_weight,
        target,
        linear_bias,
        normalizer,
        ignore_index,
        label_smoothing,
        num_valid,
        need_input,
        need_weight,
        need_bias,
        out,
    )
