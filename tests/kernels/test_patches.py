"""Putting the patches on and taking them off; on every supported transformers by `make test-transformers`.

That a patched model computes the same stands in ``test_patches_parity.py``, how it is called in
``test_patches_calls.py``, how it trains in ``test_patches_training.py``.
"""

from __future__ import annotations

import copy
import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from m4ov_kernels import patches
from m4ov_kernels.patches import SUPPORTED, patch, unpatch
from tests.kernels import tiny_models as tiny
from tests.kernels.steps import assert_same_step, in_float64, logits_of, step

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)
OPERATORS = {module.rsplit(".")[-1]: import_module(module).FAMILY.operators for module in SUPPORTED.values()}


def snapshot(model) -> dict[str, object]:
    """Classes, attributes, hooks and settings, all of them."""
    seen: dict[str, object] = {"loss_function": model.loss_function}
    for path, module in model.named_modules():
        hooks = {name: dict(value) for name, value in vars(module).items() if name.endswith("_hooks")}
        seen[path] = (type(module), sorted(vars(module)), hooks, len(module._forward_pre_hooks_with_kwargs))
    for name, config in (("text", model.config.text_config), ("vision", model.config.vision_config)):
        seen[f"config {name}"] = config.to_dict(), config._attn_implementation
    seen["config"] = model.config.to_dict(), model.config._attn_implementation
    return seen


def assert_same_bits(ours, theirs) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())


@FAMILIES
def test_the_report_lists_what_was_replaced(family):
    model = tiny.model(family)
    report = patch(model)
    assert {entry.operator for entry in report} == set(OPERATORS[family])
    assert not report.already
    assert not report.skipped
    texts = [module for module in model.model.language_model.modules() if hasattr(module, "variance_epsilon")]
    entries = [entry for entry in report if entry.operator == "rms_norm" and "language_model" in entry.path]
    assert len(entries) == len(texts) + 3  # and the decoder layers
    assert "model.language_model.layers.0.mlp" in {entry.path for entry in report if entry.operator == "swiglu"}
    assert f"× {entries[-1].was} → m4ov_kernels.RMSNorm" in str(report)


@FAMILIES
def test_patching_twice_changes_nothing_more(family):
    model = tiny.model(family, layers=2)
    batch = tiny.packed(model, tiny.samples(model))
    step(model, batch)  # transformers puts hooks of its own on modules in a first call
    first = patch(model)
    before, expected = snapshot(model), step(model, batch)
    second = patch(model)
    assert len(second) == 0
    assert set(second.already) == set(first.replaced)
    assert snapshot(model) == before
    assert_same_bits(step(model, batch), expected)


# LLaVA-OneVision cannot be pickled after a call, patched or not: transformers puts local functions on it.
@pytest.mark.parametrize(
    ("family", "how"),
    [(family, how) for family in tiny.FAMILIES for how in ("itself", "a copy")]
    + [(family, "a pickled copy") for family in tiny.QWEN],
)
def test_unpatch_restores_the_bits_and_leaves_nothing(family, how):
    model = tiny.model(family, layers=2)
    batch = tiny.packed(model, tiny.samples(model))
    expected = step(model, batch, use_cache=False)
    before = snapshot(model)
    patch(model)
    patched = step(model, batch)
    if how == "a copy":
        model = copy.deepcopy(model)
    elif how == "a pickled copy":
        model = pickle.loads(pickle.dumps(model))
    assert_same_bits(step(model, batch), patched)
    report = unpatch(model)
    assert len(report) == len(patch(copy.deepcopy(model)))
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []
    assert_same_bits(step(model, batch, use_cache=False), expected)
    assert len(unpatch(model)) == 0


@pytest.mark.parametrize(
    ("family", "operator"), [(family, operator) for family in tiny.FAMILIES for operator in OPERATORS[family]]
)
def test_each_operator_alone(family, operator):
    """And the others put in afterwards."""
    plain = tiny.model(family, layers=2 if family == "qwen3_vl_moe" else 1)  # a dense layer and experts
    patched = copy.deepcopy(plain)
    report = patch(patched, operators=[operator])
    assert {entry.operator for entry in report} == {operator}
    assert {name for name, _ in report.skipped} == set(OPERATORS[family]) - {operator}
    batch = tiny.packed(plain, tiny.samples(plain))
    expected = step(plain, batch, use_cache=False)
    exact = in_float64(plain, batch, use_cache=False)
    assert_same_step(step(patched, batch, use_cache=False), expected, exact)
    assert {entry.operator for entry in patch(patched)} == set(OPERATORS[family]) - {operator}
    unpatch(patched)
    assert_same_bits(step(patched, batch, use_cache=False), expected)


def test_no_operators_leave_the_model_as_it_is():
    model = tiny.model(layers=1)
    before = snapshot(model)
    assert len(patch(model, operators=())) == 0
    assert snapshot(model) == before


def test_what_cannot_be_patched_is_refused():
    plain = tiny.model(layers=1)
    with pytest.raises(ValueError, match=r"'norm', 'rmsnorm' does not serve Qwen3-VL; those that do are rms_norm, .*"):
        patch(plain, operators={"rmsnorm", "norm", "swiglu"})
    with pytest.raises(TypeError, match="must be a collection of names; got the string 'swiglu'"):
        patch(plain, operators="swiglu")
    with pytest.raises(
        TypeError, match=r"supported: Qwen3VLForConditionalGeneration, .* \(the whole model, not its \.model"
    ):
        patch(plain.model)
    with pytest.raises(TypeError, match="supported: Qwen3VLForConditionalGeneration"):
        unpatch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch.nn.Module; got str"):
        patch("model")
    with pytest.raises(ValueError, match="holds 2 supported models"):
        patch(nn.ModuleList([plain, copy.deepcopy(plain)]))
    taken = copy.deepcopy(plain)
    taken.model.language_model.norm.forward = taken.model.language_model.norm.forward
    before = snapshot(taken)
    with pytest.raises(ValueError, match=r"forward of model.language_model.norm was replaced by something else"):
        patch(taken)
    assert snapshot(taken) == before
    changed = copy.deepcopy(plain)
    norm = changed.model.language_model.norm
    norm.__class__ = type("Mine", (type(norm),), {})
    with pytest.raises(ValueError, match=r"model.language_model.norm is a Mine; patch before"):
        patch(changed)


def test_a_model_inside_a_wrapper_is_found():
    plain = tiny.model(layers=1)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = plain

    assert len(patch(Wrapper())) == len(unpatch(plain))


@FAMILIES
def test_what_a_user_chose_is_left_and_reported(family):
    model = tiny.model(family, attention="eager", layers=2)
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean()  # nothing cancels
    plain = copy.deepcopy(model)
    plain.loss_function = model.loss_function
    report = patch(model)
    assert {name for name, _ in report.skipped} == {
        "linear_cross_entropy",
        "varlen_attention of text_config",
        "varlen_attention of vision_config",
    }
    batch = tiny.padded(model, tiny.samples(model))
    assert_same_step(step(model, batch), step(plain, batch), in_float64(plain, batch))
    unpatch(model)
    assert model.loss_function is plain.loss_function
    assert model.config.text_config._attn_implementation == "eager"


def test_what_the_operators_do_not_compute_is_left_and_reported():
    model = tiny.model("qwen2_5_vl", layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    plain = copy.deepcopy(model)
    skipped = dict(patch(model).skipped)
    assert skipped == {"varlen_attention of text_config": "some layers attend within a sliding window"}
    batch = tiny.padded(model, tiny.samples(model))
    assert_same_step(step(model, batch), step(plain, batch), in_float64(plain, batch))
    model = tiny.model(layers=2, hidden_act="gelu")
    plain = copy.deepcopy(model)
    assert dict(patch(model).skipped) == {"swiglu": "its activation is GELUActivation, not silu"}
    batch = tiny.padded(model, tiny.samples(model))
    assert_same_step(step(model, batch), step(plain, batch), in_float64(plain, batch))


@FAMILIES
def test_saved_files_are_the_same(family, tmp_path):
    plain = tiny.model(family, layers=2)
    batch = tiny.padded(plain, tiny.samples(plain))
    patched = copy.deepcopy(plain)
    patch(patched)
    plain.save_pretrained(tmp_path / "plain")
    patched.save_pretrained(tmp_path / "patched")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes(), file
    loaded = type(plain).from_pretrained(tmp_path / "patched")
    assert type(loaded) is type(plain)
    assert torch.equal(logits_of(loaded, batch), logits_of(plain, batch))
    patch(loaded)
    assert torch.equal(logits_of(loaded, batch), logits_of(patched, batch))


@FAMILIES
def test_the_table_in_the_documentation_is_true(family):
    """Against what the patch of a model reports."""
    model = tiny.model(family)
    replaced: dict[str, list[str]] = {}
    for entry in patch(model):
        names = replaced.setdefault(entry.operator, [])
        if f"`{entry.was.split('.')[-1]}`" not in names:
            names.append(f"`{entry.was.split('.')[-1]}`")
    name = import_module(f"m4ov_kernels.patches.{family}").FAMILY.name
    header, *rows = _table()
    documented = {row[0].strip("`"): row[header.index(name)] for row in rows}
    made = {operator: ", ".join(sorted(replaced.get(operator, []))) or "–" for operator in documented}
    assert documented == made
    assert replaced.keys() <= documented.keys()


def _table() -> list[list[str]]:
    readme = Path(patches.__file__).with_name("README.md").read_text()
    lines = [line for line in readme.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
