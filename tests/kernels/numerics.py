"""The numerics rule: against float64, in RMS and in max-norm, error(ours) ≤ 2 · error(plain PyTorch) + eps · |x₆₄|."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}

# As a term: an intermediate sum is past the end of its format, where the order of additions decides what comes out.
BEYOND = 1e300


def poisoned(*likes: Tensor) -> tuple[Tensor, ...]:
    """Outputs filled with NaN, so that an element which is never written shows."""
    return tuple(torch.full_like(like, float("nan"), memory_format=torch.contiguous_format) for like in likes)


def assert_accurate(name: str, ours: Tensor, plain: Tensor, exact: Tensor, terms: Tensor | None = None) -> None:
    """``plain``: PyTorch in the same dtype; ``exact``: float64. Where both are finite, and the value (and its terms)
    within the dtype's range, ours must be; where both are NaN or the same infinity, ours must be too. Where float64 has
    an infinity and PyTorch NaN (0 · inf, of a 0 that is a number rounded off), ours must be either. The eps of values
    below the dtype's normal range is that range's.

    ``terms``: where the result is a difference of larger terms that nearly cancel, those terms in float64, shaped as
    the result (a single row of width 1 has a gradient of 1 - 0.999…). The eps is then of them, and each may carry four
    float32 roundings of its own: PyTorch's error in one such element says nothing, it can be 0 by chance."""
    assert ours.shape == plain.shape == exact.shape, f"{name}: shapes {ours.shape}, {plain.shape}, {exact.shape}"
    assert ours.dtype == plain.dtype, f"{name}: {ours.dtype} instead of {plain.dtype}"
    if not ours.numel():
        return
    eps = EPS[plain.dtype]
    ours64, plain64, exact64 = (tensor.detach().double() for tensor in (ours, plain, exact))
    terms64 = torch.zeros_like(exact64) if terms is None else terms.double().abs().nan_to_num(0.0, 0.0, 0.0)
    magnitude64, info = torch.maximum(exact64.abs(), terms64), torch.finfo(plain.dtype)
    finite = plain64.isfinite() & exact64.isfinite() & (magnitude64 <= info.max * (1 - 4 * eps))
    lost = finite & ~ours64.isfinite()
    assert not lost.any(), f"{name}: {int(lost.sum())} non-finite values where PyTorch is finite, first {_where(lost)}"
    endless = (plain64 == exact64) & plain64.isinf() & (ours64 != plain64) & (terms64 < BEYOND)
    assert not endless.any(), f"{name}: {int(endless.sum())} infinities did not propagate, first {_where(endless)}"
    made = plain64.isnan() & exact64.isnan() & ~ours64.isnan()
    assert not made.any(), f"{name}: {int(made.sum())} NaNs did not propagate, first {_where(made)}"
    neither = plain64.isnan() & exact64.isinf() & ~ours64.isnan() & (ours64 != exact64) & (terms64 < BEYOND)
    assert not neither.any(), f"{name}: {int(neither.sum())} neither that infinity nor NaN, first {_where(neither)}"
    if not finite.any():
        return
    scale64 = magnitude64.clamp(min=info.smallest_normal)[finite] * eps
    scale64 += terms64[finite] * (4 * EPS[torch.float32])
    ours64, plain64, exact64 = ours64[finite], plain64[finite], exact64[finite]
    for norm, size in (("max", _max), ("RMS", _rms)):
        error, allowed = size(ours64 - exact64), 2 * size(plain64 - exact64) + size(scale64)
        assert error <= allowed, f"{name}: {norm} error {error:.3e} > {allowed:.3e} ({list(ours.shape)} {ours.dtype})"


def gradients(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return list(torch.autograd.grad(outputs, list(inputs), list(grads)))


def leaves(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Copies that require gradients, in another dtype, with the strides kept."""
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def logit_terms(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The terms of ``hidden @ weightᵀ + bias``, ``[T, V]`` in float64: its size, or the root of the sum of its squared
    products, which is the size of its partial sums where it nearly cancels."""
    hidden, weight = hidden.double(), weight.double()
    shift = weight.new_zeros(weight.shape[0]) if bias is None else bias.double()
    partial = (hidden.square() @ weight.square().t() + shift.square()).sqrt()
    return torch.maximum((hidden @ weight.t() + shift).abs(), partial).nan_to_num(0.0, 0.0, 0.0)


def rms_norm_terms(grad: Tensor, hidden_states: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The terms of the gradient of ``rms_norm``, whose difference nearly cancels in narrow rows, in float64; the second
    counts three times, for it holds the reciprocal root three times."""
    rstd = rstd.double().view(*hidden_states.shape[:-1], 1)
    normed, weighted = hidden_states.double() * rstd, grad.double() * weight.double()
    second = normed * (weighted * normed).mean(-1, keepdim=True)
    return (weighted.abs() + 3 * second.abs()) * rstd


def layer_norm_terms(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    apart: bool = False,
) -> dict[str, Tensor]:
    """What nearly cancels in ``layer_norm`` and its gradients, in float64. In float32 a value and the mean are each
    rounded before they are subtracted; 16-bit values are exact there. ``apart``: so much was rounded off the sum."""
    x, grad = x.double(), grad.double()
    scale = torch.ones(()).double() if weight is None else weight.double().abs()
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    normed = ((x - mean) * rstd).abs()
    reach = (x.abs() + mean.abs()) * rstd if dtype is torch.float32 or apart else normed
    weighted = grad.abs() * scale
    second = reach * (weighted * reach).mean(-1, keepdim=True)
    to_x = (weighted + weighted.mean(-1, keepdim=True) + 3 * second) * rstd
    flat = (-1, x.shape[-1])
    terms = {
        "grad_hidden_states": to_x,
        "grad_weight": (grad.abs() * reach).reshape(flat).sum(0),
        "grad_bias": grad.abs().reshape(flat).sum(0),
    }
    if dtype is torch.float32:
        # A product below the normal range is rounded to the last place there, and then multiplied by rstd.
        least = torch.finfo(torch.float32).smallest_normal * rstd
        terms["grad_hidden_states"] = torch.maximum(to_x, least.expand_as(to_x))
        terms["normed"] = (reach * scale + (0.0 if bias is None else bias.double().abs())) / 4
    return terms


def _max(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _rms(tensor: Tensor) -> float:
    scale = _max(tensor)  # float64 squares of float32's largest values are fine; of NaN-free data always
    return scale and float((tensor / scale).square().mean().sqrt()) * scale


def _where(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()
