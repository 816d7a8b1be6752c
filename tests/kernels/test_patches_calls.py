"""How a patched model is called: packed rows, the loss and what it returns, generation, autocast, hidden states."""

from __future__ import annotations

import copy
import inspect
from importlib import import_module

import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

import m4ov_kernels
from m4ov_kernels.patches import patch
from tests.kernels import tiny_models as tiny
from tests.kernels.numerics import assert_accurate
from tests.kernels.steps import assert_same, assert_same_step, in_float64, logits_of, step

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)


def pair(family="qwen3_vl", **options):
    plain = tiny.model(family, **{"layers": 2, **options})
    patched = copy.deepcopy(plain)
    patch(patched)
    return plain, patched


@FAMILIES
def test_samples_of_a_packed_row_do_not_see_each_other(family):
    _, patched = pair(family)
    parts = tiny.samples(patched)
    alone = torch.cat([logits_of(patched, tiny.packed(patched, [part])) for part in parts], 1)
    batch = tiny.packed(patched, parts)
    cu_seqlens, positions = tiny.cu_seqlens(parts), batch["position_ids"]
    others = {"cu_seq_lens_k": cu_seqlens, "max_length_q": 30, "max_length_k": 30}
    for options in (
        {},
        {"use_cache": False},
        {"cu_seq_lens_q": cu_seqlens},
        {"cu_seq_lens_q": cu_seqlens, **others},
        {"cu_seq_lens_q": cu_seqlens, "position_ids": positions[1:] if family in tiny.QWEN else positions},
        {"cu_seq_lens_q": cu_seqlens, "position_ids": None},
    ):
        assert_same(logits_of(patched, {**batch, **options}), alone)
    rows = {
        name: torch.cat([value, value], 1 if value.ndim == 3 and name == "position_ids" else 0)
        for name, value in batch.items()
    }
    assert_same(logits_of(patched, rows), torch.cat([alone, alone]))


@FAMILIES
def test_bad_packing_is_refused(family):
    _, patched = pair(family)
    parts = tiny.samples(patched)
    batch, bounds = tiny.packed(patched, parts), tiny.cu_seqlens(parts)
    with pytest.raises(ValueError, match=r"cu_seqlens\[\d+\] is \d+: expected \d+, the number of tokens"):
        patched(**batch, cu_seq_lens_q=bounds[:-1])
    with pytest.raises(ValueError, match="attention_mask must be None"):
        patched(**batch, cu_seq_lens_q=bounds, attention_mask=torch.ones_like(batch["input_ids"]))


@FAMILIES
def test_features_that_do_not_match_the_tokens_are_refused(family):
    _, patched = pair(family)
    batch = tiny.packed(patched, [tiny.sample(patched, 9)])
    count = int((batch["input_ids"] == tiny.IMAGE).sum())
    for tokens in (count - 1, count + 1):
        ids = batch["input_ids"].clone()
        if tokens < count:
            ids[ids == tiny.IMAGE] = torch.tensor([1, *[tiny.IMAGE] * tokens])
        else:
            ids[0, -1] = tiny.IMAGE
        with pytest.raises(ValueError, match=f"image tokens do not match: {count} features, {tokens} tokens"):
            patched(**{**batch, "input_ids": ids})


def test_positions_of_features_may_come_from_the_packing():
    _, patched = pair()
    parts = tiny.mixed_samples(patched)
    batch = tiny.packed(patched, parts)
    grids = {name: batch[name] for name in ("image_grid_thw", "video_grid_thw")}
    found = m4ov_kernels.vision_positions(batch["mm_token_type_ids"], tiny.cu_seqlens(parts), merge_size=2, **grids)
    positions = torch.cat([found.image, found.video])
    assert torch.equal(logits_of(patched, batch, vision_positions=positions), logits_of(patched, batch))


@FAMILIES
def test_features_may_come_from_before(family):
    plain, patched = pair(family)
    if "mm_encoder_outputs" not in inspect.signature(plain.forward).parameters:
        pytest.skip("this transformers takes no features")
    batch = tiny.packed(plain, tiny.samples(plain))
    results = []
    for model in (plain, patched):
        names = [name for name in ("image_grid_thw", "image_sizes", "batch_num_images") if name in batch]
        features = model.get_image_features(batch["pixel_values"], **{name: batch[name] for name in names})
        rest = {name: value for name, value in batch.items() if name not in ("pixel_values", "image_sizes")}
        rest.pop("batch_num_images", None)
        results.append(step(model, rest, mm_encoder_outputs={"image": features}, use_cache=False))
    assert_same_step(results[1], results[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_another_attention_under_the_other_operators(family, implementation):
    """Their fronts call whichever implementation the configuration names."""
    plain = tiny.model(family, layers=2, attention=implementation)
    patched = copy.deepcopy(plain)
    names = import_module(f"m4ov_kernels.patches.{family}").FAMILY.operators
    patch(patched, operators=set(names) - {"varlen_attention"})
    batch = tiny.padded(plain, tiny.mixed_samples(plain))
    assert_same_step(step(patched, batch), step(plain, batch), in_float64(plain, batch))


def test_a_loss_function_or_attention_chosen_after_the_patch_wins():
    plain, patched = pair()
    batch = tiny.packed(plain, tiny.samples(plain))
    for model in (plain, patched):
        model.loss_function = lambda logits, labels, **_: logits.float().square().mean()
        model.set_attn_implementation("eager")
    assert_same_step(step(patched, batch, use_cache=False), step(plain, batch, use_cache=False))


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
@FAMILIES
def test_num_items_in_batch_and_shift_labels_are_honoured(family, count):
    plain, patched = pair(family)
    batch = tiny.packed(plain, tiny.samples(plain))
    logits = plain(**{**batch, "labels": None}, use_cache=False).logits
    vocab_size, labels = logits.shape[-1], batch["labels"]
    expected = ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch=count)
    torch.testing.assert_close(patched(**batch, num_items_in_batch=count).loss, expected, rtol=1e-5, atol=0)
    shifted = torch.randint_like(labels, tiny.WORDS)
    expected = ForCausalLMLoss(logits, labels, vocab_size, shift_labels=shifted)
    torch.testing.assert_close(patched(**batch, shift_labels=shifted).loss, expected, rtol=1e-5, atol=0)
    valid = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(patched(**batch, num_valid=valid).loss, patched(**batch).loss)
    with pytest.raises(ValueError, match="labels do not fit hidden states"):
        patched(**batch, shift_labels=shifted[:, 1:])


@FAMILIES
def test_what_the_loss_returns(family):
    _, patched = pair(family)
    batch = tiny.packed(patched, tiny.samples(patched))
    outputs = patched(**batch)
    assert outputs.logits is None
    assert "logits" not in outputs
    as_tuple = patched(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs.loss)
    without = patched(**{**batch, "labels": None})
    assert without.loss is None
    assert without.logits.shape == (*batch["input_ids"].shape, tiny.VOCABULARY)
    ignored = patched(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert ignored.loss.isnan()  # as Hugging Face
    with pytest.raises(ValueError, match=r"target\[\d+\] is 320"):
        patched(**{**batch, "labels": batch["labels"].masked_fill(batch["labels"] >= 0, 320)})
    with torch.no_grad():
        assert patched(**{**batch, "labels": None}).logits is not None  # the error above left nothing behind
    evaluated = patched.eval()(**batch)
    assert evaluated.logits is not None
    assert_same(evaluated.loss, outputs.loss)


def test_positional_arguments():
    _, patched = pair()
    batch = tiny.packed(patched, [tiny.sample(patched, 9, [])])
    outputs = patched(batch["input_ids"], None, batch["position_ids"], None, None, batch["labels"])
    assert torch.equal(outputs.loss, patched(**batch).loss)


def test_the_experts_auxiliary_loss_is_kept():
    plain, patched = pair("qwen3_vl_moe", router_aux_loss_coef=0.5)
    batch = tiny.packed(plain, tiny.samples(plain))
    options = {"use_cache": False, "output_router_logits": True}
    expected = step(plain, batch, **options)
    assert_same_step(step(patched, batch, **options), expected, in_float64(plain, batch, **options))
    assert float(patched(**batch, **options).loss) > float(patched(**batch, use_cache=False).loss)


@FAMILIES
def test_generate_gives_the_same_tokens(family):
    plain, patched = pair(family)
    sample = tiny.sample(plain, 12, [(4, 8)])
    batch = tiny.packed(plain, [sample])
    prompt = {name: value for name, value in batch.items() if name not in ("labels", "position_ids")}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = [model.eval().generate(**prompt, **options) for model in (plain, patched)]
    assert torch.equal(*tokens)
    batch = tiny.packed(plain, tiny.samples(plain))  # nothing of the generation is left
    expected = step(plain, batch, use_cache=False)
    assert_same_step(step(patched, batch), expected, in_float64(plain, batch, use_cache=False))


@FAMILIES
def test_the_cache_gives_the_logits_of_the_whole_row(family):
    plain, patched = pair(family)
    sample = tiny.sample(plain, 12, [(4, 8)])
    batch = {**tiny.packed(plain, [sample]), "labels": None}
    whole = logits_of(patched, batch, use_cache=False)
    size = batch["input_ids"].shape[1] - 4
    names = ("input_ids", "mm_token_type_ids")
    first = {name: value[:, :size] if name in names else value for name, value in batch.items()}
    first["position_ids"] = batch["position_ids"][..., :size]
    if family in tiny.QWEN:
        first["position_ids"] = first["position_ids"][1:]
    with torch.no_grad():
        outputs = patched(**first, use_cache=True)
        logits = [outputs.logits]
        for index in range(size, size + 4):
            cache = outputs["cache"] if "cache" in outputs else outputs["past_key_values"]
            positions = batch["position_ids"][..., index : index + 1]
            outputs = patched(
                input_ids=batch["input_ids"][:, index : index + 1],
                position_ids=positions[1:] if family in tiny.QWEN else positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(outputs.logits)
    assert_same(torch.cat(logits, 1), whole)


@FAMILIES
def test_output_hidden_states(family):
    plain, patched = pair(family, layers=3)
    batch = tiny.packed(plain, tiny.samples(plain))
    expected, ours = (
        model(**batch, use_cache=False, output_hidden_states=True).hidden_states for model in (plain, patched)
    )
    assert len(ours) == len(expected) == 4
    for a, b in zip(ours, expected, strict=True):
        assert_same(a, b)


def test_dropout_of_probabilities_is_kept():
    _, patched = pair()
    parts = tiny.samples(patched)
    batch = tiny.packed(patched, parts)
    kept = patched(**batch).loss
    assert torch.equal(kept, patched(**batch).loss)
    for layer in patched.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    dropped = [patched(**batch).loss for _ in range(2)]
    assert not torch.equal(*dropped)
    assert not torch.equal(dropped[0], kept)
    text = {"input_ids": batch["input_ids"] % tiny.WORDS, "labels": batch["labels"]}
    assert not torch.equal(patched(**text).loss, patched(**text).loss)
    patched.eval()
    assert torch.equal(logits_of(patched, batch), logits_of(patched, batch))


@FAMILIES
def test_autocast_with_float32_weights(family):
    plain, patched = pair(family, **({"mlp_only_layers": [0, 1]} if family == "qwen3_vl_moe" else {}))
    batch = tiny.packed(plain, tiny.samples(plain))
    exact = step(plain, batch, use_cache=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = step(plain, batch, use_cache=False)
        ours = step(patched, batch, use_cache=False)
    assert_accurate("loss", ours[0].bfloat16(), theirs[0].bfloat16(), exact[0].double())
    for name, gradient in ours[1].items():
        assert gradient.dtype is torch.float32, name
    together = [
        torch.cat([(grads[name] / exact[1][name].abs().max()).flatten() for name in exact[1] if "k_proj.b" not in name])
        for _, grads in (ours, theirs, exact)
    ]
    assert_accurate("gradients", together[0].bfloat16(), together[1].bfloat16(), together[2].double())


def test_cross_entropy_is_what_hugging_face_computes():
    """The yardstick itself: Hugging Face's loss on packed labels is the mean over labelled tokens."""
    plain = tiny.model(layers=1)
    batch = tiny.packed(plain, tiny.samples(plain))
    outputs = plain(**batch, use_cache=False)
    labels = batch["labels"][:, 1:].flatten()
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels))
