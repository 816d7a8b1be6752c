"""qk_norm_mrope and vision_rope: what is their own; what they share with all operators is in ``test_operators.py``."""

from __future__ import annotations

import math
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch

import m4ov_kernels
from m4ov_kernels import qk_norm_mrope, vision_rope
from m4ov_kernels.rope.frequencies import axes, inverse_frequencies, tables
from m4ov_kernels.vision.grid import positions_of

from . import strategies

EPS, THETA = 1e-6, 5e6
DTYPES = strategies.HALF_AND_SINGLE
MODELS = {"qwen3_vl": ([24, 20, 20], True), "qwen2_5_vl": ([16, 24, 24], False)}


def heads(shape, dtype, weights=True):
    dim = shape[-1]
    q, k = torch.randn(shape).to(dtype), torch.randn(*shape[:-2], max(1, shape[-2] // 2), dim).to(dtype)
    scales = [torch.rand(dim).add(0.5).to(dtype) if weights else None for _ in range(2)]
    return q, k, *scales


def options(model="qwen3_vl", **more):
    section, interleaved = MODELS[model]
    return {"mrope_section": section, "theta": THETA, "eps": EPS, "interleaved": interleaved, **more}


def hugging_face(model, q, k, q_weight, k_weight, positions):
    """As transformers' own modules compute it: ``[B, T, H, D]`` and positions ``[3, B, T]``."""
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    name = {"qwen3_vl": "Qwen3VLTextRotaryEmbedding", "qwen2_5_vl": "Qwen2_5_VLRotaryEmbedding"}[model]
    parameters = {"rope_type": "default", "rope_theta": THETA, "mrope_section": MODELS[model][0]}
    config = SimpleNamespace(rope_parameters=parameters, head_dim=q.shape[-1], max_position_embeddings=4096)
    cos, sin = getattr(modeling, name)(config)(q, positions)
    if q_weight is not None:
        norms = [modeling.Qwen3VLTextRMSNorm(q.shape[-1], EPS) for _ in range(2)]
        for norm, weight in zip(norms, (q_weight, k_weight), strict=True):
            norm.weight.data = weight
        q, k = norms[0](q), norms[1](k)
    turned = modeling.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return [x.transpose(1, 2) for x in turned]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_the_definition_has_the_bits_of_hugging_face(model, dtype):
    given = heads((2, 37, 8, 128), dtype, weights=model == "qwen3_vl")
    positions = torch.randint(0, 200_000, (3, 2, 37))
    expected = hugging_face(model, *given, positions)
    with m4ov_kernels.backend("reference"):
        got = qk_norm_mrope(*given, positions, **options(model))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounding_contract(isa, model, dtype):
    """16-bit outputs have the definition's bits, but for a few where a root or a sine differs in its last bit."""
    given = heads((400, 6, 128), dtype, weights=model == "qwen3_vl")
    positions = torch.randint(0, 40_000, (3, 400))
    made = {}
    for numerics in ("hf", "vllm", "fp32"):
        got = qk_norm_mrope(*given, positions, **options(model, numerics=numerics))
        with m4ov_kernels.backend("reference"):
            made[numerics] = qk_norm_mrope(*given, positions, **options(model, numerics=numerics))
        for a, b in zip(got, made[numerics], strict=True):
            assert (a == b).float().mean() > 0.998
    told_apart = [("hf", "fp32")] + [("hf", "vllm"), ("vllm", "fp32")] * (model == "qwen3_vl")
    for one, other in told_apart:
        assert (made[one][0] == made[other][0]).float().mean() < 0.95, f"{one} and {other} are not told apart"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vision_has_the_bits_of_hugging_face(isa, model, dtype):
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    name = {"qwen3_vl": "Qwen3VLVisionRotaryEmbedding", "qwen2_5_vl": "Qwen2_5_VLVisionRotaryEmbedding"}[model]
    if not hasattr(getattr(modeling, name), "compute_axial_rope_parameters"):
        pytest.skip("transformers before 5.23 makes the angles elsewhere")
    vision_utils = pytest.importorskip("transformers.vision_utils")
    grid = torch.tensor([[1, 6, 4], [3, 4, 8], [2, 2, 2]])
    positions = vision_utils.get_vision_position_ids(grid, 2)
    assert torch.equal(positions, positions_of(grid, 2, len(positions)))
    q, k, _ = torch.randn(len(positions), 3, 16, 72).to(dtype).unbind(1)
    config = SimpleNamespace(rope_parameters={"rope_type": "axial", "rope_theta": 10000.0}, head_dim=72)
    cos, sin = getattr(modeling, name)(config)(q, positions)
    expected = modeling.apply_rotary_pos_emb_vision(q, k, cos, sin)
    with m4ov_kernels.backend("reference"):
        defined = vision_rope(q, k, grid, merge_size=2)
    got = vision_rope(q, k, grid, merge_size=2)
    window = torch.randperm(len(positions))
    moved = vision_rope(q[window], k[window], None, merge_size=2, positions=positions[window].int())
    for a, b, c, d in zip(expected, defined, got, moved, strict=True):
        assert torch.equal(a, b)
        assert (a == c).float().mean() > (0.9 if dtype is torch.float32 else 0.998)
        assert torch.equal(c[window], d)


def unit_vectors(count, dim=128):
    """Heads whose rotation is their cosines, then their sines."""
    return torch.cat((torch.ones(count, 1, dim // 2), torch.zeros(count, 1, dim // 2)), -1)


@pytest.mark.parametrize("numerics", ["hf", "fp32"])
def test_sines_and_cosines_are_within_one_ulp_to_2_24(isa, numerics):
    """Of the float32 product, or of the float64 one."""
    positions = torch.cat((torch.arange(64), torch.randint(0, 2**24, (1500,)), torch.tensor([2**24, 2**24 - 1])))
    positions = torch.cat((positions, -positions))
    x = unit_vectors(len(positions))
    got = qk_norm_mrope(x, x, None, None, positions, **options(numerics=numerics))[0][:, 0]
    exact = torch.float32 if numerics == "hf" else torch.float64
    angles = (positions[:, None].to(exact) * inverse_frequencies(THETA, 128, exact)).double()
    expected = torch.cat((angles.cos(), angles.sin()), -1)
    ulp = torch.from_numpy(np.spacing(np.abs(expected.float().numpy()))).double()
    assert ((got.double() - expected).abs() / ulp).max() <= 1


def test_positions_of_every_size_and_kind_agree(isa):
    q, k, *weights = heads((2, 9, 4, 128), torch.float32)
    positions = torch.randint(-5, 2**31 - 1, (3, 2, 9))
    expected = qk_norm_mrope(q, k, *weights, positions, **options())
    spread = torch.empty(2, 9, 3, 2, dtype=torch.int64)[..., 0].movedim(-1, 0).copy_(positions)
    for other in (positions.int(), spread, positions.transpose(1, 2).contiguous().transpose(1, 2)):
        for a, b in zip(qk_norm_mrope(q, k, *weights, other, **options()), expected, strict=True):
            assert torch.equal(a, b)
    flat = qk_norm_mrope(q.flatten(0, 1), k.flatten(0, 1), *weights, positions.flatten(1), **options())
    assert torch.equal(flat[0].view(q.shape), expected[0])
    same = positions[:1].expand(3, -1, -1)
    one_axis = qk_norm_mrope(q, k, *weights, positions[0], **options() | {"mrope_section": None})
    assert torch.equal(one_axis[0], qk_norm_mrope(q, k, *weights, same, **options())[0])


def test_views_of_one_projection_are_read_in_place(isa):
    projected = torch.randn(5, 7, (8 + 2 + 2) * 64)
    q, k, _ = projected.view(5, 7, 12, 64).split((8, 2, 2), dim=2)
    given = options() | {"mrope_section": [12, 10, 10]}
    weights, positions = torch.rand(2, 64), torch.randint(0, 100, (3, 5, 7))
    expected = qk_norm_mrope(q.contiguous(), k.contiguous(), *weights, positions, **given)
    for a, b in zip(qk_norm_mrope(q, k, *weights, positions, **given), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads_", "dim"), [(16, 72), (5, 36), (12, 128)])
def test_large_tensors_have_the_bits_of_small_ones(isa, dtype, heads_, dim):
    """From 16 MiB on they are written past the caches, whole heads or gathered ones."""
    tokens = (20 << 20) // (heads_ * dim * dtype.itemsize)
    q, k = torch.randn(2, tokens, heads_, dim).to(dtype)
    positions = torch.randint(0, 1000, (tokens, 2))
    for part in (slice(0, 40), slice(tokens // 2 - 7, tokens // 2 + 60), slice(tokens - 33, tokens)):
        small = vision_rope(q[part], k[part], None, merge_size=1, positions=positions[part])
        for a, b in zip(vision_rope(q, k, None, merge_size=1, positions=positions), small, strict=True):
            assert torch.equal(a[part], b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_other_tokens_nor_on_threads(isa, dtype):
    given = [x.requires_grad_() for x in heads((150, 6, 128), dtype)]
    positions, grads = torch.randint(0, 5000, (3, 150)), [torch.randn(150, n, 128).to(dtype) for n in (6, 3)]
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            out = qk_norm_mrope(*given, positions, **options())
            results.append([*out, *torch.autograd.grad(out, given, grads)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = qk_norm_mrope(given[0][13:14], given[1][13:14], *given[2:], positions[:, 13:14], **options())
    assert torch.equal(alone[0], results[0][0][13:14])


def test_gradcheck_of_the_references():
    q, k, *weights = (x.double().requires_grad_() for x in heads((3, 2, 8), torch.float32))
    given = options() | {"mrope_section": [1, 1, 1], "rotary_dim": 6}
    positions = torch.randint(0, 50, (3, 3))
    with m4ov_kernels.backend("reference"):
        for numerics in ("hf", "vllm", "fp32"):
            assert torch.autograd.gradcheck(
                lambda *t, n=numerics: qk_norm_mrope(*t, positions, **given, numerics=n), (q, k, *weights)
            )
        place = torch.randint(0, 50, (3, 2))
        assert torch.autograd.gradcheck(lambda *t: vision_rope(*t, None, merge_size=2, positions=place), (q, k))


def test_what_no_backward_needs_is_not_kept():
    q, k, q_weight, _ = heads((4, 2, 128), torch.float32)
    q.requires_grad_(), k.requires_grad_()
    turned = qk_norm_mrope(q, k, q_weight, None, torch.arange(4), **options())[0]
    saved = [x for x in turned.grad_fn.saved_tensors if x is not None]
    assert any(x is q for x in saved)
    assert not any(x is k for x in saved)
    turned = vision_rope(q, k, None, merge_size=2, positions=torch.zeros(4, 2, dtype=torch.int64))[0]
    assert all(x is None or not x.is_floating_point() for x in turned.grad_fn.saved_tensors)


def test_weights_of_another_dtype_promote_as_pytorch_does():
    q, k, *_ = heads((3, 2, 8), torch.bfloat16)
    weights, given = torch.rand(2, 8), options() | {"mrope_section": None}
    q_turned, k_turned = qk_norm_mrope(q, k, weights[0], weights[1].bfloat16(), torch.arange(3), **given)
    assert (q_turned.dtype, k_turned.dtype) == (torch.float32, torch.bfloat16)
    with pytest.raises(RuntimeError, match="different dtypes"), m4ov_kernels.backend("native"):
        qk_norm_mrope(q, k, *weights, torch.arange(3), **given)


def test_frequencies():
    assert axes(8, [3, 3, 2], True) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert axes(8, [2, 3, 3], True) == [0, 1, 2, 0, 1, 2, 0, 1]  # w's third one would be the ninth
    assert axes(8, [4, 2, 2], True) == [0, 1, 2, 0, 1, 2, 0, 0]
    assert axes(8, [2, 3, 3], False) == [0, 0, 1, 1, 1, 2, 2, 2]
    made = tables(THETA, 128, (), True, torch.device("cpu"))
    assert torch.equal(made.single.double(), made.widened)
    mpmath.mp.dps = 50
    for i in (0, 1, 31, 63):
        turns = mpmath.mpf(THETA) ** (mpmath.mpf(-2 * i) / 128) / (2 * mpmath.pi)
        assert abs(turns * 2**64 - made.exact[i].item() % 2**64) <= 1
        assert math.isclose(made.double[i].item(), float(turns * 2 * mpmath.pi), rel_tol=1e-15)
