"""What `inspect` says: what is quantised and what silently is or is not, zero points, joined products, kernels."""

from __future__ import annotations

import pytest
import torch

from m4ov.checkpoints import inspect, open_checkpoint
from m4ov.checkpoints.fused import mismatches
from m4ov.checkpoints.kernels import Product, eligible
from m4ov.checkpoints.names import PARTS, fused, is_embedding, part_of
from m4ov.checkpoints.seen import look
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight
from tests.checkpoints import small

ATTENTION, MLP = f"{small.TEXT}.0.self_attn", f"{small.TEXT}.0.mlp"
TOWER = "model.visual.blocks.0"
EMBEDDINGS = "model.language_model.embed_tokens.weight"


def int4(N=128, K=128, **rest):
    return Int4Weight.quantize(small.linear(N, K).bfloat16(), group_size=64, **rest)


def text(make=int4):
    """A layer's linears."""
    names = [f"{ATTENTION}.{own}_proj" for own in "qkvo"] + [f"{MLP}.{own}_proj" for own in ("gate", "up", "down")]
    return {name: make() for name in names}


TOWERS = {f"{TOWER}.attn.qkv.weight": small.linear(96, 32), "model.visual.merger.linear_fc1.weight": small.linear(8, 8)}
REST = {EMBEDDINGS: small.linear(64, 128).bfloat16(), "model.language_model.norm.weight": torch.ones(128)}


def levels(report, level):
    return [finding.message for finding in report.findings if finding.level == level]


def test_a_sound_checkpoint(tmp_path):
    left = [name.removesuffix(".weight") for name in TOWERS] + ["lm_head"]
    folder = small.write(
        tmp_path / "m", text(), "compressed-tensors-int4", TOWERS | REST, left=left, tie_word_embeddings=True
    )
    report = inspect(open_checkpoint(folder))
    assert report.ok
    assert not levels(report, "warning")
    assert report.formats == {"compressed-tensors-int4": 7}
    assert report.linears["text"]["quantised"] == 7
    assert report.linears["vision"] == {"quantised": 0, "left": 1, "quantised_bytes": 0, "left_bytes": 4 * 96 * 32}
    assert report.linears["merger"]["left"] == 1
    stored = sum(one.nbytes for one in report.seen.values())
    head = 2 * 64 * 128
    (note,) = [message for message in levels(report, "note") if "lm_head is the embeddings" in message]
    assert f"{head / (head + stored + 7 * 16):.0%}" in note  # weight_shape: 16 bytes each
    assert {product.name.rpartition(".")[2]: product.shape for product in report.products} == {
        "qkv_proj": (384, 128),
        "o_proj": (128, 128),
        "gate_up_proj": (256, 128),
        "down_proj": (128, 128),
    }


def test_a_tower_that_a_missed_pattern_quantised(tmp_path):
    """The pattern is for another class's names (`vision_tower`): the tower is quantised in spite of it."""
    weights = text() | {f"{TOWER}.attn.qkv": int4()}
    folder = small.write(tmp_path / "model", weights, "compressed-tensors-int4")
    small.edit(folder, lambda config: config["quantization_config"]["ignore"].append(r"re:.*vision_tower\..*"))
    report = inspect(open_checkpoint(folder))
    assert any("vision_tower" in message and "names nothing" in message for message in levels(report, "warning"))
    assert "vision: 1 linears are quantised" in levels(report, "note")
    # The right pattern, over files that hold the tower quantised all the same.
    small.edit(folder, lambda config: config["quantization_config"]["ignore"].append(r"re:.*visual\..*"))
    report = inspect(open_checkpoint(folder))
    (error,) = levels(report, "error")
    assert error.startswith("vision: ")
    assert f"without '{TOWER}.attn.qkv', whose tensors are quantised" in error


@pytest.mark.parametrize(
    ("format", "make"),
    [
        ("compressed-tensors-int4", int4),
        ("awq", int4),
        ("block-fp8", lambda: Fp8Weight.quantize(small.linear(128, 128), granularity="block")),
    ],
)
def test_linears_that_the_configuration_does_not_leave_out(format, make, tmp_path):
    folder = small.write(tmp_path / "model", text(make), format, TOWERS | REST)
    report = inspect(open_checkpoint(folder))
    errors = levels(report, "error")
    assert [error.split(":")[0] for error in errors] == ["vision", "merger"]
    assert all("does not leave them out" in error for error in errors)
    assert f"{TOWER}.attn.qkv" in errors[0]


def test_gptq_has_no_list(tmp_path):
    folder = small.write(tmp_path / "model", text(), "gptq", TOWERS | REST)
    report = inspect(open_checkpoint(folder))
    assert report.ok
    assert any(message.startswith("vision: 1 linears in 16 bits") for message in levels(report, "note"))


def test_a_head_that_is_tied_and_quantised(tmp_path):
    weights = text() | {"lm_head": int4()}
    folder = small.write(
        tmp_path / "model", weights, "compressed-tensors-int4", REST, left=(), tie_word_embeddings=True
    )
    (error,) = levels(inspect(open_checkpoint(folder)), "error")
    assert "servers drop it" in error
    small.edit(folder, lambda config: config.update(tie_word_embeddings=False))
    assert inspect(open_checkpoint(folder)).ok


def test_a_configuration_without_quantised_weights(tmp_path):
    folder = small.write(tmp_path / "model", text(), "awq")
    small.store(folder, REST)
    (error,) = levels(inspect(open_checkpoint(folder)), "error")
    assert "config.json[quantization_config] says that weights are quantised, and no tensor is" in error


@pytest.mark.parametrize(("written", "said"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq"), ("gptq_v2", None)])
def test_gptq_under_the_other_versions_name(written, said, tmp_path):
    folder = small.write(tmp_path / "model", text(), written)
    assert inspect(open_checkpoint(folder)).ok
    small.edit(folder, lambda config: config["quantization_config"].update(checkpoint_format=said))
    errors = levels(inspect(open_checkpoint(folder)), "error")
    assert len(errors) == 7
    assert all(f"as checkpoint_format {written!r} it is a symmetric weight" in error for error in errors)


def test_conventions_and_what_vllm_does_not_load(tmp_path):
    zeros = torch.full((128, 2), 8, dtype=torch.uint8)
    even = {name: Int4Weight(w.packed, w.scales, 128, 64, zeros) for name, w in text().items()}
    report = inspect(open_checkpoint(small.write(tmp_path / "even", even, "awq")))
    assert report.conventions["awq"].startswith("z as it is")
    assert any("every zero point is 8" in message for message in levels(report, "note"))
    odd = {
        name: Int4Weight.quantize(small.linear(128, 128).half() + 0.1, group_size=64, symmetric=False) for name in even
    }
    report = inspect(open_checkpoint(small.write(tmp_path / "odd", odd, "gptq_v2")))
    assert any(
        "7 weights with zero points: vLLM loads symmetric GPTQ" in message for message in levels(report, "warning")
    )
    scaled = {
        f"{MLP}.down_proj": Int4Weight(w.packed, w.scales, 128, 64, None, None, torch.ones(128)) for w in [int4()]
    }
    report = inspect(open_checkpoint(small.write(tmp_path / "scaled", scaled, "modelopt-w4a16-awq")))
    assert any("vLLM does not load it, and 1 weights have a pre_quant_scale" in m for m in levels(report, "warning"))
    tower = {f"{TOWER}.attn.qkv": int4()}
    report = inspect(open_checkpoint(small.write(tmp_path / "tower", tower, "modelopt-w4a16-awq")))
    assert any("vLLM takes ModelOpt's `visual` as 16 bits" in message for message in levels(report, "error"))


def joined(*parts, names=("q_proj", "k_proj", "v_proj"), plain=(), format="compressed-tensors-fp8"):
    seen = {f"{ATTENTION}.{own}": look(weight, format) for own, weight in zip(names, parts, strict=False)}
    return mismatches(seen, {f"{ATTENTION}.{own}" for own in plain})


def by_tensor(scale, input_scale=1.0):
    values = torch.ones(8, 8).to(torch.float8_e4m3fn)
    return Fp8Weight(values, torch.tensor([[scale]]), "tensor", torch.tensor([input_scale]))


def with_order(order):
    w = int4()
    return Int4Weight(w.packed, w.scales, 128, 64, None, order)


def test_products_that_servers_join():
    assert not joined(*[int4()] * 3, format="awq")
    assert not joined(*[by_tensor(0.5)] * 3)
    (scale,) = joined(by_tensor(0.5), by_tensor(2.0), by_tensor(1.0))
    assert (scale.product, scale.breaks) == (f"{ATTENTION}.qkv_proj", False)
    assert "q_proj 0.5, k_proj 2.0, v_proj 1.0" in scale.reason
    assert "up to 4 times coarser" in scale.reason
    (inputs,) = joined(by_tensor(1.0), by_tensor(1.0, 2.0), by_tensor(1.0))
    assert "input_scale" in inputs.reason
    (some,) = joined(int4(), int4(), names=("q_proj", "k_proj"), plain=("v_proj",))
    assert some.breaks
    assert some.reason == "q_proj, k_proj quantised and v_proj not: all or none"
    (kinds,) = joined(int4(), int4(symmetric=False), int4(), format="awq")
    assert "of different schemes" in kinds.reason
    (sizes,) = joined(int4(), Int4Weight.quantize(small.linear(128, 128), group_size=32), int4(), format="awq")
    assert "groups of 32" in sizes.reason
    orders = [torch.arange(128).roll(shift).int() // 64 for shift in (1, 2, 1)]
    (order,) = joined(*map(with_order, orders), format="gptq")
    assert order.breaks
    assert "act-orders" in order.reason
    assert not joined(*[with_order(orders[0])] * 3, format="gptq")
    blocks = [Fp8Weight.quantize(small.linear(N, 128), granularity="block") for N in (256, 64, 64)]
    (seam,) = joined(*blocks)
    assert "blocks of 128 would reach over the seam (k_proj has 64 outputs)" in seam.reason
    assert not joined(blocks[0], blocks[0], blocks[1])  # the last may be short


def test_kernels_take_what_their_code_says():
    """4096 × 12288 takes all; the vision tower's 4304 takes none of four bits, and no DeepGEMM."""

    def takes(*shape, **rest):
        return {name for name, reason in eligible(Product(*shape, **rest)).items() if reason is None}

    assert takes(4096, 12288, kind="int4", group_size=128) == {"Marlin", "Machete"}
    assert takes(4096, 12288, kind="int4", group_size=128, activations="fp8") == {"Marlin", "Machete", "CUTLASS W4A8"}
    assert takes(4096, 12288, kind="int4", group_size=32) == {"Marlin"}
    assert takes(4160, 12288, kind="int4", group_size=64) == {"Marlin"}  # N % 64 alone
    assert takes(4096, 4160, kind="int4", group_size=64) == {"Machete"}  # K % 64 alone
    for shape in ((1152, 4304), (4304, 1152)):
        assert not takes(*shape, kind="int4", group_size=-1) - {"Machete"}
        assert takes(*shape, kind="fp8", granularity="block") == set()
        assert takes(*shape, kind="fp8") == {"CUTLASS fp8"}
        assert takes(*shape, kind="int8") == {"CUTLASS int8"}
    assert takes(1152, 4304, kind="int4", group_size=-1) == set()
    assert takes(192, 128, kind="fp8", granularity="block") == {"DeepGEMM"}
    assert takes(128, 128, kind="fp8", granularity="block") == {"DeepGEMM", "CUTLASS block fp8"}
    act_order = {"kind": "int4", "group_size": 128, "act_order": True, "ranks": 2}
    assert takes(4096, 4096, **act_order, splits_inputs=False) == {"Marlin", "Machete"}
    assert takes(4096, 4096, **act_order, splits_inputs=True) == set()
    assert takes(4096, 4096, **act_order, symmetric=False) == {"Machete"}


def test_tensor_parallelism_splits_inputs_or_outputs(tmp_path):
    """Groups of 64 over K = 128 come out even on two ranks and not on four; outputs are split for q, k and v."""
    folder = small.write(tmp_path / "model", text(), "awq")
    for ranks, down in ((1, None), (2, "K = 64 is no multiple of 128"), (4, "K = 32 is in no whole groups of 64")):
        products = {p.name.rpartition(".")[2]: p for p in inspect(open_checkpoint(folder), ranks=ranks).products}
        assert products["qkv_proj"].shape == (384 // ranks, 128)
        assert products["down_proj"].shape == (128, 128 // ranks)
        assert products["down_proj"].kernels["Marlin"] == down
        assert (products["qkv_proj"].kernels["Marlin"] is None) == (384 // ranks % 64 == 0)
    products = inspect(open_checkpoint(folder), ranks=3).products
    assert any("over 3 ranks does not come out even" in str(p.kernels["Marlin"]) for p in products)


def test_names():
    assert part_of("model.visual.merger.linear_fc1") == "merger"
    assert part_of("visual.blocks.3.attn.qkv") == "vision"
    assert part_of("model.language_model.layers.0.mlp.up_proj") == "text"
    assert part_of("lm_head") == "lm_head"
    assert set(PARTS) == {"text", "vision", "merger", "lm_head"}
    assert is_embedding("model.language_model.embed_tokens")
    assert is_embedding("model.visual.pos_embed")
    assert not is_embedding("lm_head")
    assert fused(["a.q_proj", "a.v_proj", "b.up_proj", "c"]) == {
        "a.qkv_proj": ("a.q_proj", "a.v_proj"),
        "b.gate_up_proj": ("b.up_proj",),
    }


def test_int8_and_old_files_of_their_own(tmp_path):
    weights = {f"{MLP}.down_proj": Int8Weight.quantize(small.linear(32, 48))}
    report = inspect(open_checkpoint(small.write(tmp_path / "int8", weights, "compressed-tensors-int8")))
    assert report.products[0].kernels == {"CUTLASS int8": None}
    folder = small.write(tmp_path / "old", text(), "gptq")
    quantization = small.config_of(folder)["quantization_config"]
    small.edit(folder, lambda config: config.pop("quantization_config"))
    (folder / "quantize_config.json").write_text("{}")
    kept = {key: quantization[key] for key in ("bits", "group_size", "desc_act", "sym")}
    small.edit(folder, lambda content: content.update(kept), "quantize_config.json")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.said_by == "quantize_config.json"
    assert inspect(checkpoint).ok
