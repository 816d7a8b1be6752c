"""The RMSNorm of every head of queries and keys, and their rotation by multimodal positions, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator
from m4ov_kernels.rope import reference

MAX_DIM = 1024
_OP = "qk_norm_mrope"


def qk_norm_mrope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    position_ids: Tensor,
    *,
    mrope_section: Sequence[int] | None,
    theta: float,
    eps: float,
    interleaved: bool,
    rotary_dim: int | None = None,
    numerics: str = "hf",
) -> tuple[Tensor, Tensor]:
    """RMSNorm over each head, then M-RoPE from integer positions; no tensor of sines and cosines is made.

    ``y = x / sqrt(mean(x²) + eps) · weight`` for each head; then, for i below ``half = rotary_dim / 2`` and
    ``angle = position · theta^(-i / half)``, the pair ``(y[i], y[i + half])`` is turned by ``angle``.

    Args:
        q: ``[..., H, D]``, bfloat16, float16, float32 or float64; any strides; D at most 1024.
        k: ``[..., KV, D]``: the same tokens, dtype and device as ``q``.
        q_weight, k_weight: ``[D]``, or ``None`` for no norm (Qwen2.5-VL). Of the dtype of ``q`` for the fast kernels;
            another floating dtype is served by the reference and promotes as PyTorch promotes.
        position_ids: int64 or int32 ``[3, ...]``, the temporal, vertical and horizontal position of each token, or
            ``[...]`` where they are all the same (text-only models); any strides. Between -2^31 and 2^31; sines and
            cosines are within one unit in the last place of float32 up to 2^24 at least.
        mrope_section: how many of the ``half`` frequencies belong to each of the three positions; ``None`` for
            ``position_ids`` of one axis.
        theta: the base of the frequencies, > 0.
        eps: added to the mean square; 0 or greater.
        interleaved: whether the sections alternate, t h w t h w … (Qwen3-VL), or follow one another (Qwen2.5-VL).
        rotary_dim: how many leading elements of a head are rotated, even; default: all.
        numerics: where results are rounded to the dtype of ``q``. ``"hf"`` (Hugging Face): the normalised value before
            the multiply by the weight, that product, sine and cosine (of a float32 angle), and both products of the
            rotation. ``"vllm"``: the same, but the norm is rounded once, after its weight. ``"fp32"``: only the result;
            angles are products in float64.

    Returns:
        ``(q, k)`` rotated: contiguous, shaped and typed as given.

    Saves for backward: what has a weight of ``q`` and ``k``, the weights and ``position_ids``. Gradients are computed
    in float32 and rounded once. Those of the weights are summed in float32 over a fixed split of the tokens: their bits
    depend on nothing else.

    Invariance: the bits of a head, forward and backward, depend on its own elements, its position and the weight alone:
    on the CPU always (other tokens, strides, threads); on a GPU one configuration serves a width and dtype. Gradients
    of the weights are sums over the batch, the same bits on any number of threads.

    Raises:
        TypeError: a tensor argument is not dense or of a wrong dtype, or an option is of a wrong type.
        ValueError: a shape, device or option does not fit, such as sections that do not sum to ``rotary_dim / 2``.

    Source: Su et al., "RoFormer", arXiv 2104.09864; Wang et al., "Qwen2-VL", arXiv 2409.12191 (sections); Qwen3-VL
    (interleaved, query and key norms).
    """
    sections, rotary_dim = _check(
        q, k, q_weight, k_weight, position_ids, mrope_section, theta, eps, interleaved, rotary_dim, numerics
    )
    theta, eps = float(theta), float(eps)
    dtype: torch.dtype | None = q.dtype
    if any(weight is not None and weight.dtype is not dtype for weight in (q_weight, k_weight)):
        dtype = None
    implementation = QK_NORM_MROPE.select(q.device, dtype)
    options = (sections, theta, eps, interleaved, rotary_dim, numerics)
    if implementation is None:
        return reference.qk_norm_mrope(q, k, q_weight, k_weight, position_ids, *options)
    made: tuple[Tensor, Tensor] = QK_NORM_MROPE(implementation, q, k, q_weight, k_weight, position_ids, *options)
    return made


def _check(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    position_ids: Tensor,
    mrope_section: Sequence[int] | None,
    theta: float,
    eps: float,
    interleaved: bool,
    rotary_dim: int | None,
    numerics: str,
) -> tuple[list[int], int]:
    """The sections, none where the positions have one axis, and the rotary width."""
    heads(_OP, q, k)
    width = q.shape[-1]
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        checks.float_tensor(_OP, name, weight)
        if weight.shape != (width,):
            checks.refuse(ValueError, _OP, name, f"[{width}], the width of a head", checks.describe(weight))
        if weight.device != q.device:
            checks.refuse(ValueError, _OP, name, f"on {q.device}, as q", f"one on {weight.device}")
    if rotary_dim is None:
        rotary_dim = width
    elif isinstance(rotary_dim, bool) or not isinstance(rotary_dim, (int, torch.SymInt)):
        checks.refuse(TypeError, _OP, "rotary_dim", "an int or None", checks.describe(rotary_dim))
    if not 2 <= rotary_dim <= width or rotary_dim % 2:
        checks.refuse(
            ValueError, _OP, "rotary_dim", f"an even number from 2 to {width}, the width of a head", rotary_dim
        )
    sections = _sections(mrope_section, rotary_dim // 2)
    integers(_OP, "position_ids", position_ids, q.device)
    tokens = q.shape[:-2]
    if position_ids.shape == tokens:
        sections = []
    elif not sections or position_ids.shape != (3, *tokens):
        expected = f"{list(tokens)}, as the tokens of q" + (f", or {[3, *tokens]}" if sections else "")
        if not sections:
            expected += " (mrope_section is None)"
        checks.refuse(ValueError, _OP, "position_ids", expected, checks.describe(position_ids))
    positive(_OP, "theta", theta)
    if type(eps) is not float:
        checks.number(_OP, "eps", eps)
    if not eps >= 0:
        checks.refuse(ValueError, _OP, "eps", "a number, 0 or greater", repr(eps))
    if not isinstance(interleaved, bool):
        checks.refuse(TypeError, _OP, "interleaved", "a bool", checks.describe(interleaved))
    if numerics not in checks.NUMERICS:
        checks.one_of(_OP, "numerics", numerics, checks.NUMERICS)
    return sections, rotary_dim


def _sections(mrope_section: Sequence[int] | None, half: int) -> list[int]:
    if mrope_section is None:
        return []
    if not isinstance(mrope_section, (list, tuple)) or not all(type(count) is int for count in mrope_section):
        checks.refuse(TypeError, _OP, "mrope_section", "three ints or None", checks.describe(mrope_section))
    if len(mrope_section) != 3 or min(mrope_section) < 0 or sum(mrope_section) != half:
        expected = f"three counts that sum to {half}, half of the rotary width"
        checks.refuse(ValueError, _OP, "mrope_section", expected, repr(mrope_section))
    return list(mrope_section)


def heads(operator: str, q: Tensor, k: Tensor) -> None:
    """Refuse anything but the heads of the same tokens."""
    checks.float_tensor(operator, "q", q)
    if q.ndim < 2 or q.shape[-2] == 0 or not 0 < q.shape[-1] <= MAX_DIM:
        expected = f"[..., H, D] with H at least 1 and D from 1 to {MAX_DIM}"
        checks.refuse(ValueError, operator, "q", expected, checks.describe(q))
    checks.float_tensor(operator, "k", k)
    if k.dtype is not q.dtype:
        checks.refuse(TypeError, operator, "k", f"{q.dtype}, as q", k.dtype)
    if k.ndim != q.ndim or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1] or k.shape[-2] == 0:
        expected = f"{[*q.shape[:-2], 'KV', q.shape[-1]]} with KV at least 1, for the tokens and width of q"
        checks.refuse(ValueError, operator, "k", expected, checks.describe(k))
    if k.device != q.device:
        checks.refuse(ValueError, operator, "k", f"on {q.device}, as q", f"one on {k.device}")


def integers(operator: str, argument: str, value: Tensor, device: torch.device) -> None:
    """Refuse anything but a dense int32 or int64 tensor on this device."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        checks.refuse(TypeError, operator, argument, "an int32 or int64 tensor", checks.describe(value))
    if value.layout is not torch.strided:
        checks.refuse(TypeError, operator, argument, "a dense (strided) tensor", f"layout {value.layout}")
    if value.device != device:
        checks.refuse(ValueError, operator, argument, f"on {device}, as q", f"one on {value.device}")


def positive(operator: str, argument: str, value: float) -> None:
    if type(value) is not float:
        checks.number(operator, argument, value)
    if not 0 < value < math.inf:
        checks.refuse(ValueError, operator, argument, "a finite number greater than 0", repr(value))


def _fwd_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))  # type: ignore[return-value]


def _bwd_fake(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    position_ids: Tensor,
    mrope_section: list[int],
    theta: float,
    eps: float,
    interleaved: bool,
    rotary_dim: int,
    numerics: str,
    need_q_weight: bool,
    need_k_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (grad_q, grad_k))
    width = grad_q.shape[-1]
    weights = (grad_q.new_empty(width if needed else 0) for needed in (need_q_weight, need_k_weight))
    return (*grads, *weights)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, q_weight, k_weight, position_ids, *ctx.options = inputs
    ctx.shapes = q.shape, k.shape
    kept = (None if weight is None else x for x, weight in ((q, q_weight), (k, k_weight)))
    ctx.save_for_backward(*kept, q_weight, k_weight, position_ids)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    given = both(grads, ctx.shapes)
    wanted = [needs[i] and grads[i % 2] is not None for i in range(4)]
    made = bwd(*given, *ctx.saved_tensors, *ctx.options, *wanted[2:])
    return (*(grad if want else None for grad, want in zip(made, wanted, strict=True)), *(None,) * 7)


def both(grads: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The gradients of both results, zeros for one that nothing uses."""
    some = next(grad for grad in grads if grad is not None)
    return [some.new_zeros(()).expand(shape) if g is None else g for g, shape in zip(grads, shapes, strict=True)]


QK_NORM_MROPE = Operator(
    "rope",
    _OP,
    fwd_schema="(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor position_ids, int[] mrope_section,"
    " float theta, float eps, bool interleaved, SymInt rotary_dim, str numerics) -> (Tensor q_turned, Tensor k_turned)",
    bwd_schema="(Tensor grad_q_turned, Tensor grad_k_turned, Tensor? q, Tensor? k, Tensor? q_weight, Tensor? k_weight,"
    " Tensor position_ids, int[] mrope_section, float theta, float eps, bool interleaved, SymInt rotary_dim,"
    " str numerics, bool need_q_weight, bool need_k_weight)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_q_weight, Tensor grad_k_weight)",
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    results=lambda *_: 2,
    setup_context=_setup_context,
    backward=_backward,
)
