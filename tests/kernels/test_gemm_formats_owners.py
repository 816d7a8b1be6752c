"""Formats against the libraries that own them: files those wrote (``owner_files``), and the libraries themselves.

The libraries that are absent are skipped, one line each; ``make test-formats`` has all of them.
"""

from __future__ import annotations

import importlib
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m4ov_kernels.gemm.weights import FORMATS, Fp8Weight, Int4Weight, Int8Weight, detect, read, write
from m4ov_kernels.gemm.weights.bits import same

from .quantized import PREFIX, generators

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
FILES = sorted((Path(__file__).parent / "owner_files").glob("*.safetensors"))
# File names begin with these.
OF_FORMAT = {
    "autoawq": "awq",
    "gptqmodel-v1": "gptq",
    "gptqmodel-v2": "gptq_v2",
    "compressed-tensors-int4": "compressed-tensors-int4",
    "compressed-tensors-int8": "compressed-tensors-int8",
    "compressed-tensors-fp8": "compressed-tensors-fp8",
    "modelopt-fp8": "modelopt-fp8",
    "modelopt-fp8-pb-wo": "modelopt-fp8-pb-wo",
    "modelopt-w4a16-awq": "modelopt-w4a16-awq",
}


def load(path: Path):
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"]), file.metadata()


def format_of(path: Path) -> str:
    return OF_FORMAT[max((name for name in OF_FORMAT if path.stem.startswith(name)), key=len)]


def test_there_is_a_file_for_every_format_with_a_library_of_its_own():
    assert {format_of(path) for path in FILES} == set(FORMATS) - {"block-fp8"}  # transformers, below, owns that one


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_owners_file_is_read_as_its_owner_does(path):
    tensors, config, _ = load(path)
    expected = tensors.pop("expected")
    name = format_of(path)
    assert detect(tensors, config, PREFIX) == name
    found = read(tensors, config, PREFIX)
    assert found.shape == expected.shape
    if name == "modelopt-w4a16-awq":  # ModelOpt's fake quantisation divides by the inverse scale: two roundings
        error = (found.dequantize(torch.float32) - expected).abs()
        assert bool((error <= 2 * torch.finfo(torch.float32).eps * expected.abs()).all())
    else:
        assert torch.equal(found.dequantize(expected.dtype), expected)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_owners_file_is_written_again_to_the_bit(path):
    tensors, config, _ = load(path)
    del tensors["expected"]
    found = read(tensors, config, PREFIX)
    if path.stem == "gptqmodel-v1-asymmetric":  # it has zero points 0, which other readers of version 1 take for 16
        assert bool((found.zeros == 0).any())
        with pytest.raises(ValueError, match="version 1 stores z − 1"):
            write(found, "gptq", PREFIX)
        return
    again, mine = write(found, format_of(path), PREFIX)
    assert again.keys() == tensors.keys()
    assert all(same(again[name], tensors[name]) for name in tensors)
    assert read(again, mine, PREFIX).equal(found)


# --- The libraries themselves. ---


@st.composite
def cases(draw: st.DrawFn, whole: int = 1, rows: int = 1) -> torch.Tensor:
    """A float32 matrix [rows·n, whole·m]."""
    generator = draw(generators())
    return torch.randn(rows * draw(st.integers(1, 20)), whole * draw(st.integers(1, 5)), generator=generator)


def imported(package: str, distribution: str):
    """Absent: skipped, except where it was installed for this test."""
    if os.environ.get("M4OV_FORMATS"):
        return importlib.import_module(package)
    return pytest.importorskip(package, reason=f"{distribution} is not installed")


def compressed_tensors_of(w, name):
    """What compressed-tensors makes of our tensors and our config: its compressor, scheme and local state."""
    imported("compressed_tensors", "compressed-tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensors, config = write(w, name)
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(parsed.format), scheme, tensors


@pytest.mark.parametrize(
    "kind", ["int4-symmetric", "int4-asymmetric", "int4-row", "int8", "tensor", "channel", "block"]
)
def test_compressed_tensors_takes_what_we_write_and_makes_it_itself(kind):
    imported("compressed_tensors", "compressed-tensors")

    @given(cases(whole=32), cases())
    @settings(max_examples=15)
    def check(grouped, any_size):
        if kind.startswith("int4"):
            rest = {"group_size": -1} if kind == "int4-row" else {"group_size": 32}
            w = Int4Weight.quantize(any_size if kind == "int4-row" else grouped, symmetric="a" not in kind[5:6], **rest)
            name = "compressed-tensors-int4"
        elif kind == "int8":
            w, name = Int8Weight.quantize(any_size), "compressed-tensors-int8"
        else:
            w, name = Fp8Weight.quantize(grouped, granularity=kind), "compressed-tensors-fp8"
        compressor, scheme, tensors = compressed_tensors_of(w, name)
        assert torch.equal(compressor.decompress(tensors, scheme)["weight"], w.dequantize(torch.float32))
        # The other way: from our values and scales it makes our bits.
        state = {"weight": w.dequantize(torch.float32), "weight_scale": tensors["weight_scale"]}
        if "weight_zero_point" in tensors:
            state["weight_zero_point"] = (w.zeros.int() - 8).to(torch.int8)
        made = compressor.compress(state, scheme)
        assert all(same(made[key], tensors[key]) for key in tensors)

    check()


def test_scales_and_zero_points_are_those_of_compressed_tensors():
    """The min-max rule, in float32; its library gives a group of zeros another scale, and the same zeros."""
    imported("compressed_tensors", "compressed-tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    @given(cases(whole=64), st.booleans())
    @settings(max_examples=20)
    def check(w, symmetric):
        found = Int4Weight.quantize(w, group_size=64, symmetric=symmetric)
        groups = w.unflatten(1, (-1, 64))
        args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=64)
        scales, zeros = calculate_qparams(groups.amin(2), groups.amax(2), args)
        torch.testing.assert_close(found.scales, scales, rtol=2**-22, atol=0)
        if not symmetric:
            assert int((found.zeros.int() - 8 - zeros.int()).abs().max()) <= 1  # the scale's last bit at a tie
        rows = Int8Weight.quantize(w)
        args = QuantizationArgs(num_bits=8, strategy="channel")
        torch.testing.assert_close(
            rows.scales, calculate_qparams(w.amin(1, True), w.amax(1, True), args)[0], rtol=2**-22, atol=0
        )

    check()


def test_modelopt_makes_our_bits_of_our_values():
    imported("modelopt.torch.export.quant_utils", "nvidia-modelopt")
    from modelopt.torch.export.quant_utils import from_quantized_weight, pack_int4_in_uint8, to_quantized_weight
    from modelopt.torch.quantization.qtensor import FP8QTensor

    @given(cases(whole=32, rows=2), cases())
    @settings(max_examples=15)
    def check(grouped, any_size):
        w = Int4Weight.quantize(grouped, group_size=32)
        tensors, _ = write(w, "modelopt-w4a16-awq")
        assert same(pack_int4_in_uint8(w.dequantize(), tensors["weight_scale"], 32), tensors["weight"])

        f = Fp8Weight.quantize(any_size, granularity="tensor")
        f = Fp8Weight(f.values, f.scales, "tensor", torch.ones(1))
        tensors, _ = write(f, "modelopt-fp8")
        value, scale = tensors["weight"], tensors["weight_scale"]
        assert torch.equal(from_quantized_weight(value, scale, "fp8", torch.float32), f.dequantize())
        assert same(to_quantized_weight(f.dequantize(), scale, "fp8"), value)

        f = Fp8Weight.quantize(torch.nn.functional.pad(any_size, (0, 130, 0, 120), value=0.5), granularity="block")
        tensors, _ = write(f, "modelopt-fp8-pb-wo")
        value, scale = tensors["weight"], tensors["weight_scale"].squeeze((1, 3))
        sizes = {-1: 128, -2: 128}
        wrapped = FP8QTensor(value.shape, torch.float32, value)
        assert torch.equal(wrapped.dequantize(torch.float32, scale=scale, block_sizes=sizes), f.dequantize())
        made, scales = FP8QTensor.quantize(f.dequantize(), scale, block_sizes=sizes)
        assert same(made._quantized_data, value)
        assert same(scales, f.scales)

    check()


def test_transformers_reads_block_fp8_as_we_write_it():
    imported("transformers", "transformers")
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=(128, 128))

    @given(cases(whole=128, rows=128).filter(lambda w: w.shape[0] <= 384))
    @settings(max_examples=5)
    def check(w):
        made = Fp8Quantize(Quantizer())._quantize_one("x.weight", w)
        config = {**Quantizer.quantization_config.to_dict()}
        config["weight_block_size"] = list(config["weight_block_size"])
        config["quant_method"] = str(getattr(config["quant_method"], "value", config["quant_method"]))
        found = read(made, config, "x")
        again, mine = write(found, "block-fp8", "x")
        assert all(same(again[name], made[name]) for name in made)
        theirs = FineGrainedFP8Config.from_dict(mine)
        assert list(theirs.weight_block_size) == [128, 128]
        back = Fp8Dequantize(Quantizer())._dequantize_one(again["x.weight"], again["x.weight_scale_inv"])
        assert torch.equal(back.float(), found.dequantize(back.dtype).float())

    check()


def test_autoawq_unpacks_what_we_pack():
    imported("awq", "autoawq")
    from awq.utils.packing_utils import dequantize_gemm

    @given(cases(whole=32, rows=32))
    @settings(max_examples=15)
    def check(w):
        found = Int4Weight.quantize(w.half(), group_size=32, symmetric=False)
        tensors, _ = write(found, "awq")
        theirs = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 32)
        assert torch.equal(theirs.T, found.dequantize())

    check()


@cache
def _gptq_linear():
    imported("gptqmodel", "gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_gptqmodel_unpacks_what_we_pack(name):
    make = _gptq_linear()
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    @given(cases(whole=32, rows=32), st.booleans())
    @settings(max_examples=8)
    def check(w, symmetric):
        N, K = w.shape
        g_idx = (torch.arange(K) // 32)[torch.randperm(K)].int()
        found = Int4Weight.quantize(w.half(), group_size=32, symmetric=symmetric, g_idx=g_idx)
        if found.zeros is not None:
            found.zeros.clamp_(min=1)
        tensors, _ = write(found, name)
        module = make(bits=4, group_size=32, sym=symmetric, desc_act=True, in_features=K, out_features=N, bias=False)
        for key, tensor in tensors.items():
            module.register_buffer(key, tensor.clone())
        if name == "gptq":
            convert_gptq_v1_to_v2_format_module(module, 4, torch.int32)
        module.optimized = True  # without torch.compile, which it would ask of each module
        module.post_init()
        assert torch.equal(module.dequantize_weight().T.half(), found.dequantize())

    check()
