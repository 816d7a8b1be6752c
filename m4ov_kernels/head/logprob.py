"""``linear_logprob``: log-probability, log-sum-exp, entropy and the likeliest words straight from hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator, invariance_requested
from m4ov_kernels.head import reference, vocab_parallel
from m4ov_kernels.head import state as states
from m4ov_kernels.head.targets import ARGUMENTS, check_target_values

_OP = "linear_logprob"
NUMERICS = ("hf", "fp32")


@dataclass(frozen=True)
class LogprobOutput:
    """Of each row, float32 (float64 for float64 input), shaped as ``targets``; 0 where a row is ignored.

    ``logprob``: of the target. ``logsumexp``: of the logits. ``entropy``: of the distribution, in nats, if asked for.
    ``top_logprobs``, ``top_indices``: ``[..., k]``, the likeliest words, the likeliest first (the smaller index first
    where they are equal), if asked for; not differentiable.
    """

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_indices: Tensor | None = None


def linear_logprob(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    top_k_logprobs: int = 0,
    num_valid: int | None = None,
    group_name: str | None = None,
    numerics: str = "fp32",
    invariant: bool = False,
) -> LogprobOutput:
    """Log-probabilities of ``softmax((hidden_states @ weightᵀ + bias) / temperature)``, logits never in memory.

    Args:
        hidden_states: ``[..., D]``, bfloat16, float16, float32 or float64.
        weight: ``[V, D]``, same dtype and device (other floating dtypes are served by the reference).
        targets: ``[...]`` int64, in ``[0, V)`` or ``ignore_index``.
        bias: ``[V]``; may hold ``-inf``, which rules a word out.
        temperature: above 0.
        ignore_index: target value of rows that cost nothing: they are dropped before any work (on the CPU always; on a
            GPU when ``num_valid`` says how many stay, because counting there would stop the host).
        entropy: compute each row's entropy too.
        top_k_logprobs: how many of the likeliest words to return.
        num_valid: how many targets differ from ``ignore_index``, if the caller knows. Rows beyond it are NaN.
        group_name: of the process group over which ``weight`` (and ``bias``) is sharded by rows, in order of rank;
            ``targets`` are of the whole vocabulary, and equal on every rank, as ``hidden_states`` are. Three numbers a
            row are gathered, never logits. The gradient of ``hidden_states`` is this rank's share: their sum over the
            group is the whole.
        numerics: ``"fp32"``: logits are float32 and never rounded. ``"hf"``: rounded to the dtype of
            ``hidden_states``, once, and again after the division by the temperature, as an unfused model rounds them.
        invariant: ask that the bits of a row, forward and in the gradient of ``hidden_states``, depend on nothing but
            the row and the weight: not on other rows, padding, chunks or threads. The compiled CPU kernels always keep
            this, at no price; an implementation that does not raises ``RuntimeError``.

    Returns:
        :class:`LogprobOutput`, differentiable in ``hidden_states``, ``weight`` and ``bias`` through ``logprob``,
        ``logsumexp`` and ``entropy``.

    Saves for backward: the inputs, and three float32 a row. The backward makes the logits again, by chunks of the
    vocabulary; the gradient of ``hidden_states`` is summed in float32, that of ``weight`` written once; it computes
    nothing for a frozen tensor.

    Invariance: as ``invariant`` says; the gradients of ``weight`` and ``bias`` are sums over the batch, the same bits
    on any number of threads.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes, devices or options do not fit, or (CPU) a target is out of range: names the first. On a GPU
            such a row is NaN and :func:`m4ov_kernels.check` raises the error.

    Source: chunked recompute as in "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.
    """
    _check(hidden_states, weight, targets, bias, temperature, ignore_index, num_valid)
    if not isinstance(entropy, bool):
        checks.refuse(TypeError, _OP, "entropy", "a bool", checks.describe(entropy))
    if not isinstance(invariant, bool):
        checks.refuse(TypeError, _OP, "invariant", "a bool", checks.describe(invariant))
    checks.one_of(_OP, "numerics", numerics, NUMERICS)
    shards = vocab_parallel.shards(_OP, weight, group_name)
    if isinstance(top_k_logprobs, bool) or not isinstance(top_k_logprobs, int):
        checks.refuse(TypeError, _OP, "top_k_logprobs", "an int", checks.describe(top_k_logprobs))
    if not 0 <= top_k_logprobs <= shards.vocab_size:
        expected = f"between 0 and the vocabulary's {shards.vocab_size}"
        checks.refuse(ValueError, _OP, "top_k_logprobs", expected, repr(top_k_logprobs))
    found = raw(
        hidden_states,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        ignore_index=ignore_index,
        entropy=entropy,
        top_k=min(top_k_logprobs, weight.shape[0]),
        num_valid=num_valid,
        rounded=numerics == "hf",
        invariant=invariant,
        shards=shards,
    )
    flat_targets = targets.reshape(-1)
    found = vocab_parallel.merge(_OP, found, flat_targets, flat_targets != ignore_index, shards, top_k_logprobs)
    shape = targets.shape
    return LogprobOutput(
        found.logprob.view(shape),
        found.logsumexp.view(shape),
        found.entropy.view(shape) if entropy else None,
        found.top_logprobs.view(*shape, top_k_logprobs) if top_k_logprobs else None,
        found.top_indices.view(*shape, top_k_logprobs) if top_k_logprobs else None,
    )


def raw(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    entropy: bool = False,
    total: bool = False,
    top_k: int = 0,
    num_valid: int | None = None,
    rounded: bool = False,
    invariant: bool = False,
    keep_logits_bytes: int = 0,
    shards: vocab_parallel.Shards | None = None,
    caller: str = _OP,
) -> vocab_parallel.Found:
    """What every loss of this family is made of, of checked arguments; rows are flat in what it returns.

    ``softcap``: logits become ``softcap · tanh(logits / softcap)`` (0: they do not). ``total``: also the sum of each
    row's logits, each times its ``class_weight`` ``[V]``. ``caller``: the operator that errors name.
    """
    invariant = invariant or invariance_requested()
    rows = targets.shape.numel()
    flat, flat_targets = hidden_states.reshape(rows, hidden_states.shape[-1]), targets.reshape(rows)
    dtype = flat.dtype
    same = weight.dtype is dtype and (bias is None or bias.dtype is dtype)
    implementation = LINEAR_LOGPROB.select(flat.device, dtype if same else None)
    first = 0 if shards is None else shards.first
    vocab_size = weight.shape[0] if shards is None else shards.vocab_size
    if implementation is None:
        if invariant:
            raise RuntimeError(f"{_OP}: invariant=True was asked for, but the reference's matrix products are not")
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            check_target_values(caller, ARGUMENTS[caller], flat_targets, vocab_size, ignore_index)
        options = (temperature, softcap, ignore_index, rounded, top_k, first, entropy, total)
        with torch.autocast(flat.device.type, enabled=False):  # in the dtypes that came
            return vocab_parallel.Found(
                *reference.linear_logprob(flat, weight, flat_targets, bias, class_weight, *options)
            )
    if invariant and implementation.backend not in ("native", "registered"):
        raise RuntimeError(f"{_OP}: invariant=True was asked for, but backend {implementation.backend!r} is not")
    found = LINEAR_LOGPROB(
        implementation,
        flat,
        weight,
        flat_targets,
        bias,
        class_weight,
        float(temperature),
        float(softcap),
        ignore_index,
        num_valid,
        rounded,
        entropy,
        total,
        top_k,
        first,
        vocab_size,
        keep_logits_bytes if torch.is_grad_enabled() else 0,
        caller,
    )
    return vocab_parallel.Found(*found[:7])


def _check(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    ignore_index: int,
    num_valid: int | None,
) -> None:
    checks.float_tensor(_OP, "hidden_states", hidden_states)
    checks.float_tensor(_OP, "weight", weight)
    checks.index_tensor(_OP, "targets", targets, (torch.int64,))
    if not hidden_states.shape or hidden_states.shape[-1] == 0:
        checks.refuse(ValueError, _OP, "hidden_states", "[..., D] with D at least 1", list(hidden_states.shape))
    if weight.ndim != 2 or weight.shape[1] != hidden_states.shape[-1] or weight.shape[0] == 0:
        expected = f"[V, {hidden_states.shape[-1]}] with V at least 1"
        checks.refuse(ValueError, _OP, "weight", expected, list(weight.shape))
    if targets.shape != hidden_states.shape[:-1]:
        expected = f"{list(hidden_states.shape[:-1])}, as hidden_states' rows"
        checks.refuse(ValueError, _OP, "targets", expected, list(targets.shape))
    if bias is not None:
        checks.float_tensor(_OP, "bias", bias)
        if bias.shape != weight.shape[:1]:
            checks.refuse(ValueError, _OP, "bias", f"[{weight.shape[0]}]", list(bias.shape))
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden_states.device:
            checks.refuse(
                ValueError, _OP, name, f"on {hidden_states.device}, as hidden_states", f"one on {tensor.device}"
            )
    checks.number(_OP, "temperature", temperature)
    if not 0.0 < temperature < float("inf"):
        checks.refuse(ValueError, _OP, "temperature", "a finite number above 0", repr(temperature))
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        checks.refuse(TypeError, _OP, "ignore_index", "an int", checks.describe(ignore_index))
    if not -(2**63) <= ignore_index < 2**63:
        checks.refuse(ValueError, _OP, "ignore_index", "an int of 64 bits", repr(ignore_index))
    if num_valid is not None and (isinstance(num_valid, bool) or not isinstance(num_valid, (int, torch.SymInt))):
        checks.refuse(TypeError, _OP, "num_valid", "an int or None", checks.describe(num_valid))
    if num_valid is not None and not 0 <= num_valid <= targets.numel():
        checks.refuse(ValueError, _OP, "num_valid", f"between 0 and the {targets.numel()} rows", repr(num_valid))


def _fwd_fake(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    num_valid: int | None,
    rounded: bool,
    want_entropy: bool,
    want_total: bool,
    top_k: int,
    first: int,
    vocab_size: int,
    keep_logits_bytes: int,
    caller: str = _OP,
) -> tuple[Tensor, ...]:
    (count,) = targets.shape

    def made(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden_states.new_empty(shape, dtype=dtype)

    entropy, total = made(count if want_entropy else 0), made(count if want_total else 0)
    top = made(count, top_k), made(count, top_k, dtype=torch.int64)
    kept = states.room_for_logits(hidden_states, weight, num_valid, rounded, softcap, keep_logits_bytes)
    return made(count), made(count), entropy, total, *top, made(2, count), kept


def _bwd_fake(hidden_states: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    need_hidden, need_weight, need_bias = rest[-3:]

    def gradient(like: Tensor | None, needed: bool) -> Tensor:
        if like is None or not needed:
            return hidden_states.new_empty(0)
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    return gradient(hidden_states, need_hidden), gradient(weight, need_weight), gradient(bias, need_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (temperature, softcap, ignore_index, num_valid, rounded, *_, first, vocab_size, _, _) = (
        inputs[:5],
        inputs[5:],
    )
    ctx.options = (temperature, softcap, ignore_index, num_valid, rounded, first, vocab_size)
    ctx.mark_non_differentiable(*output[4:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[6], output[2], output[7])


def _backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, _, need_bias, *_ = needs
    wanted = (None if grad is None or not grad.numel() else grad for grad in grads[:4])  # empty: of what nobody asked
    found = bwd(*ctx.saved_tensors, *wanted, *ctx.options, need_hidden, need_weight, need_bias)
    grad_hidden, grad_weight, grad_bias = (
        gradient if needed else None
        for gradient, needed in zip(found, (need_hidden, need_weight, need_bias), strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, *[None] * 13


LINEAR_LOGPROB = Operator(
    "head",
    _OP,
    fwd_schema="(Tensor hidden_states, Tensor weight, Tensor targets, Tensor? bias, Tensor? class_weight,"
    " float temperature, float softcap, int ignore_index, SymInt? num_valid, bool rounded, bool want_entropy,"
    " bool want_total, int top_k, int first, SymInt vocab_size, int keep_logits_bytes,"
    " str caller='linear_logprob') -> (Tensor logprob, Tensor logsumexp, Tensor entropy, Tensor total,"
    " Tensor top_logprobs, Tensor top_indices, Tensor normalizer, Tensor kept)",
    bwd_schema="(Tensor hidden_states, Tensor weight, Tensor targets, Tensor? bias, Tensor? class_weight,"
    " Tensor normalizer, Tensor entropy, Tensor kept, Tensor? grad_logprob, Tensor? grad_logsumexp,"
    " Tensor? grad_entropy, Tensor? grad_total, float temperature, float softcap, int ignore_index,"
    " SymInt? num_valid, bool rounded, int first, SymInt vocab_size, bool need_hidden, bool need_weight,"
    " bool need_bias) -> (Tensor grad_hidden_states, Tensor grad_weight, Tensor grad_bias)",
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    results=lambda *_: 7,
    serves=("linear_cross_entropy",),
    setup_context=_setup_context,
    backward=_backward,
)
