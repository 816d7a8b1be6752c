"""``layer_norm``, ``gelu`` and ``geglu`` in Triton against float64; see ``test_triton.py``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m4ov_kernels.activation import reference as activation_reference
from m4ov_kernels.activation import triton as activation
from m4ov_kernels.norm import reference as norm_reference
from m4ov_kernels.norm import triton as norm
from m4ov_kernels.norm import triton_layer_norm as layer_norm

from . import strategies
from .numerics import assert_accurate, gradients, layer_norm_terms, leaves, poisoned
from .operators.activation import GEGLU, GELU, geglu_far_below_zero
from .operators.case import Call
from .triton_blocks import DEVICE, DTYPES, EPS, dtypes, on_device, shapes, small_blocks, tensor

__all__ = ["small_blocks"]  # a fixture of every test here


@given(
    shape=shapes,
    dtype=dtypes,
    layout=strategies.layouts,
    magnitude=strategies.magnitudes,
    numerics=strategies.numerics,
    residual=st.booleans(),
    mean=st.sampled_from((0.0, 100.0)),
    affine=st.booleans(),
    needs=st.tuples(st.booleans(), st.booleans()),
    programs=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_layer_norm(shape, dtype, layout, magnitude, numerics, residual, mean, affine, needs, programs):
    x, other, grad, grad_total = (tensor(shape, dtype, layout, magnitude) for _ in range(4))
    x = x + mean
    weight, bias = (tensor(shape[-1:], dtype) if affine else None for _ in range(2))
    rows = x.numel() // shape[-1]
    statistics = [torch.full((rows,), torch.nan, device=DEVICE) for _ in range(2)]
    out = (*poisoned(x, x if residual else x.new_empty(0)), *statistics)
    added = other if residual else None
    normed, total, center, rstd = norm.layer_norm_fwd(x, weight, bias, added, EPS, numerics, out=out)
    vector = x.new_empty(shape[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_norm, "programs_for", lambda blocks, width, whole: max(1, min(blocks, programs)))
        grads = norm.layer_norm_bwd(
            grad,
            grad_total if residual else None,
            total if residual else x,
            weight,
            center,
            rstd,
            *needs,
            out=(*poisoned(x), *(poisoned(vector if need else vector[:0])[0] for need in needs)),
        )

    def reference(dtype: torch.dtype) -> list[Tensor]:
        ones, zeros = torch.ones_like(vector), torch.zeros_like(vector)
        vectors = (weight, bias) if affine else (ones, zeros)
        inputs = leaves(dtype, x, *vectors, *([other] if residual else []))
        sums = inputs[3] if residual else None
        results = norm_reference.layer_norm(*inputs[:3], sums, EPS, numerics)[: 1 + residual]
        return [*results, *gradients(results, inputs[:3], [g.to(dtype) for g in (grad, grad_total)[: 1 + residual]])]

    names = ["normed", *(["sum"] if residual else []), "grad_hidden_states", "grad_weight", "grad_bias"]
    exact_sum = x.double() + other.double() if residual else x
    apart = residual and numerics == "fp32"
    terms = layer_norm_terms(grad, exact_sum, weight, bias, EPS, dtype, apart)
    if residual:
        terms["grad_hidden_states"] = terms["grad_hidden_states"] + grad_total.double().abs()
    got = [normed, *([total] if residual else []), *grads]
    for name, ours, plain, exact in zip(names, got, reference(dtype), reference(torch.float64), strict=True):
        if ours.shape == exact.shape:  # else it was not asked for
            assert_accurate(name, ours, plain, exact, terms.get(name))


@given(
    shape=shapes,
    dtype=dtypes,
    layout=strategies.layouts,
    magnitude=strategies.magnitudes,
    approximate=st.sampled_from(("tanh", "none")),
    bias=st.booleans(),
    programs=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_gelu(shape, dtype, layout, magnitude, approximate, bias, programs):
    x, grad = tensor(shape, dtype, layout, magnitude), tensor(shape, dtype, layout)
    added = tensor(shape[-1:], dtype) if bias else None
    result = activation.gelu_fwd(x, added, approximate, out=poisoned(x)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation, "_programs", lambda blocks, columns, need: max(1, min(blocks, programs)))
        out = (*poisoned(x), *(poisoned(added) if bias else [x.new_empty(0)]))
        grads = activation.gelu_bwd(grad, x, added, approximate, bias, out=out)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        inputs = leaves(dtype, x, *([added] if bias else []))
        made = activation_reference.gelu(inputs[0], inputs[1] if bias else None, approximate)
        return [made, *gradients(made, inputs, [grad.to(dtype)])]

    arguments = {"input": x, "bias": added, "approximate": approximate}
    terms = GELU.terms(Call(arguments, {"activated": grad}, ("input",)))
    names = ("activated", "grad_input", "grad_bias")
    for name, *tensors in zip(names, (result, *grads), reference(dtype), reference(torch.float64), strict=False):
        assert_accurate(name, *tensors, terms.get(name))


@given(
    shape=shapes,
    dtype=dtypes,
    layout=strategies.layouts,
    magnitude=strategies.magnitudes,
    numerics=strategies.numerics,
    approximate=st.sampled_from(("tanh", "none")),
)
@settings(max_examples=40, deadline=None)
def test_geglu(shape, dtype, layout, magnitude, numerics, approximate):
    gate, up, grad = tensor(shape, dtype, layout, magnitude), tensor(shape, dtype, layout), tensor(shape, dtype)
    arguments = {"gate": gate, "up": up, "approximate": approximate, "numerics": numerics}
    judge_geglu(Call(arguments, {"activated": grad}, ("gate", "up")))


@pytest.mark.parametrize("numerics", ["hf", "fp32"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_geglu_far_below_zero(approximate, numerics):
    for dtype in DTYPES:
        for up in (16.0, math.inf):
            judge_geglu(on_device(geglu_far_below_zero(dtype, up, approximate, numerics)))


def judge_geglu(call: Call) -> None:
    gate, up, approximate, numerics = (call.arguments[name] for name in ("gate", "up", "approximate", "numerics"))
    grad = call.grads["activated"]
    activated = activation.geglu_fwd(gate, up, approximate, numerics, out=poisoned(gate)[0])
    grad_gate, grad_up = activation.geglu_bwd(grad, gate, up, approximate, numerics, out=poisoned(gate, up))
    GEGLU.judge(call, {"activated": activated, "grad_gate": grad_gate, "grad_up": grad_up})
