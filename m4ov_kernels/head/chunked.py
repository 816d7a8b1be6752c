"""The driver of linear cross entropy: matrix products by chunks of the vocabulary, with an epilogue between them.

The forward keeps a running log-sum-exp per row, and the logits of the first chunks, as many as the caller allows; all
others exist one chunk at a time, in one buffer. The backward takes a chunk's logits from where they were kept or makes
them again (the same bits), turns them into their gradient, and takes two products from it: the chunk's rows of
``grad_weight``, written once, and a contribution to ``grad_input``, summed in float32 over the chunks.

The passes over a chunk are an :class:`Epilogue`: compiled C++ (``native.py``) or Triton (``triton.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m4ov_kernels.head.rows import computed_rows, report_bad_targets
from m4ov_kernels.layout import output

_OP = "linear_cross_entropy"
# On the CPU a fixed width: no row's bits depend on how many other rows there are. 2048 columns are wide enough for
# oneDNN, and narrow enough that a chunk of 1024 rows (4 MiB in bf16) is still cached when the epilogue reads it.
CPU_COLUMNS = 2048
# On a GPU wide chunks, so that few launches suffice; a chunk's logits take at most about this many bytes.
GPU_CHUNK_BYTES = 128 << 20
# Logits that the forward keeps for the backward unless the caller says otherwise. On the CPU, with the head's buffers
# and oneDNN's scratch space, 38 MiB in all at 1024 rows and D = 1024; on a GPU what one chunk takes anyway.
CPU_KEPT_BYTES, GPU_KEPT_BYTES = 20 << 20, GPU_CHUNK_BYTES
ACCUMULATOR_ALIGN = 32  # elements; an epilogue may use the accumulator in whole vectors


class Epilogue(NamedTuple):
    """The passes over a chunk's logits ``[T, C]`` (contiguous), whose first column is vocabulary index ``first``.

    ``reduce(logits, target, first, state, want_total)``: merge the chunk into ``state``, float32 ``[4, T]``: running
    maximum, sum of ``exp(x - maximum)``, the target's logit, and (if ``want_total``) the sum of logits.

    ``differentiate(logits, gradient, target, first, normalizer, grad_loss, target_weight, uniform_weight)``: write
    ``grad_loss · (p - target_weight · [column is target] - uniform_weight)`` to ``gradient``, which may be ``logits``,
    and zero in rows whose target is negative.

    ``add(accumulator, addend, output, assign)``: ``accumulator += addend`` (``=`` when ``assign``) in float32; with
    ``output`` the sum goes there instead, rounded. ``accumulator``: at least ``addend.numel()`` elements rounded up to
    ``ACCUMULATOR_ALIGN``, in an order that is the epilogue's own.

    ``on_host``: whether the host sees the targets. If not (a GPU, or Triton's interpreter in its place), nothing waits
    for them: ignored rows are masked or sorted out, and bad targets give NaN and lower the device's error slot.
    """

    reduce: Callable[[Tensor, Tensor, int, Tensor, bool], None]
    differentiate: Callable[[Tensor, Tensor, Tensor, int, Tensor, Tensor, float, float], None]
    add: Callable[[Tensor, Tensor, Tensor | None, bool], None]
    on_host: bool = True


def _columns(rows: int, vocab_size: int, itemsize: int, on_host: bool) -> int:
    columns = CPU_COLUMNS
    if not on_host:
        columns = max(columns, GPU_CHUNK_BYTES // (rows * itemsize) // CPU_COLUMNS * CPU_COLUMNS)
    return min(columns, vocab_size)


def room_for_logits(rows: int, vocab_size: int, itemsize: int, num_valid: int | None, keep_logits_bytes: int) -> int:
    """Elements of the room in which logits are kept. Only whole chunks of the rows that count are; what is left of the
    room holds zeros."""
    return min(keep_logits_bytes // itemsize, (rows if num_valid is None else num_valid) * vocab_size)


def _chunks(
    rows: int, vocab_size: int, room: Tensor, on_host: bool
) -> Iterator[tuple[int, int, Tensor | None, Tensor]]:
    """``(first, last, kept, buffer)`` over the vocabulary: views ``[rows, last - first]`` of ``room`` for as many whole
    chunks as it holds, then ``None``; and of one buffer, used again."""
    columns = _columns(rows, vocab_size, room.element_size(), on_host)
    buffer = room.new_empty(rows * columns)
    for first in range(0, vocab_size, columns):
        last = min(first + columns, vocab_size)
        shape = rows, last - first
        keep = room[rows * first : rows * last].view(shape) if rows * last <= room.numel() else None
        yield first, last, keep, buffer[: shape[0] * shape[1]].view(shape)


def _project(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, chunk: slice, logits: Tensor) -> None:
    if linear_bias is None:
        torch.mm(input, linear_weight[chunk].t(), out=logits)
    else:
        torch.addmm(linear_bias[chunk], input, linear_weight[chunk].t(), out=logits)


@torch.no_grad()
def forward(
    epilogue: Epilogue,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    num_valid: int | None,
    keep_logits_bytes: int,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, normalizer, kept)``: float32 ``[T]`` and ``[T, 2]``, 0 in rows without a loss, and the kept logits.

    The normalizer is the log-sum-exp in two parts, the largest logit and the log of the sum of ``exp(x - largest)``:
    one float32 for both would cost logits of 60 two decimal digits of their probabilities. ``kept``, flat, in the dtype
    of ``input``, holds the first chunks of the computed rows, which :func:`backward` does not have to compute again.
    """
    loss = output(out and out[0], target.shape, target, torch.float32)
    normalizer = output(out and out[1], (target.shape[0], 2), target, torch.float32)
    vocab_size = linear_weight.shape[0]
    if not epilogue.on_host:
        report_bad_targets(_OP, target, vocab_size, ignore_index)
    rows = computed_rows(_OP, "target", input, target, vocab_size, ignore_index, num_valid, epilogue.on_host)
    count = rows.target.shape[0]
    state = torch.zeros(4, count, dtype=torch.float32, device=input.device)
    state[0].fill_(-math.inf)
    itemsize = input.element_size()
    size = room_for_logits(target.shape[0], vocab_size, itemsize, num_valid, keep_logits_bytes)
    kept, used = output(out and out[2], (size,), input, input.dtype), 0
    if count:
        for first, last, keep, buffer in _chunks(count, vocab_size, kept, epilogue.on_host):
            logits = buffer if keep is None else keep
            used += 0 if keep is None else keep.numel()
            _project(rows.input, linear_weight, linear_bias, slice(first, last), logits)
            epilogue.reduce(logits, rows.target, first, state, label_smoothing > 0)
    kept[used:].zero_()  # room of ignored rows, which nothing reads; no output is handed on unwritten
    maximum, total_exp, at_target, total = state
    log_total = total_exp.log_()
    row_loss = maximum - at_target
    if label_smoothing > 0:  # each share by itself: an infinite logit of the target's must not meet one in the total
        row_loss.mul_(1.0 - label_smoothing).add_(maximum - total.div_(vocab_size), alpha=label_smoothing)
    row_loss += log_total
    row_normalizer = torch.stack((maximum, log_total), 1)
    if not epilogue.on_host:
        row_normalizer.masked_fill_((rows.target == vocab_size)[:, None], math.nan)
        row_loss.masked_fill_(rows.target == vocab_size, math.nan)
        row_loss.masked_fill_(rows.target < 0, 0.0)
        row_normalizer.masked_fill_((rows.target < 0)[:, None], 0.0)
    rows.put_rows(loss, row_loss)
    rows.put_rows(normalizer, row_normalizer)
    return loss, normalizer, kept


@torch.no_grad()
def backward(
    epilogue: Epilogue,
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    normalizer: Tensor,
    kept: Tensor,
    ignore_index: int,
    label_smoothing: float,
    num_valid: int | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_input, grad_weight, grad_bias)``; an empty tensor for each that is not needed."""
    need_bias = need_bias and linear_bias is not None
    needed = (need_input, need_weight, need_bias)
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    grad_input, grad_weight, grad_bias = (
        output(out and out[i], shapes[i] if needed[i] else (0,), input, input.dtype) for i in range(3)
    )
    vocab_size = linear_weight.shape[0]
    rows = computed_rows(_OP, "target", input, target, vocab_size, ignore_index, num_valid, epilogue.on_host)
    count = rows.target.shape[0]
    if not any(needed) or count == 0:
        for gradient in (grad_input, grad_weight, grad_bias):
            gradient.zero_()
        return grad_input, grad_weight, grad_bias
    row_grad_loss, row_normalizer = rows.take(grad_loss), rows.take(normalizer, 0)
    row_grad_input = grad_input if rows.index is None else torch.empty_like(rows.input) if need_input else grad_input
    sum_chunks = _input_gradient(epilogue, row_grad_input, linear_weight) if need_input else None
    for first, last, keep, gradient in _chunks(count, vocab_size, kept, epilogue.on_host):
        chunk = slice(first, last)
        if keep is None:
            _project(rows.input, linear_weight, linear_bias, chunk, gradient)
        epilogue.differentiate(
            gradient if keep is None else keep,
            gradient,
            rows.target,
            first,
            row_normalizer,
            row_grad_loss,
            1.0 - label_smoothing,
            label_smoothing / vocab_size,
        )
        if need_weight:
            torch.mm(gradient.t(), rows.input, out=grad_weight[chunk])
        if need_bias:
            grad_bias[chunk] = torch.sum(gradient, 0, dtype=torch.float32)
        if sum_chunks is not None:
            sum_chunks(gradient, first, last)
    if need_input:
        rows.put_rows(grad_input, row_grad_input)
    return grad_input, grad_weight, grad_bias


def _input_gradient(epilogue: Epilogue, result: Tensor, linear_weight: Tensor) -> Callable[[Tensor, int, int], Any]:
    """Sums ``logits gradient @ linear_weight[first:last]`` over the chunks into ``result``."""
    vocab_size = linear_weight.shape[0]
    padded = (result.numel() + ACCUMULATOR_ALIGN - 1) // ACCUMULATOR_ALIGN * ACCUMULATOR_ALIGN
    buffers: list[Tensor] = []

    def add(gradient: Tensor, first: int, last: int) -> None:
        weight = linear_weight[first:last]
        if first == 0 and last == vocab_size:
            torch.mm(gradient, weight, out=result)
            return
        if not buffers:
            buffers.extend((result.new_empty(padded, dtype=torch.float32), torch.empty_like(result)))
        accumulator, addend = buffers
        torch.mm(gradient, weight, out=addend)
        epilogue.add(accumulator, addend, result if last == vocab_size else None, first == 0)

    return add
