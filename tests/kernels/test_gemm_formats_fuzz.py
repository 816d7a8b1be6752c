"""Readers given tensors that are cut, stretched, of another dtype, absent or at odds: a clear error, or just what the
tensors say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m4ov_kernels.gemm.weights import FORMATS, read, write
from m4ov_kernels.gemm.weights.formats.fields import LEAVES

from .quantized import PREFIX
from .test_gemm_formats import EXPRESSIBLE, SAMPLES

OTHER = (torch.int32, torch.int64, torch.uint8, torch.int8, torch.float32, torch.float16, torch.float64, torch.bool)


def cut(value: Tensor, draw) -> Tensor | None:
    """One dimension shorter, down to nothing."""
    if not value.dim():
        return torch.ones(0, dtype=value.dtype)
    dim = draw(st.integers(0, value.dim() - 1))
    return value.narrow(dim, 0, draw(st.integers(0, value.shape[dim] - 1)))


def stretched(value: Tensor, draw) -> Tensor:
    if not value.dim():
        return value.repeat(2)
    dim = draw(st.integers(0, value.dim() - 1))
    raw = value.view(torch.uint8) if value.dtype is torch.float8_e4m3fn else value
    return torch.cat((raw, raw), dim).view(value.dtype)


def reshaped(value: Tensor, draw) -> Tensor | None:
    if value.dim() == 2 and value.shape[0] != value.shape[1]:
        return value.T
    return value[None] if value.dim() else None


def another_dtype(value: Tensor, draw) -> Tensor:
    dtype = draw(st.sampled_from([dtype for dtype in OTHER if dtype is not value.dtype]))
    return value.float().to(dtype)


def not_finite(value: Tensor, draw) -> Tensor | None:
    if not value.is_floating_point():
        return None
    bad = value.float().clone()
    bad.view(-1)[draw(st.integers(0, bad.numel() - 1))] = float("nan")
    return bad.to(value.dtype)


def not_a_tensor(value: Tensor, draw) -> object:
    return draw(st.sampled_from([value.tolist(), "weight", 3, {}]))


FAULTS = (cut, stretched, reshaped, another_dtype, not_finite, not_a_tensor)


def written(name: str, w=None) -> tuple[dict[str, Tensor], dict]:
    """Tensors that a test may change."""
    tensors, config = write(SAMPLES[name] if w is None else w, name, PREFIX)
    return {key: tensor.clone() for key, tensor in tensors.items()}, config


def outcome(tensors, config):
    """The weight, or what the reader says against it."""
    try:
        return read(tensors, config, PREFIX), ""
    except (TypeError, ValueError) as error:
        return None, str(error)


def says_the_same(a: Tensor, b: Tensor) -> bool:
    """Shape and values: a scale may have another float dtype, an index 64 bits."""
    return a.shape == b.shape and torch.equal(a.double(), b.double())


@pytest.mark.parametrize("name", FORMATS)
def test_a_tensor_that_is_wrong_is_named(name):
    seen = set()

    @given(st.data())
    @settings(max_examples=60)
    def check(data):
        tensors, config = written(name, data.draw(EXPRESSIBLE[name]))
        key = data.draw(st.sampled_from(sorted(tensors)))
        fault = data.draw(st.sampled_from(FAULTS))
        changed = fault(tensors[key], data.draw)
        if changed is None:
            return
        tensors[key] = changed
        found, message = outcome(tensors, config)
        seen.add(found is None)
        if found is None:
            # A shape that is wrong shows against the others, so the one that is named may be its neighbour.
            assert (key if fault in (another_dtype, not_finite, not_a_tensor) else PREFIX) in message
            assert "must be" in message
            assert "got" in message
        else:  # another weight, then, and all of it: written again, it is these tensors
            assert fault is not not_finite
            again, _ = write(found, name, PREFIX)
            assert again.keys() == tensors.keys()
            assert all(says_the_same(again[name], tensors[name]) for name in tensors), (key, fault.__name__)

    check()
    assert True in seen


@pytest.mark.parametrize("name", FORMATS)
def test_a_tensor_that_is_missing_is_named(name):
    tensors, config = write(SAMPLES[name], name, PREFIX)
    for key in tensors:
        less = {other: tensor for other, tensor in tensors.items() if other != key}
        if key.endswith("pre_quant_scale"):  # a norm may have absorbed it
            assert read(less, config, PREFIX).pre_quant_scale is None
            continue
        with pytest.raises(ValueError, match=key):
            read(less, config, PREFIX)


@pytest.mark.parametrize("name", FORMATS)
def test_another_formats_tensor_is_not_overlooked(name):
    tensors, config = write(SAMPLES[name], name, PREFIX)
    unheard = []
    for leaf in sorted(LEAVES):
        key = f"{PREFIX}.{leaf}"
        if key not in tensors:
            found, message = outcome({**tensors, key: torch.ones(1)}, config)
            assert found is not None or key in message
            unheard += [leaf] if found is not None else []
    # What a scheme with quantised activations has beside its weights.
    assert unheard == (["input_scale", "input_zero_point"] if name == "compressed-tensors-int4" else [])


G_IDX = {"gptq": "g_idx", "gptq_v2": "g_idx", "compressed-tensors-int4": "weight_g_idx"}


@pytest.mark.parametrize(("name", "leaf"), G_IDX.items())
@pytest.mark.parametrize("value", [-1, 2, 2**31 - 1])
def test_a_group_out_of_range_is_named(name, leaf, value):
    tensors, config = written(name)
    key = f"{PREFIX}.{leaf}"
    tensors[key][7] = value
    with pytest.raises(ValueError, match=rf"{key} must be groups of 0\.\.1; got"):
        read(tensors, config, PREFIX)


def test_a_group_index_never_set_is_no_act_order():
    """compressed-tensors fills weight_g_idx with −1 until a calibration sets it."""
    tensors, config = written("compressed-tensors-int4")
    tensors[f"{PREFIX}.weight_g_idx"].fill_(-1)
    assert read(tensors, config, PREFIX).g_idx is None


def test_a_group_index_of_uneven_groups_is_not_what_its_owner_reads():
    tensors, config = written("compressed-tensors-int4")
    tensors[f"{PREFIX}.weight_g_idx"][0] = 1
    with pytest.raises(ValueError, match=r"weight_g_idx must be 32 input features in every group; got \[31, 33\]"):
        read(tensors, config, PREFIX)


def test_a_weight_shape_at_odds_with_the_words():
    tensors, config = written("compressed-tensors-int4")
    for shape in ([16, 65], [16, 56], [15, 64], [64, 16], [16, -64], [16, 0], [16, 60]):
        wrong = {**tensors, f"{PREFIX}.weight_shape": torch.tensor(shape)}
        with pytest.raises(ValueError, match="weight_shape must be"):
            read(wrong, config, PREFIX)


def test_version_1_with_a_zero_point_of_nought():
    """A nibble 15 of qzeros: GPTQModel's files have a borrow there, which adding 1 to every word undoes."""
    zeros = torch.randint(0, 16, (16, 2)).byte()
    zeros[3, 1] = 0
    w = SAMPLES["gptq_v2"]
    w = type(w)(w.packed, w.scales, w.in_features, w.group_size, zeros, w.g_idx)
    tensors, config = written("gptq_v2", w)
    words = tensors[f"{PREFIX}.qzeros"].long() - 0x11111111
    tensors[f"{PREFIX}.qzeros"] = ((words + 2**31) % 2**32 - 2**31).int()
    config["checkpoint_format"] = "gptq"
    with pytest.raises(ValueError, match="qzeros must be free of 15"):
        read(tensors, config, PREFIX)
    config["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    assert read(tensors, config, PREFIX).equal(w)


@pytest.mark.parametrize("which", ["tensors", "config", "prefix"])
@pytest.mark.parametrize("value", [None, 3, [1]])
def test_arguments_of_another_kind(which, value):
    tensors, config = write(SAMPLES["awq"], "awq", PREFIX)
    arguments = {"tensors": tensors, "config": config, "prefix": PREFIX, which: value}
    with pytest.raises(TypeError, match=f"{which} must be"):
        read(**arguments)


def test_write_wants_a_weight_and_a_format():
    with pytest.raises(ValueError, match="format must be one of"):
        write(SAMPLES["awq"], "marlin")
    with pytest.raises(TypeError, match="weight must be"):
        write(torch.ones(3), "awq")
