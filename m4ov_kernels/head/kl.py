"""``linear_kl``: the divergence between two heads over the whole vocabulary, straight from their hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator, invariance_requested
from m4ov_kernels.head import reference
from m4ov_kernels.head.kl_state import KINDS, NORMALIZERS

_OP = "linear_kl"
_NUMERICS = ("hf", "fp32")


def linear_kl(
    hidden_states: Tensor,
    weight: Tensor,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kind: str = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    num_valid: int | None = None,
    numerics: str = "fp32",
) -> Tensor:
    """The Kullback-Leibler divergence of each row between a policy p and a reference q, exact, logits never in memory.

    With ``p = softmax((hidden_states @ weightᵀ + bias) / temperature)``, q the same of ``ref_``, m their mean, and sums
    over all V words:

    - ``"forward"``: ``KL(q ‖ p) = Σ q (log q − log p)``. What distillation minimises (Hinton et al., arXiv 1503.02531):
      cross entropy with the teacher's distribution, less a constant. In ``F.kl_div`` with p's logarithm as input and q
      as target.
    - ``"reverse"``: ``KL(p ‖ q) = Σ p (log p − log q)``. What policy optimisation is held to a reference by, and what
      :func:`kl_estimate` estimates from one word: ``policy_loss(exact_kl=…, kl_kind="exact")``.
    - ``"jsd"``: ``(KL(p ‖ m) + KL(q ‖ m)) / 2``, Jensen and Shannon's, at most ln 2; GKD's with β = ½, arXiv
      2306.13649.

    "Forward" and "reverse" are the distillation literature's names, where the reference is the teacher. The gradient of
    a softened divergence falls with temperature²; Hinton et al. multiply by that, this function leaves it to you.

    Args:
        hidden_states: ``[..., D]``, bfloat16, float16, float32 or float64; of the policy.
        weight: ``[V, D]``, same dtype and device (other floating dtypes are served by the reference implementation).
        ref_hidden_states: ``[..., Dr]``, as many rows; any width.
        ref_weight: ``[V, Dr]``; may be ``weight``, detached.
        bias, ref_bias: ``[V]``; may hold ``-inf``. A word that both rule out adds nothing; one that only the other side
            of a KL rules out makes it infinite (and its gradient NaN, but for that of "forward").
        kind: as above.
        temperature: above 0; of both.
        mask: bool ``[...]``, True in rows that count. Others may hold anything, cost nothing and are 0: they are
            dropped before any work (on the CPU always; on a GPU when ``num_valid`` says how many stay). ``None``: all
            count.
        num_valid: how many rows count, if the caller knows. Rows beyond it are NaN.
        numerics: ``"fp32"``: logits are float32 and never rounded. ``"hf"``: rounded to the dtype of the hidden states,
            once, and again after the division by the temperature, as an unfused model rounds them.

    Returns:
        Nats, float32 (float64 for float64 input), shaped as the rows; differentiable in ``hidden_states``, ``weight``
        and ``bias``. Never below 0 from compiled kernels; the rounding of logits of size x is worth about 1e-7 · x.

    Saves for backward: the inputs, and five float32 a row. The backward makes both heads' logits again, by chunks of
    the vocabulary; the gradient of ``hidden_states`` is summed in float32, that of ``weight`` written once; it computes
    nothing for a frozen tensor. Costs two products forward (four for "jsd", whose sum takes both normalisers) and four
    backward. Deterministic.

    Invariance: from the compiled CPU kernels a row's bits, forward and in the gradient of ``hidden_states``, do not
    depend on other rows, chunks or threads; the gradients of ``weight`` and ``bias`` are sums over the batch, the same
    bits on any number of threads. Inside :func:`m4ov_kernels.invariant` another implementation raises ``RuntimeError``.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes, devices or options do not fit, or a tensor of the reference requires a gradient, which it
            would not get: detach it.
    """
    _check(hidden_states, weight, ref_hidden_states, ref_weight, bias, ref_bias, temperature, mask, num_valid)
    checks.one_of(_OP, "kind", kind, KINDS)
    checks.one_of(_OP, "numerics", numerics, _NUMERICS)
    shape = hidden_states.shape[:-1]
    rows = shape.numel()
    flat = hidden_states.reshape(rows, hidden_states.shape[-1])
    ref_flat = ref_hidden_states.reshape(rows, ref_hidden_states.shape[-1])
    flat_mask = None if mask is None else mask.reshape(rows)
    dtype = flat.dtype
    others = (weight, ref_flat, ref_weight, bias, ref_bias)
    same = all(tensor is None or tensor.dtype is dtype for tensor in others)
    implementation = LINEAR_KL.select(flat.device, dtype if same else None)
    if invariance_requested() and (implementation is None or implementation.backend not in ("native", "registered")):
        backend = "reference" if implementation is None else implementation.backend
        raise RuntimeError(f"{_OP}: invariance was asked for, but backend {backend!r} is not invariant")
    if implementation is None:
        options = (flat_mask, kind, temperature, numerics == "hf")
        with torch.autocast(flat.device.type, enabled=False):  # in the dtypes that came
            return reference.linear_kl(flat, weight, ref_flat, ref_weight, bias, ref_bias, *options).view(shape)
    found = LINEAR_KL(
        implementation,
        flat,
        weight,
        ref_flat,
        ref_weight,
        bias,
        ref_bias,
        flat_mask,
        kind,
        float(temperature),
        num_valid,
        numerics == "hf",
    )
    return found[0].view(shape)


def _check(
    hidden_states: Tensor,
    weight: Tensor,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    num_valid: int | None,
) -> None:
    checks.float_tensor(_OP, "hidden_states", hidden_states)
    if not hidden_states.shape or hidden_states.shape[-1] == 0:
        checks.refuse(ValueError, _OP, "hidden_states", "[..., D] with D at least 1", list(hidden_states.shape))
    shape = list(hidden_states.shape[:-1])
    _check_head("", hidden_states, weight, bias, None)
    checks.float_tensor(_OP, "ref_hidden_states", ref_hidden_states)
    if list(ref_hidden_states.shape[:-1]) != shape or not ref_hidden_states.shape or not ref_hidden_states.shape[-1]:
        expected = f"{[*shape, 'Dr']}".replace("'", "") + ", as hidden_states' rows, with Dr at least 1"
        checks.refuse(ValueError, _OP, "ref_hidden_states", expected, list(ref_hidden_states.shape))
    _check_head("ref_", ref_hidden_states, ref_weight, ref_bias, weight.shape[0])
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            checks.refuse(TypeError, _OP, "mask", "a bool tensor, True in rows that count", checks.describe(mask))
        if mask.layout is not torch.strided:
            checks.refuse(TypeError, _OP, "mask", "a dense (strided) tensor", f"layout {mask.layout}")
        if list(mask.shape) != shape:
            checks.refuse(ValueError, _OP, "mask", f"{shape}, as hidden_states' rows", list(mask.shape))
    constants = {"ref_hidden_states": ref_hidden_states, "ref_weight": ref_weight, "ref_bias": ref_bias}
    for name, tensor in {"weight": weight, "bias": bias, **constants, "mask": mask}.items():
        if tensor is not None and tensor.device != hidden_states.device:
            expected = f"on {hidden_states.device}, as hidden_states"
            checks.refuse(ValueError, _OP, name, expected, f"one on {tensor.device}")
    if torch.is_grad_enabled():
        for name, tensor in constants.items():
            if tensor is not None and tensor.requires_grad:
                expected = f"a constant: {name}.detach()"
                checks.refuse(ValueError, _OP, name, expected, "one that requires a gradient")
    checks.number(_OP, "temperature", temperature)
    if not 0.0 < temperature < float("inf"):
        checks.refuse(ValueError, _OP, "temperature", "a finite number above 0", repr(temperature))
    if num_valid is not None and (isinstance(num_valid, bool) or not isinstance(num_valid, (int, torch.SymInt))):
        checks.refuse(TypeError, _OP, "num_valid", "an int or None", checks.describe(num_valid))
    rows = hidden_states.shape[:-1].numel()
    if num_valid is not None and not 0 <= num_valid <= rows:
        checks.refuse(ValueError, _OP, "num_valid", f"between 0 and the {rows} rows", repr(num_valid))


def _check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int | None) -> None:
    checks.float_tensor(_OP, f"{prefix}weight", weight)
    fits = weight.ndim == 2 and weight.shape[1] == hidden.shape[-1] and weight.shape[0] > 0
    if not fits or (vocab is not None and weight.shape[0] != vocab):
        expected = f"[{vocab or 'V'}, {hidden.shape[-1]}]" + ("" if vocab else " with V at least 1")
        checks.refuse(ValueError, _OP, f"{prefix}weight", expected, list(weight.shape))
    if bias is not None:
        checks.float_tensor(_OP, f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            checks.refuse(ValueError, _OP, f"{prefix}bias", f"[{weight.shape[0]}]", list(bias.shape))


def _fwd_fake(hidden_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    count = hidden_states.shape[0]
    made = (hidden_states.new_empty(shape, dtype=torch.float32) for shape in ((count,), (NORMALIZERS, count)))
    divergence, normalizer = made
    return divergence, normalizer


def _bwd_fake(
    grad: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[-3:]

    def gradient(like: Tensor | None, needed: bool) -> Tensor:
        if like is None or not needed:
            return hidden_states.new_empty(0)
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    return gradient(hidden_states, need_hidden), gradient(weight, need_weight), gradient(bias, need_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:7], output[1])


def _backward(ctx: Any, needs: Any, bwd: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = (needs[0], needs[1], needs[4])
    found = bwd(grad, *ctx.saved_tensors, *ctx.options, *wanted)
    grad_hidden, grad_weight, grad_bias = (g if n else None for g, n in zip(found, wanted, strict=True))
    return grad_hidden, grad_weight, None, None, grad_bias, *[None] * 6


LINEAR_KL = Operator(
    "head",
    _OP,
    fwd_schema="(Tensor hidden_states, Tensor weight, Tensor ref_hidden_states, Tensor ref_weight, Tensor? bias,"
    " Tensor? ref_bias, Tensor? mask, str kind, float temperature, SymInt? num_valid, bool rounded)"
    " -> (Tensor divergence, Tensor normalizer)",
    bwd_schema="(Tensor grad, Tensor hidden_states, Tensor weight, Tensor ref_hidden_states, Tensor ref_weight,"
    " Tensor? bias, Tensor? ref_bias, Tensor? mask, Tensor normalizer, str kind, float temperature,"
    " SymInt? num_valid, bool rounded, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor grad_hidden_states, Tensor grad_weight, Tensor grad_bias)",
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    results=lambda *_: 1,
    setup_context=_setup_context,
    backward=_backward,
)
