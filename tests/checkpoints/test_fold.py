"""ModelOpt's pre_quant_scale, folded: the model computes the same, as transformers computes it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import Tensor

from m4ov.checkpoints import Options, convert, open_checkpoint, verify
from m4ov.models.sharded import WeightsError
from m4ov_kernels.gemm.weights import Int4Weight
from m4ov_kernels.gemm.weights.bits import same
from tests.checkpoints import small

HEADS, SHARED, HEAD_DIM, WIDTH, INNER = 4, 2, 16, 64, 96


def llama():
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=SHARED,
        head_dim=HEAD_DIM,
        attention_bias=True,
        architectures=["LlamaForCausalLM"],
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if "bias" in name else parameter.shape[-1] ** -0.5)
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def scale(features: int) -> Tensor:
    return (torch.rand(features) * 3 + 0.25).float()


def write(folder, model, *, heads_alike=True):
    """As ModelOpt exports it where no norm has taken the scales: q, k, v have one, gate and up have one."""
    quantised, plain, scales = {}, {}, {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if not module.endswith("_proj") or leaf != "weight":
            plain[name] = parameter.detach()
            continue
        own, above = module.rpartition(".")[2], module.rpartition(".")[0]
        if own == "o_proj":
            shared = scale(SHARED * HEAD_DIM).view(SHARED, 1, HEAD_DIM).expand(-1, HEADS // SHARED, -1).flatten()
            found = shared if heads_alike else scale(HEADS * HEAD_DIM)
        elif own == "down_proj":
            found = scale(INNER)
        else:
            found = scales.setdefault(above, scale(WIDTH))
        w = Int4Weight.quantize(parameter.detach() / found, group_size=32)
        quantised[module] = Int4Weight(w.packed, w.scales, w.in_features, 32, None, None, found)
    config = json.loads(model.config.to_json_string(use_diff=False))
    return small.write(folder, quantised, "modelopt-w4a16-awq", plain, **config)


def logits(folder, tmp_path, name):
    """Of the dequantised checkpoint, in transformers' class."""
    convert(open_checkpoint(folder), Options(tmp_path / name, "plain", dtype=torch.float32))
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    with torch.no_grad():
        return found(torch.arange(24).view(2, 12) % 40).logits


@pytest.mark.parametrize("target", ["compressed-tensors-int4", "awq", "gptq"])
def test_a_folded_checkpoint_computes_the_same(target, tmp_path):
    torch.manual_seed(3)
    source = write(tmp_path / "source", llama())
    halves = {} if target == "compressed-tensors-int4" else {"scale_dtype": torch.float16}
    result = convert(open_checkpoint(source), Options(tmp_path / "out", target, **halves))
    assert len(result.notes) == 1
    assert "pre_quant_scale of 14 weights is folded" in result.notes[0]
    assert not result.plain
    bound = 2**-10 if halves else 2**-23
    assert result.rounded
    assert max(result.rounded.values()) <= bound
    before, after = logits(source, tmp_path, "before"), logits(tmp_path / "out", tmp_path, "after")
    off = float((after - before).norm() / before.norm())
    assert off < (2e-3 if halves else 2e-6), off
    assert float(before.std()) > 0.1
    # Codes are as they were; verify folds by itself, and either way round.
    ours, theirs = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert all(same(ours.read(name).codes(), theirs.read(name).codes()) for name in ours.modules)
    assert all(theirs.read(name).pre_quant_scale is None for name in theirs.modules)
    for sides in ((ours, theirs), (theirs, ours)):
        comparison = verify(*sides)
        assert comparison.ok, [row for row in comparison.rows if row.verdict not in ("same", "equal", "rounded")]
        assert all((row.error or 0) <= bound for row in comparison.rows)
        assert "is folded here" in comparison.notes[0]


def test_without_folding_it_would_compute_something_else(tmp_path):
    """The control: scales that are merely dropped."""
    torch.manual_seed(3)
    source = write(tmp_path / "source", llama())
    before = logits(source, tmp_path, "before")
    tensors = {key: value for key, value in small.load(source).items() if not key.endswith("pre_quant_scale")}
    small.store(source, tensors)
    off = logits(source, tmp_path, "dropped") - before
    assert float(off.norm() / before.norm()) > 0.1


def test_heads_that_share_values_and_differ_are_named_or_dequantised(tmp_path):
    torch.manual_seed(4)
    source = write(tmp_path / "source", llama(), heads_alike=False)
    with pytest.raises(
        WeightsError, match=r"2 of 14 weights .*o_proj: .*\(heads that share values of \S+v_proj have diff"
    ):
        convert(open_checkpoint(source), Options(tmp_path / "out", "compressed-tensors-int4"))
    options = Options(tmp_path / "out", "compressed-tensors-int4", unfit="plain", dtype=torch.float32)
    result = convert(open_checkpoint(source), options)
    assert {name.rpartition(".")[2] for name in result.plain} == {"o_proj"}
    before, after = logits(source, tmp_path, "before"), logits(tmp_path / "out", tmp_path, "after")
    assert float((after - before).norm() / before.norm()) < 2e-6
    assert verify(open_checkpoint(source), open_checkpoint(tmp_path / "out")).ok


def changed(folder, change):
    tensors = small.load(folder)
    change(tensors)
    small.store(folder, tensors)
    return open_checkpoint(folder)


LAYER = "model.layers.1"
STUCK = {
    "another scale": (
        lambda t: t[f"{LAYER}.self_attn.k_proj.pre_quant_scale"].mul_(2),
        r"3 of 14 .*k_proj reads the same input and has another pre_quant_scale than \S+q_proj",
    ),
    "a sibling without": (
        lambda t: t.pop(f"{LAYER}.mlp.up_proj.pre_quant_scale"),
        r"1 of 14 .*gate_proj: .*\(\S+up_proj reads the same input and has no pre_quant_scale",
    ),
    "no norm": (
        lambda t: t.pop(f"{LAYER}.input_layernorm.weight"),
        r"3 of 14 .*\(there is no \S+input_layernorm.weight",
    ),
    "past the end": (
        lambda t: (
            t[f"{LAYER}.mlp.down_proj.pre_quant_scale"].fill_(3e38),
            t[f"{LAYER}.mlp.up_proj.weight_scale"].fill_(9),
        ),
        r"up_proj: times its pre_quant_scale it is past the end of float32",
    ),
}


@pytest.mark.parametrize("case", STUCK)
def test_what_cannot_be_folded_is_named(case, tmp_path):
    torch.manual_seed(5)
    change, message = STUCK[case]
    checkpoint = changed(write(tmp_path / "source", llama()), change)
    with pytest.raises(WeightsError, match=message):
        convert(checkpoint, Options(tmp_path / "out", "compressed-tensors-int4"))
    assert not (tmp_path / "out").exists()


def test_a_norm_that_adds_one_takes_no_scale(tmp_path):
    torch.manual_seed(6)
    source = write(tmp_path / "source", llama())
    small.edit(source, lambda config: config.update(model_type="gemma3_text"))
    with pytest.raises(WeightsError, match="its norm multiplies by 1"):
        convert(open_checkpoint(source), Options(tmp_path / "out", "awq"))
