"""``linear_cross_entropy``: the loss of hidden states, without their logits, by the kernels of ``linear_logprob``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.head import state as states
from m4ov_kernels.head import vocab_parallel
from m4ov_kernels.head.logprob import NUMERICS, raw

_OP = "linear_cross_entropy"
# The forward keeps the logits of rows so few that they take no more than this, unless the caller says otherwise.
FEW_BYTES = 20 << 20


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    num_valid: int | None = None,
    keep_logits_bytes: int | None = None,
    group_name: str | None = None,
    numerics: str = "hf",
) -> Tensor:
    """Cross entropy of ``softmax(input @ linear_weightᵀ + linear_bias)``, logits never whole in memory.

    The names, and what they mean, are those of ``torch.nn.functional.linear_cross_entropy`` and ``cross_entropy``. Rows
    whose target is ``ignore_index`` cost nothing: they are dropped before the first matrix product (on the CPU always;
    on a GPU when ``num_valid`` says how many stay, because counting there would stop the host).

    Args:
        input: ``[..., D]`` hidden states, bfloat16, float16, float32 or float64.
        linear_weight: ``[V, D]``, same dtype and device (other floating dtypes are served by the reference).
        target: ``[...]`` int64 class indices in ``[0, V)`` or ``ignore_index``.
        linear_bias: ``[V]``.
        weight: ``[V]``, of each class, floating point, without a gradient. As in ``cross_entropy``: a row's loss times
            its target's weight; with label smoothing, every class's share times its own.
        ignore_index: target value of rows that have no loss.
        reduction: ``"mean"`` over the rows that count, by the weights of their targets if there are ``weight`` (NaN if
            there are none, as PyTorch), ``"sum"`` or ``"none"``.
        label_smoothing: in ``[0, 1]``: the share of the target spread evenly over the vocabulary.
        z_loss: 0 or more: adds ``z_loss · logsumexp²`` to each row that counts; in a mean it is divided by their
            number, whatever the ``weight``.
        softcap: above 0: logits become ``softcap · tanh(logits / softcap)``, in float32.
        num_items_in_batch: with ``reduction="mean"``, divide the sum by this instead (Hugging Face's normalisation over
            gradient accumulation); a number or a tensor with one element.
        num_valid: how many targets differ from ``ignore_index``, if the caller knows. Rows beyond it have NaN loss.
        keep_logits_bytes: how many bytes of logits the forward may keep for the backward, which computes all others
            again: 0 for the least memory, the whole ``T * V`` (of the rows that count) for three matrix products
            instead of four. The same bits either way. ``None``: all, if that takes no more than 20 MiB, else none.
            Without gradients, and by GPU kernels, nothing is kept.
        group_name: of the process group over which ``linear_weight`` and ``linear_bias`` are sharded by rows, in order
            of rank; ``target`` and ``weight`` are of the whole vocabulary, and equal on every rank, as ``input`` is.
            A few numbers a row are gathered, never logits. The gradient of ``input`` is this rank's share: their sum
            over the group is the whole.
        numerics: ``"hf"``: logits are rounded, once, to the dtype of ``input``, as an unfused model rounds them.
            ``"fp32"``: never.

    Returns:
        The loss: float32 (float64 for float64 input), a scalar, or shaped as ``target`` for ``reduction="none"``.

    Softmax, loss and the sums of gradients are float32. Saves for backward: the inputs, three float32 a row, and the
    kept logits; the backward computes nothing for a frozen tensor.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes, devices or options do not fit, or (CPU) a target is out of range: names the first. On a GPU
            such a row's loss is NaN and :func:`m4ov_kernels.check` raises the error.

    Source: chunked recompute as in "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009; z-loss:
    "PaLM", arXiv 2204.02311; soft-capping: "Gemma 2", arXiv 2408.00118.
    """
    _check(input, linear_weight, target, linear_bias, ignore_index, reduction, label_smoothing)
    rows = target.shape.numel()
    _check_counts(num_items_in_batch, reduction, num_valid, rows)
    _check_extras(z_loss, softcap, keep_logits_bytes, numerics)
    keep = 0
    if _differentiated(input, linear_weight, linear_bias) and input.device.type == "cpu":
        itemsize = states.logits_dtype(input, numerics == "hf", softcap).itemsize
        few = (target, linear_weight, itemsize, ignore_index, num_valid)
        keep = _few(*few) if keep_logits_bytes is None else keep_logits_bytes
    shards = None if group_name is None else vocab_parallel.shards(_OP, linear_weight, group_name)
    first, vocab_size = (0, linear_weight.shape[0]) if shards is None else (shards.first, shards.vocab_size)
    if weight is not None:
        _check_weight(weight, vocab_size, input)
    own_weight = None if weight is None else weight[first : first + linear_weight.shape[0]]
    found = raw(
        input,
        linear_weight,
        target,
        bias=linear_bias,
        class_weight=own_weight if label_smoothing else None,
        softcap=softcap or 0.0,
        ignore_index=ignore_index,
        total=label_smoothing > 0,
        num_valid=num_valid,
        rounded=numerics == "hf",
        keep_logits_bytes=keep,
        shards=shards,
        caller=_OP,
    )
    targets = target.reshape(rows)
    if shards is not None:
        found = vocab_parallel.merge(_OP, found, targets, targets != ignore_index, shards, 0, argument="linear_weight")
    loss, weights = 0.0 - found.logprob, None  # not -0 in ignored rows
    if weight is not None:
        weights = _of_targets(weight.to(loss.dtype), targets, ignore_index)
        loss = loss * weights
    if label_smoothing:
        # Σ weight · -log p, of the whole vocabulary
        mass = vocab_size if weight is None else weight.sum(dtype=loss.dtype)
        spread = found.logsumexp * (mass / vocab_size) - found.total / vocab_size
        loss = loss * (1.0 - label_smoothing) + spread * label_smoothing
    penalty = z_loss * found.logsumexp.square() if z_loss else None
    if reduction == "mean" and num_items_in_batch is None:
        count = (targets != ignore_index).sum()
        mean = loss.sum() / (count if weights is None else weights.sum())
        return mean if penalty is None else mean + penalty.sum() / count
    if penalty is not None:
        loss = loss + penalty
    if reduction == "none":
        return loss.reshape(target.shape)
    total = loss.sum()
    if num_items_in_batch is None:
        return total
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device).reshape(())
    return total / num_items_in_batch


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _few(target: Tensor, linear_weight: Tensor, itemsize: int, ignore_index: int, num_valid: int | None) -> int:
    """Bytes of the logits of the rows that count (of all, where that cannot be seen) if these are few, else 0."""
    count = target.numel() if num_valid is None else num_valid
    whole = states.count_of_logits(count, linear_weight) * itemsize
    if whole > FEW_BYTES and num_valid is None and type(target) is Tensor and not torch.compiler.is_compiling():
        whole = states.count_of_logits(int((target != ignore_index).sum()), linear_weight) * itemsize
    return whole if whole <= FEW_BYTES else 0


def _of_targets(weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """``[T]``, 0 where ignored. A target out of range (on a device) takes any: its row is NaN."""
    index = targets.clamp(0, weight.shape[0] - 1)
    return torch.where(targets == ignore_index, 0, weight.gather(0, index))


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
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


def _check_extras(z_loss: float, softcap: float | None, keep_logits_bytes: int | None, numerics: str) -> None:
    checks.number(_OP, "z_loss", z_loss)
    if not 0.0 <= z_loss < math.inf:
        checks.refuse(ValueError, _OP, "z_loss", "a finite number, 0 or more", repr(z_loss))
    if softcap is not None:
        checks.number(_OP, "softcap", softcap)
        if not 0.0 < softcap < math.inf:
            checks.refuse(ValueError, _OP, "softcap", "a finite number above 0 or None", repr(softcap))
    if keep_logits_bytes is not None:
        if isinstance(keep_logits_bytes, bool) or not isinstance(keep_logits_bytes, int):
            checks.refuse(TypeError, _OP, "keep_logits_bytes", "an int or None", checks.describe(keep_logits_bytes))
        if keep_logits_bytes < 0:
            expected = "a number of bytes, 0 or more"
            checks.refuse(ValueError, _OP, "keep_logits_bytes", expected, repr(keep_logits_bytes))
    checks.one_of(_OP, "numerics", numerics, NUMERICS)


def _check_weight(weight: Tensor, vocab_size: int, input: Tensor) -> None:
    checks.float_tensor(_OP, "weight", weight)
    if weight.shape != (vocab_size,):
        checks.refuse(ValueError, _OP, "weight", f"[{vocab_size}]", list(weight.shape))
    if weight.device != input.device:
        checks.refuse(ValueError, _OP, "weight", f"on {input.device}, as input", f"one on {weight.device}")
    if weight.requires_grad:
        checks.refuse(ValueError, _OP, "weight", "a tensor that requires no gradient", "one that does")
