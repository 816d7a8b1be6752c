"""The Triton kernels against float64: on the GPU where there is one, else interpreted on the CPU.

Interpreted, bfloat16 proves nothing (its stores truncate), so it is tested on a GPU only.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m4ov_kernels
from m4ov_kernels.activation import reference as activation_reference
from m4ov_kernels.activation import triton as activation
from m4ov_kernels.head import triton as head
from m4ov_kernels.norm import reference as norm_reference
from m4ov_kernels.norm import triton as norm
from m4ov_kernels.rope import triton as rope
from m4ov_kernels.rope.frequencies import tables
from m4ov_kernels.rope.triton import qk_norm_mrope as rope_kernels
from m4ov_kernels.vision import reference as vision_reference
from m4ov_kernels.vision import triton as vision

from . import strategies
from .numerics import assert_accurate, gradients, leaves, poisoned, rms_norm_terms
from .operators.head import LINEAR_CROSS_ENTROPY
from .operators.rotation import QK_NORM_MROPE, VISION_ROPE
from .triton_blocks import DEVICE, DTYPES, EPS, dtypes, shapes, small_blocks, tensor

__all__ = ["small_blocks"]  # a fixture of every test here


@given(
    shape=shapes,
    dtype=dtypes,
    layout=strategies.layouts,
    magnitude=strategies.magnitudes,
    numerics=strategies.numerics,
    residual=st.booleans(),
    need_weight=st.booleans(),
    programs=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_rms_norm(shape, dtype, layout, magnitude, numerics, residual, need_weight, programs):
    x, other, grad, grad_total = (tensor(shape, dtype, layout, magnitude) for _ in range(4))
    weight = tensor(shape[-1:], dtype)
    rows = x.numel() // shape[-1]
    out = (*poisoned(x, x if residual else x.new_empty(0)), torch.full((rows,), torch.nan, device=DEVICE))
    normed, total, rstd = norm.rms_norm_fwd(x, weight, other if residual else None, EPS, numerics, out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "programs_for", lambda blocks, width, whole: max(1, min(blocks, programs)))
        grads = norm.rms_norm_bwd(
            grad,
            grad_total if residual else None,
            total if residual else x,
            weight,
            rstd,
            numerics,
            need_weight,
            out=(*poisoned(x), *(poisoned(weight) if need_weight else [x.new_empty(0)])),
        )

    def reference(dtype: torch.dtype) -> list[Tensor]:
        inputs = leaves(dtype, x, weight, *([other] if residual else []))
        results = norm_reference.rms_norm(*inputs[:2], EPS, inputs[2] if residual else None, numerics)[: 1 + residual]
        return [*results, *gradients(results, inputs[:2], [g.to(dtype) for g in (grad, grad_total)[: 1 + residual]])]

    got = [normed, *([total] if residual else []), grads[0], *([grads[1]] if need_weight else [])]
    terms = rms_norm_terms(grad, total if residual else x, weight, rstd)
    for i, (ours, plain, exact) in enumerate(zip(got, reference(dtype), reference(torch.float64), strict=False)):
        name = ("normed", "sum", "grad_hidden_states", "grad_weight")[i if residual or i == 0 else i + 1]
        assert_accurate(name, ours, plain, exact, terms if name == "grad_hidden_states" else None)


@given(
    shape=shapes, dtype=dtypes, layout=strategies.layouts, magnitude=strategies.magnitudes, numerics=strategies.numerics
)
@settings(max_examples=40, deadline=None)
def test_swiglu(shape, dtype, layout, magnitude, numerics):
    gate, up, grad = tensor(shape, dtype, layout, magnitude), tensor(shape, dtype, layout), tensor(shape, dtype)
    got = (
        activation.swiglu_fwd(gate, up, numerics, out=poisoned(gate)[0]),
        *activation.swiglu_bwd(grad, gate, up, numerics, out=poisoned(gate, up)),
    )

    def reference(dtype: torch.dtype) -> list[Tensor]:
        inputs = leaves(dtype, gate, up)
        result = activation_reference.swiglu(*inputs, numerics)
        return [result, *gradients(result, inputs, [grad.to(dtype)])]

    for name, *tensors in zip(
        ("y", "grad_gate", "grad_up"), got, reference(dtype), reference(torch.float64), strict=True
    ):
        assert_accurate(name, *tensors)


@pytest.mark.parametrize("case", [LINEAR_CROSS_ENTROPY, QK_NORM_MROPE, VISION_ROPE], ids=str)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_shared_cases(case, data):
    """As the shared cases draw and judge them, on the CPU or the GPU."""
    call = data.draw(strategies.drawn(case.call))
    if case is LINEAR_CROSS_ENTROPY and len(call.arguments["linear_weight"]) * call.arguments["target"].numel() > 3000:
        return  # interpreted, a tile takes a millisecond
    arguments = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in call.arguments.items()
    }
    call = call._replace(arguments=arguments, grads={name: grad.to(DEVICE) for name, grad in call.grads.items()})
    if case.kernel_dtype(call.arguments) not in DTYPES:
        return
    with pytest.MonkeyPatch.context() as patch, m4ov_kernels.backend("triton"):
        patch.setattr(rope_kernels, "_MAX_PROGRAMS", 3)
        got = case.evaluate(call)
    m4ov_kernels.check()
    case.judge(call, got)


@pytest.mark.parametrize("numerics", ["hf", "fp32"])
def test_sines_and_cosines_are_within_one_ulp_to_2_24(numerics):
    """Of the float32 product, or of the true one."""
    count, width = 300, 128
    positions = torch.cat((torch.arange(40), torch.randint(0, 2**24, (count - 40,))))
    positions = torch.cat((positions, -positions))
    x = torch.cat((torch.ones(2 * count, 1, width // 2), torch.zeros(2 * count, 1, width // 2)), -1).to(DEVICE)
    options = ([], 5e6, 0.0, True, width, numerics)
    got = rope.qk_norm_mrope_fwd(x, x, None, None, positions.to(DEVICE), *options)[0][:, 0].double().cpu()
    made = tables(5e6, width, (), True, torch.device("cpu"))
    if numerics == "hf":
        angles = (positions[:, None].float() * made.single).double()
    else:
        angles = (positions[:, None] * made.exact).double() * (2 * math.pi / 2**64)
    expected = torch.cat((angles.cos(), angles.sin()), -1)
    ulp = torch.from_numpy(np.spacing(np.abs(expected.float().numpy()))).double()
    # float64's own error in an angle of up to half a turn is 2^-53 of it.
    assert ((got - expected).abs() - 2**-50).div(ulp).max() <= 1


@pytest.mark.parametrize("sizes", [[[1, 4, 4], [3, 2, 3]], [[1, 4, 4], [0, 2, 2]], [[1, 4, 4]], [[1, 4, 4], [2, 4, 4]]])
def test_a_wrong_grid_is_nan_and_found_by_check(sizes):
    x = tensor((24, 2, 8), torch.float32)
    with m4ov_kernels.backend("triton"):
        turned = m4ov_kernels.vision_rope(x, x, torch.tensor(sizes, device=DEVICE), merge_size=2)[0]
    patches = sum(math.prod(size) for size in sizes)
    whole = all(frames > 0 and rows % 2 == columns % 2 == 0 for frames, rows, columns in sizes)
    assert turned.isnan().flatten(1).all(1).tolist() == [not whole or i >= patches for i in range(24)]
    with pytest.raises(ValueError, match=rf"vision_rope: grid_thw\[{len(sizes) - 1}\] is not positive, is no multiple"):
        m4ov_kernels.check()
    m4ov_kernels.check()  # told once


@given(
    rows=st.tuples(st.integers(1, 3), st.integers(0, 6)),
    width=st.sampled_from((1, 16, 33, 70)),
    share=st.sampled_from((0.0, 0.4, 1.0)),
    dtype=dtypes,
    layout=strategies.layouts,
    add=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_features_into_rows(rows, width, share, dtype, layout, add):
    """``scatter_vision`` and ``deepstack_add``, whose backward the first one's holds."""
    base, grad = tensor((*rows, width), dtype, layout), tensor((*rows, width), dtype, layout)
    count = rows[0] * rows[1]
    positions = torch.randperm(count, device=DEVICE)[: round(share * count)]
    features = tensor((len(positions), width), dtype, layout)
    raw = vision.deepstack_add_fwd if add else vision.scatter_vision_fwd
    got = [raw(base, features, positions, out=poisoned(base)[0])]
    if add:
        got += [grad, vision.deepstack_add_bwd(grad, positions, out=poisoned(features)[0])]
    else:
        got += vision.scatter_vision_bwd(grad, positions, True, True, out=poisoned(base, features))
        assert torch.equal(vision.scatter_vision_bwd(grad, positions, True, False)[0], got[1])
        assert torch.equal(vision.scatter_vision_bwd(grad, positions, False, True)[1], got[2])
    m4ov_kernels.check()
    definition = vision_reference.deepstack_add if add else vision_reference.scatter_vision
    inputs = leaves(dtype, base, features)
    result = definition(*inputs, positions)
    for ours, plain in zip(got, [result, *gradients(result, inputs, [grad])], strict=True):
        assert torch.equal(ours, plain)


def test_positions_without_a_row_of_their_own_are_nan_and_found_by_check():
    base, features = tensor((2, 4, 40), torch.float32), tensor((6, 40), torch.float32)
    positions = torch.tensor([0, 3, 3, -1, 8, 6], device=DEVICE)
    for operator in (m4ov_kernels.scatter_vision, m4ov_kernels.deepstack_add):
        inputs = leaves(torch.float32, base, features)
        with m4ov_kernels.backend("triton"):
            out = operator(*inputs, positions)
        assert out.isnan().any(-1).flatten().nonzero().flatten().tolist() == [3]
        assert torch.equal(out[0, 0], features[0] + (operator is m4ov_kernels.deepstack_add) * base[0, 0])
        with pytest.raises(
            ValueError, match=rf"{operator.__name__}: positions\[2\] is not in \[0, rows\), or is there tw"
        ):
            m4ov_kernels.check()
        grads = gradients(out, inputs, [base])
        assert grads[1].isnan().any(-1).tolist() == [False, False, False, True, True, False]
        with (
            pytest.raises(ValueError, match=r"positions\[2\]")
            if operator is m4ov_kernels.scatter_vision
            else nullcontext()
        ):
            m4ov_kernels.check()


@given(
    grids=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)), max_size=4),
    side=st.sampled_from((1, 2, 3, 5)),
    width=st.sampled_from((1, 16, 33, 70)),
    merge=st.sampled_from((1, 2, 3)),
    dtype=dtypes,
    layout=strategies.layouts,
    numerics=strategies.numerics,
    alone=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_interpolate_position_embeddings(grids, side, width, merge, dtype, layout, numerics, alone):
    grid_thw = torch.tensor([(t, h * merge, w * merge) for t, h, w in grids], dtype=torch.int64).reshape(-1, 3)
    grid_thw = grid_thw.to(DEVICE)
    patches = int(grid_thw.prod(1).sum())
    table, hidden, grad = (
        tensor((side**2, width), dtype),
        tensor((patches, width), dtype, layout),
        tensor((patches, width), dtype),
    )
    out, given_hidden = poisoned(hidden)[0], None if alone else hidden
    got = [
        vision.interpolate_position_embeddings_fwd(table, grid_thw, given_hidden, patches, merge, numerics, out=out),
        vision.interpolate_position_embeddings_bwd(grad, grid_thw, side**2, merge, out=poisoned(table)[0]),
    ]
    m4ov_kernels.check()

    def reference(dtype: torch.dtype, grad: Tensor = grad) -> list[Tensor]:
        (leaf,) = leaves(dtype, table)
        result = vision_reference.interpolate_position_embeddings(
            leaf, grid_thw, None if alone else hidden.to(dtype), patches, merge, numerics
        )
        return [result, *gradients(result, [leaf], [grad.to(dtype)])]

    terms = {"grad_table": reference(torch.float64, grad.abs())[1]}
    for name, *tensors in zip(("embedded", "grad_table"), got, reference(dtype), reference(torch.float64), strict=True):
        assert_accurate(name, *tensors, terms.get(name))
    if DEVICE == "cpu":
        assert torch.equal(got[0], reference(dtype)[0])


@pytest.mark.parametrize(
    ("grids", "first", "lost"),
    [
        ([[1, 4, 6], [1, 3, 2], [1, 2, 2]], 1, range(24, 30)),
        ([[1, 4, 6], [1, -2, -3], [1, 2, 2]], 1, range(24, 30)),
        ([[1, 4, 6]], 0, range(24, 34)),
        ([[1, 4, 6], [1, 4, 8]], 1, ()),
        ([], 0, range(34)),
    ],
)
def test_grids_that_do_not_fit_are_nan_and_found_by_check(grids, first, lost):
    table, hidden = tensor((9, 40), torch.float32).requires_grad_(), tensor((34, 40), torch.float32)
    grid_thw = torch.tensor(grids, dtype=torch.int64, device=DEVICE).reshape(-1, 3)
    with m4ov_kernels.backend("triton"):
        out = m4ov_kernels.interpolate_position_embeddings(table, grid_thw, merge_size=2, hidden_states=hidden)
    assert out.isnan().any(-1).nonzero().flatten().tolist() == list(lost)
    with pytest.raises(
        ValueError, match=rf"interpolate_position_embeddings: grid_thw\[{first}\] is not positive, or not a"
    ):
        m4ov_kernels.check()
    if len(lost) < 34 and [grid for grid in grids if min(grid) < 1 or grid[1] % 2 or grid[2] % 2]:
        assert torch.autograd.grad(out.sum(), table)[0].isnan().all()


@pytest.mark.parametrize("num_valid", [None, 5])
def test_a_target_out_of_range_is_nan_and_found_by_check(num_valid):
    hidden, weight = tensor((6, 8), torch.float32), tensor((40, 8), torch.float32)
    target = torch.tensor([3, -100, 40, 39, -1, 0], device=DEVICE)
    with m4ov_kernels.backend("triton"):
        loss = m4ov_kernels.linear_cross_entropy(hidden, weight, target, reduction="none", num_valid=num_valid)
    assert loss.isnan().tolist() == [False, False, True, False, True, False]
    assert loss[1] == 0
    with pytest.raises(ValueError, match=r"linear_cross_entropy: target\[2\] is neither ignore_index nor in \[0, voc"):
        m4ov_kernels.check()
    m4ov_kernels.check()  # told once


def test_rows_beyond_num_valid_are_nan_and_too_large_a_count_is_harmless():
    hidden, weight = tensor((5, 8), torch.float32), tensor((40, 8), torch.float32)
    target = torch.tensor([3, -100, 7, 39, 1], device=DEVICE)
    expected = F.cross_entropy(hidden @ weight.t(), target, reduction="none")
    for num_valid, left_out in ((5, []), (4, []), (2, [3, 4])):
        with m4ov_kernels.backend("triton"):
            loss = m4ov_kernels.linear_cross_entropy(hidden, weight, target, reduction="none", num_valid=num_valid)
        assert loss.isnan().nonzero().flatten().tolist() == left_out
        torch.testing.assert_close(loss.nan_to_num(), expected.masked_fill(loss.isnan(), 0.0))


def test_nan_and_infinity_propagate_as_in_pytorch():
    values = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 0.0, -88.0, -200.0, 3e38], device=DEVICE)
    for gate, up in ((values, values.flip(0)), (values, torch.ones_like(values))):
        got = activation.swiglu_fwd(gate, up, "hf")
        torch.testing.assert_close(got, activation_reference.swiglu(gate, up, "hf"), equal_nan=True)
    x = torch.stack([values.roll(i) for i in range(8)] + [torch.zeros_like(values)])
    got = norm.rms_norm_fwd(x, torch.ones_like(values), None, 0.0, "fp32")[0]
    expected = norm_reference.rms_norm(x, torch.ones_like(values), 0.0, None, "fp32")[0]
    torch.testing.assert_close(got, expected, equal_nan=True)
    # Each value a word's logit, of the whole vocabulary and of words that are all ruled out.
    words, target = torch.ones(2, 1, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for bias in (values.nan_to_num(0.0), torch.full_like(values, -torch.inf), values):
        arguments = (words, torch.zeros(8, 1, device=DEVICE), target)
        results = []
        for name in ("triton", "reference"):
            with m4ov_kernels.backend(name):
                results.append(m4ov_kernels.linear_cross_entropy(*arguments, linear_bias=bias, reduction="none"))
        torch.testing.assert_close(*results, equal_nan=True)


def test_masked_vocabulary_counts_nothing():
    """A split of words with -inf logits, before and after finite ones."""
    bias = torch.full((120,), -torch.inf, device=DEVICE)
    bias[40:80] = torch.randn(40, device=DEVICE)
    hidden, weight = torch.zeros(2, 4, device=DEVICE), torch.zeros(120, 4, device=DEVICE)
    target = torch.tensor([41, 79], device=DEVICE)
    with m4ov_kernels.backend("triton"):
        loss = m4ov_kernels.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction="none")
    torch.testing.assert_close(loss, bias[40:80].logsumexp(0) - bias[target])


@pytest.mark.parametrize("width", [48, 130])
def test_bits_of_a_row_do_not_depend_on_other_rows(width):
    x, residual = tensor((7, width), torch.float16), tensor((7, width), torch.float16)
    weight = tensor((width,), torch.float16)
    whole = norm.rms_norm_fwd(x, weight, residual, EPS, "hf")
    part = norm.rms_norm_fwd(x[4:5], weight, residual[4:5], EPS, "hf")
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[4:5], b)
    grads = norm.rms_norm_bwd(x, None, whole[1], weight, whole[2], "hf", True)
    assert torch.equal(grads[0], norm.rms_norm_bwd(x, None, whole[1], weight, whole[2], "hf", False)[0])
    for a, b in zip(grads, norm.rms_norm_bwd(x, None, whole[1], weight, whole[2], "hf", True), strict=True):
        assert torch.equal(a, b)


def test_outputs_of_the_wrong_shape_or_dtype_are_refused():
    x, target = tensor((4, 8), torch.float32), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for bad in (x[:3], x.half(), x.t().contiguous().t()):
        with pytest.raises(ValueError, match="out: expected a contiguous"):
            norm.rms_norm_fwd(x, x[0], None, EPS, "hf", out=(bad, x.new_empty(0), x.new_empty(4)))
        with pytest.raises(ValueError, match="out: expected a contiguous"):
            activation.swiglu_fwd(x, x, "hf", out=bad)
        options = (None, None, 1.0, 0.0, -100, None, False, False, False, 0, 0, 4, 0)
        with pytest.raises(ValueError, match="out: expected a contiguous"):
            head.linear_logprob_fwd(x, x, target, *options, out=(bad, *[x.new_empty(4)] * 7))


def test_autograd_through_the_front_door():
    hidden, weight = (tensor(shape, torch.float32).requires_grad_() for shape in ((3, 9, 16), (16,)))
    target = torch.randint(16, (3, 9), device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        with m4ov_kernels.backend(name):
            normed, total = m4ov_kernels.rms_norm(hidden, weight, eps=EPS, residual=hidden)
            gated = m4ov_kernels.swiglu(normed, total)
            loss = m4ov_kernels.linear_cross_entropy(gated, torch.eye(16, device=DEVICE), target)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
