"""The language-model head: a projection on the vocabulary and what is made of it, logits never whole in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator
from m4ov_kernels.head import reference
from m4ov_kernels.head.chunked import CPU_KEPT_BYTES, GPU_KEPT_BYTES, room_for_logits
from m4ov_kernels.head.kl import LINEAR_KL, linear_kl
from m4ov_kernels.head.logprob import LINEAR_LOGPROB, LogprobOutput, linear_logprob
from m4ov_kernels.head.losses import (
    GroupAdvantages,
    RewardMean,
    dpo_loss,
    group_advantages,
    kl_estimate,
    mpo_loss,
    overlong_penalty,
    pass_at_k_advantages,
    policy_loss,
    rollout_weights,
)
from m4ov_kernels.head.targets import check_target_values

__all__ = [
    "LINEAR_KL",
    "LINEAR_LOGPROB",
    "GroupAdvantages",
    "LogprobOutput",
    "RewardMean",
    "dpo_loss",
    "group_advantages",
    "kl_estimate",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
    "mpo_loss",
    "overlong_penalty",
    "pass_at_k_advantages",
    "policy_loss",
    "rollout_weights",
]

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    num_items_in_batch: int | float | Tensor | None = None,
    num_valid: int | None = None,
    keep_logits_bytes: int | None = None,
) -> Tensor:
    """Cross entropy of ``softmax(input @ linear_weightᵀ + linear_bias)``, in chunks of the vocabulary.

    The names are those of ``torch.nn.functional.linear_cross_entropy``. Rows whose target is ``ignore_index`` cost
    nothing: they are dropped before the first matrix product (on the CPU always; on a GPU when ``num_valid`` says how
    many stay, because counting there would stop the host).

    Args:
        input: ``[..., D]`` hidden states, bfloat16, float16, float32 or float64.
        linear_weight: ``[V, D]``, same dtype and device (other floating dtypes are served by the reference).
        target: ``[...]`` int64 class indices in ``[0, V)`` or ``ignore_index``.
        linear_bias: ``[V]``.
        weight: class weights; not taken yet, refused if given.
        ignore_index: target value of rows that have no loss.
        reduction: ``"mean"`` over the rows that count (NaN if there are none, as PyTorch), ``"sum"`` or ``"none"``.
        label_smoothing: in ``[0, 1]``: the share of the target spread evenly over the vocabulary.
        num_items_in_batch: with ``reduction="mean"``, divide the sum by this instead of by the rows that count
            (Hugging Face's normalisation over gradient accumulation); a number or a tensor with one element.
        num_valid: how many targets differ from ``ignore_index``, if the caller knows. Rows beyond it have NaN loss.
        keep_logits_bytes: how many bytes of logits the forward may keep for the backward, which computes all others
            again: 0 for the least memory, the whole ``T * V`` (of the rows that count) for three matrix products
            instead of four. The same bits either way. ``None``: 20 MiB on the CPU, 128 MiB on a GPU. Without gradients
            nothing is kept.

    Returns:
        The loss: float32 (float64 for float64 input), a scalar, or shaped as ``target`` for ``reduction="none"``.

    Logits are rounded to the dtype of ``input``, as an unfused model rounds them; softmax, loss and the sum of the
    gradient of ``input`` over chunks are float32. Saves for backward: ``input``, ``linear_weight``, ``target``,
    ``linear_bias``, the log-sum-exp in two parts, float32 ``[T, 2]``, and the kept logits; the backward computes
    nothing for a frozen tensor.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes, devices or options do not fit, or (CPU) a target is out of range: names the first. On a GPU
            such a row's loss is NaN and :func:`m4ov_kernels.check` raises the error.

    Source: chunked recompute as in "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.
    """
    _check(input, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing)
    rows = target.shape.numel()
    _check_counts(num_items_in_batch, reduction, num_valid, rows)
    keep = _kept_bytes(keep_logits_bytes, input, linear_weight, linear_bias)
    flat_input, flat_target = input.reshape(rows, input.shape[-1]), target.reshape(rows)
    dtype = input.dtype
    same = linear_weight.dtype is dtype and (linear_bias is None or linear_bias.dtype is dtype)
    implementation = LINEAR_CROSS_ENTROPY.select(input.device, dtype if same else None)
    if implementation is None:
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            check_target_values(_OP, "target", flat_target, linear_weight.shape[0], ignore_index)
        loss = reference.linear_cross_entropy(
            flat_input, linear_weight, flat_target, linear_bias, ignore_index, label_smoothing
        )
    else:
        loss, *_ = LINEAR_CROSS_ENTROPY(
            implementation,
            flat_input,
            linear_weight,
            flat_target,
            linear_bias,
            ignore_index,
            float(label_smoothing),
            num_valid,
            keep,
        )
    if reduction == "none":
        return loss.reshape(target.shape)
    total = loss.sum()
    if reduction == "sum":
        return total
    if num_items_in_batch is None:
        return total / (flat_target != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device).reshape(())
    return total / num_items_in_batch


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> None:
    checks.float_tensor(_OP, "input", input)
    checks.float_tensor(_OP, "linear_weight", linear_weight)
    if not isinstance(target, Tensor) or target.dtype is not torch.int64 or target.layout is not torch.strided:
        checks.refuse(TypeError, _OP, "target", "a dense int64 tensor of class indices", _kind(target))
    if not input.shape or input.shape[-1] == 0:
        checks.refuse(ValueError, _OP, "input", "[..., D] with D at least 1", list(input.shape))
    if linear_weight.ndim != 2 or linear_weight.shape[1] != input.shape[-1] or linear_weight.shape[0] == 0:
        expected = f"[V, {input.shape[-1]}] with V at least 1"
        checks.refuse(ValueError, _OP, "linear_weight", expected, list(linear_weight.shape))
    if target.shape != input.shape[:-1]:
        checks.refuse(ValueError, _OP, "target", f"{list(input.shape[:-1])}, as input's rows", list(target.shape))
    if linear_bias is not None:
        checks.float_tensor(_OP, "linear_bias", linear_bias)
        if linear_bias.shape != linear_weight.shape[:1]:
            checks.refuse(ValueError, _OP, "linear_bias", f"[{linear_weight.shape[0]}]", list(linear_bias.shape))
    for name, tensor in (("linear_weight", linear_weight), ("target", target), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.device != input.device:
            checks.refuse(ValueError, _OP, name, f"on {input.device}, as input", f"one on {tensor.device}")
    if weight is not None:
        checks.refuse(ValueError, _OP, "weight", "None (class weights are not supported yet)", checks.describe(weight))
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        checks.refuse(TypeError, _OP, "ignore_index", "an int", checks.describe(ignore_index))
    if not -(2**63) <= ignore_index < 2**63:
        checks.refuse(ValueError, _OP, "ignore_index", "an int of 64 bits", repr(ignore_index))
    checks.one_of(_OP, "reduction", reduction, ("mean", "sum", "none"))
    checks.number(_OP, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        checks.refuse(ValueError, _OP, "label_smoothing", "between 0 and 1", repr(label_smoothing))


def _kind(value: Any) -> str:
    sparse = isinstance(value, Tensor) and value.layout is not torch.strided
    return f"layout {value.layout}" if sparse else checks.describe(value)


def _check_counts(
    num_items_in_batch: int | float | Tensor | None, reduction: str, num_valid: int | None, rows: int
) -> None:
    if num_items_in_batch is not None:
        if reduction != "mean":
            expected = 'None unless reduction is "mean"'
            checks.refuse(ValueError, _OP, "num_items_in_batch", expected, f"a value with reduction={reduction!r}")
        if isinstance(num_items_in_batch, Tensor):
            if num_items_in_batch.numel() != 1 or num_items_in_batch.is_complex():
                expected = "a number or a tensor with one real element"
                checks.refuse(ValueError, _OP, "num_items_in_batch", expected, checks.describe(num_items_in_batch))
        else:
            checks.number(_OP, "num_items_in_batch", num_items_in_batch)
            if not num_items_in_batch > 0:
                checks.refuse(ValueError, _OP, "num_items_in_batch", "greater than 0", repr(num_items_in_batch))
    if num_valid is not None and (isinstance(num_valid, bool) or not isinstance(num_valid, (int, torch.SymInt))):
        checks.refuse(TypeError, _OP, "num_valid", "an int or None", checks.describe(num_valid))
    if num_valid is not None and not 0 <= num_valid <= rows:
        checks.refuse(ValueError, _OP, "num_valid", f"between 0 and the {rows} rows", repr(num_valid))


def _kept_bytes(asked: int | None, *tensors: Tensor | None) -> int:
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int):
            checks.refuse(TypeError, _OP, "keep_logits_bytes", "an int or None", checks.describe(asked))
        if asked < 0:
            checks.refuse(ValueError, _OP, "keep_logits_bytes", "a number of bytes, 0 or more", repr(asked))
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return 0
    if asked is not None:
        return asked
    return CPU_KEPT_BYTES if tensors[0].device.type == "cpu" else GPU_KEPT_BYTES  # type: ignore[union-attr]


def _fwd_fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    num_valid: int | None,
    keep_logits_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = input.new_empty(target.shape, dtype=torch.float32)
    itemsize = input.element_size()
    kept = room_for_logits(target.shape[0], linear_weight.shape[0], itemsize, num_valid, keep_logits_bytes)
    return loss, loss.new_empty((*target.shape, 2)), input.new_empty(kept)


def _bwd_fake(
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
) -> tuple[Tensor, Tensor, Tensor]:
    def gradient(like: Tensor | None, needed: bool) -> Tensor:
        if like is None or not needed:
            return input.new_empty(0)
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    return gradient(input, need_input), gradient(linear_weight, need_weight), gradient(linear_bias, need_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, linear_weight, target, linear_bias, *ctx.options, _ = inputs
    ctx.save_for_backward(input, linear_weight, target, linear_bias, *output[1:])


def _backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    need_input, need_weight, _, need_bias, *_ = needs
    input, linear_weight, target, linear_bias, normalizer, kept = ctx.saved_tensors
    grad_input, grad_weight, grad_bias = bwd(
        grads[0],
        input,
        linear_weight,
        target,
        linear_bias,
        normalizer,
        kept,
        *ctx.options,
        need_input,
        need_weight,
        need_bias,
    )
    return (
        grad_input if need_input else None,
        grad_weight if need_weight else None,
        None,
        grad_bias if need_bias else None,
        None,
        None,
        None,
        None,
    )


LINEAR_CROSS_ENTROPY = Operator(
    "head",
    _OP,
    fwd_schema="(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, int ignore_index,"
    " float label_smoothing, SymInt? num_valid, int keep_logits_bytes)"
    " -> (Tensor loss, Tensor normalizer, Tensor kept)",
    bwd_schema="(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias,"
    " Tensor normalizer, Tensor kept, int ignore_index, float label_smoothing, SymInt? num_valid, bool need_input,"
    " bool need_weight, bool need_bias) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    results=lambda *_: 1,
    setup_context=_setup_context,
    backward=_backward,
)
