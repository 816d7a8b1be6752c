"""What a checkpoint's config says of a module: what is at odds with its tensors, and which settings are its own."""

from __future__ import annotations

import copy

import pytest
import torch

from m4ov_kernels.gemm.weights import detect, read, write

from .quantized import PREFIX
from .test_gemm_formats import SAMPLES


def settings_changed(config, path, value):
    config = copy.deepcopy(config)
    part = config
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return config


GROUP = ("config_groups", "group_0")
CONFIGS = [
    ("awq", ("bits",), 3),
    ("awq", ("version",), "gemv"),
    ("awq", ("group_size",), 64),
    ("awq", ("group_size",), 16),
    ("awq", ("group_size",), True),
    ("awq", ("zero_point",), False),
    ("awq", ("modules_to_not_convert",), ["mlp"]),
    ("awq", ("quant_method",), "aqlm"),
    ("awq", ("quant_method",), None),
    ("gptq", ("bits",), 8),
    ("gptq", ("bits",), "4"),
    ("gptq", ("checkpoint_format",), "marlin"),
    ("gptq", ("desc_act",), False),
    ("gptq", ("sym",), True),
    ("gptq", ("sym",), None),
    ("gptq", ("group_size",), 128),
    ("gptq", ("dynamic",), {r"-:.*down_proj": {}}),
    ("gptq", ("dynamic",), {r"+:.*down_proj": {"bits": 8}}),
    ("compressed-tensors-int4", (*GROUP, "weights", "num_bits"), 8),
    ("compressed-tensors-int4", (*GROUP, "weights", "type"), "float"),
    ("compressed-tensors-int4", (*GROUP, "weights", "symmetric"), True),
    ("compressed-tensors-int4", (*GROUP, "weights", "strategy"), "tensor"),
    ("compressed-tensors-int4", (*GROUP, "weights", "group_size"), 64),
    ("compressed-tensors-int4", (*GROUP, "weights", "actorder"), None),
    ("compressed-tensors-int4", (*GROUP, "weights"), None),
    ("compressed-tensors-int4", (*GROUP, "format"), "int-quantized"),
    ("compressed-tensors-int4", (*GROUP, "format"), "nvfp4-pack-quantized"),
    ("compressed-tensors-int4", (*GROUP, "targets"), ["re:.*up_proj"]),
    ("compressed-tensors-int4", ("ignore",), ["re:.*mlp"]),
    ("compressed-tensors-int4", ("config_groups",), None),
    ("compressed-tensors-fp8", (*GROUP, "weights", "strategy"), "tensor"),
    ("compressed-tensors-fp8", (*GROUP, "weights", "strategy"), "group"),
    ("compressed-tensors-fp8", (*GROUP, "weights", "block_structure"), [64, 64]),
    ("compressed-tensors-fp8", (*GROUP, "input_activations", "dynamic"), False),
    ("compressed-tensors-int8", (*GROUP, "weights", "strategy"), "tensor"),
    ("modelopt-fp8", ("quantization", "quant_algo"), "NVFP4"),
    ("modelopt-fp8", ("quantization", "quant_algo"), None),
    ("modelopt-fp8", ("quantization", "quant_algo"), "FP8_PB_WO"),
    ("modelopt-fp8", ("quantization", "exclude_modules"), ["model.layers.0*"]),
    ("modelopt-w4a16-awq", ("quantization", "group_size"), 64),
    ("modelopt-w4a16-awq", ("quantization", "has_zero_point"), True),
    ("block-fp8", ("weight_block_size",), [64, 64]),
    ("block-fp8", ("weight_block_size",), None),
    ("block-fp8", ("activation_scheme",), "static"),
    ("block-fp8", ("modules_to_not_convert",), ["model.layers.0.mlp"]),
]


@pytest.mark.parametrize(("name", "path", "value"), CONFIGS, ids=[f"{n}-{p[-1]}-{v}" for n, p, v in CONFIGS])
def test_a_config_that_says_otherwise_is_refused(name, path, value):
    tensors, config = write(SAMPLES[name], name, PREFIX)
    assert read(tensors, config, PREFIX).equal(SAMPLES[name])
    with pytest.raises((TypeError, ValueError), match="must be"):
        read(tensors, settings_changed(config, path, value), PREFIX)


@pytest.mark.parametrize("name", SAMPLES)
def test_an_unquantised_layer_is_not_read(name):
    _, config = write(SAMPLES[name], name, PREFIX)
    with pytest.raises(ValueError, match=r"down_proj\.\w+ must be .*got"):
        detect({f"{PREFIX}.weight": torch.randn(16, 64)}, config, PREFIX)
    with pytest.raises(ValueError, match=f"{name}: {PREFIX}"):
        read({}, config, PREFIX)


FLAT = {"quant_method": "modelopt", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}


@pytest.mark.parametrize("name", ["modelopt-fp8", "modelopt-fp8-pb-wo", "modelopt-w4a16-awq"])
def test_modelopt_says_it_in_three_ways(name):
    """hf_quant_config.json, config.json (which leaves the group size to the shapes), and layer by layer."""
    tensors, config = write(SAMPLES[name], name, PREFIX)
    settings = config["quantization"]
    assert read(tensors, {**FLAT, "quant_algo": settings["quant_algo"]}, PREFIX).equal(SAMPLES[name])
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {PREFIX: settings, "other": {"quant_algo": "NVFP4"}}}
    config["quantization"] = mixed
    assert read(tensors, config, PREFIX).equal(SAMPLES[name])
    del mixed["quantized_layers"][PREFIX]
    with pytest.raises(ValueError, match="quantized_layers"):
        read(tensors, config, PREFIX)


def test_a_group_size_that_shapes_do_not_tell():
    tensors, config = write(SAMPLES["modelopt-w4a16-awq"], "modelopt-w4a16-awq", PREFIX)
    tensors[f"{PREFIX}.weight_scale"] = torch.ones(16, 3)
    with pytest.raises(ValueError, match=r"weight_scale tells:\['group_size'\] must be one of 32, 64, 128"):
        read(tensors, {**FLAT, "quant_algo": config["quantization"]["quant_algo"]}, PREFIX)


def test_the_group_of_a_module_is_by_name_then_pattern_then_class():
    tensors, config = write(SAMPLES["compressed-tensors-int4"], "compressed-tensors-int4", PREFIX)
    groups = config["config_groups"]
    right = groups.pop("group_0")
    wrong = copy.deepcopy(right)
    wrong["weights"]["num_bits"] = 8
    for weaker, stronger in ((["Linear"], ["re:.*down"]), (["re:.*down"], [PREFIX]), (["Linear"], ["up", PREFIX])):
        groups["a"], groups["b"] = {**wrong, "targets": weaker}, {**right, "targets": stronger}
        assert read(tensors, config, PREFIX).equal(SAMPLES["compressed-tensors-int4"])
        groups["a"], groups["b"] = {**right, "targets": weaker}, {**wrong, "targets": stronger}
        with pytest.raises(ValueError, match="num_bits"):
            read(tensors, config, PREFIX)
    groups["a"]["targets"] = groups["b"]["targets"] = ["Linear"]
    with pytest.raises(ValueError, match=r"config_groups.* must be one group"):
        read(tensors, config, PREFIX)


def test_gptq_dynamic_changes_one_module():
    w = SAMPLES["gptq_v2"]
    tensors, config = write(w, "gptq_v2", PREFIX)
    config |= {"bits": 8, "dynamic": {r"+:.*up_proj": {"bits": 2}, r"+:.*down_proj": {"bits": 4}}}
    assert read(tensors, config, PREFIX).equal(w)


def test_an_old_block_structure():
    w = SAMPLES["compressed-tensors-fp8"]
    tensors, config = write(w, "compressed-tensors-fp8", PREFIX)
    config["config_groups"]["group_0"]["weights"]["block_structure"] = "128x128"
    assert read(tensors, config, PREFIX).equal(w)
