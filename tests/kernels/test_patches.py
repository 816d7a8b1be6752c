"""The Qwen3-VL patch against Hugging Face's own model; on every supported transformers by `make test-transformers`."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

import m4ov_kernels
from m4ov_kernels.patches import patch, unpatch
from tests.kernels import tiny_qwen3_vl as tiny
from tests.kernels.numerics import assert_accurate

GROUPS = ("norm", "mlp", "loss", "patch_embed", "attention")


@pytest.fixture
def plain():
    return tiny.model()


@pytest.fixture
def patched(plain):
    other = copy.deepcopy(plain)
    patch(other)
    return other


@pytest.fixture
def parts(plain):
    return tiny.samples(plain)


def step(model, batch, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one call in training mode, and every parameter's gradient."""
    model.train()
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_step(ours, theirs, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    for name, expected in theirs[1].items():
        error = float((ours[1][name] - expected).abs().max())
        # A gradient that is nothing but rounding (the key bias: softmax ignores it) is judged by the largest of all.
        allowed = tolerance * max(float(expected.abs().max()), 1e-2 * largest)
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


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


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("layout", [tiny.packed, tiny.padded])
def test_a_step_equals_hugging_face(plain, patched, parts, layout, backend):
    batch = layout(parts)
    expected = step(plain, batch, use_cache=False)
    with m4ov_kernels.backend(backend):
        assert_same_step(step(patched, batch, use_cache=False), expected)


@pytest.mark.parametrize("layout", [tiny.packed, tiny.padded])
def test_logits_in_eval_mode_equal_hugging_face(plain, patched, parts, layout):
    batch = layout(parts)
    for model in (plain, patched):
        model.eval()
    with torch.no_grad():
        expected, ours = plain(**batch, use_cache=False), patched(**batch, use_cache=False)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=2e-5, atol=0)
    assert type(ours) is type(expected)


@pytest.mark.parametrize("layout", [tiny.packed, tiny.padded])
def test_bf16_keeps_the_numerics_rule(plain, parts, layout):
    """Judged on all gradients together, each scaled to its largest value: few elements make no statistics."""
    batch = layout(parts)
    exact = step(copy.deepcopy(plain).double(), as_dtype(batch, torch.float64), use_cache=False)
    low = plain.to(torch.bfloat16)
    ours = copy.deepcopy(low)
    patch(ours)
    batch = as_dtype(batch, torch.bfloat16)
    reference, result = step(low, batch, use_cache=False), step(ours, batch, use_cache=False)
    # float32, but of bf16 hidden states: bf16's rounding is what the rule should allow for.
    assert_accurate("loss", result[0].bfloat16(), reference[0].bfloat16(), exact[0])
    scales = {name: 1 / gradient.abs().max() for name, gradient in exact[1].items() if "k_proj.bias" not in name}

    def together(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([(gradients[name].double() * scale).flatten() for name, scale in scales.items()])

    assert_accurate("gradients", together(result[1]).bfloat16(), together(reference[1]).bfloat16(), together(exact[1]))


def as_dtype(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def test_the_report_lists_what_was_replaced(plain):
    report = patch(plain)
    assert {entry.group for entry in report} == set(GROUPS)
    norms = 3 * 4 + 1  # input, post-attention, q and k in each layer; the last one
    assert sum(entry.was == "transformers.Qwen3VLTextRMSNorm" for entry in report) == norms
    assert "model.language_model.layers.2.mlp" in {entry.path for entry in report}
    assert f"{norms} × transformers.Qwen3VLTextRMSNorm → m4ov_kernels.Qwen3VLTextRMSNorm" in str(report)
    assert not report.already
    assert not report.skipped


def test_patching_twice_changes_nothing_more(plain, parts):
    first = patch(plain)
    before, expected = snapshot(plain), step(plain, tiny.packed(parts))
    second = patch(plain)
    assert len(second) == 0
    assert set(second.already) == set(first.replaced)
    assert snapshot(plain) == before
    result = step(plain, tiny.packed(parts))
    assert torch.equal(result[0], expected[0])
    assert all(torch.equal(result[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("how", ["itself", "a copy", "a pickled copy"])
def test_unpatch_restores_the_bits_and_leaves_nothing(plain, parts, how):
    batch = tiny.packed(parts)
    before, expected = snapshot(plain), step(plain, batch, use_cache=False)
    patch(plain)
    step(plain, batch)
    model = {"itself": lambda: plain, "a copy": lambda: copy.deepcopy(plain)}.get(
        how, lambda: pickle.loads(pickle.dumps(plain))
    )()
    report = unpatch(model)
    assert len(report) == len(patch(copy.deepcopy(model)))
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []
    result = step(model, batch, use_cache=False)
    assert torch.equal(result[0], expected[0])
    assert all(torch.equal(result[1][name], gradient) for name, gradient in expected[1].items())
    assert len(unpatch(model)) == 0


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_that_is_switched_off_stays(plain, parts, group):
    other = copy.deepcopy(plain)
    report = patch(other, **{group: False})
    assert {entry.group for entry in report} == set(GROUPS) - {group}
    assert (group, "switched off") in report.skipped
    batch = tiny.packed(parts)
    assert_same_step(step(other, batch, use_cache=False), step(plain, batch, use_cache=False))
    assert {entry.group for entry in patch(other)} == {group}


def test_what_cannot_be_patched_is_refused(plain):
    with pytest.raises(TypeError, match=r"'norms'.*norm, mlp, loss, patch_embed, attention"):
        patch(plain, norms=False)
    with pytest.raises(
        TypeError, match=r"supported: Qwen3VLForConditionalGeneration \(the whole model, not its \.model"
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


def test_a_model_inside_a_wrapper_is_found(plain):
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = plain

    assert len(patch(Wrapper())) == len(unpatch(plain))


def test_what_a_user_chose_is_left_and_reported(parts):
    eager = tiny.model(attention="eager")
    eager.loss_function = lambda logits, labels, **_: logits.float().mean()
    plain = copy.deepcopy(eager)
    plain.loss_function = eager.loss_function
    report = patch(eager)
    assert {name for name, _ in report.skipped} == {"loss", "attention of text_config", "attention of vision_config"}
    batch = tiny.padded(parts)
    assert_same_step(step(eager, batch), step(plain, batch))
    unpatch(eager)
    assert eager.loss_function is plain.loss_function
    assert eager.config.text_config._attn_implementation == "eager"


def test_a_loss_function_or_attention_chosen_after_the_patch_wins(plain, patched, parts):
    batch = tiny.packed(parts)
    for model in (plain, patched):
        model.loss_function = lambda logits, labels, **_: logits.float().square().mean()
        model.set_attn_implementation("eager")
    assert_same_step(step(patched, batch, use_cache=False), step(plain, batch, use_cache=False))


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_num_items_in_batch_and_shift_labels_are_honoured(plain, patched, parts, count):
    batch = tiny.packed(parts)
    logits = plain(**{**batch, "labels": None}, use_cache=False).logits
    vocab_size, labels = logits.shape[-1], batch["labels"]
    expected = ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch=count)
    torch.testing.assert_close(patched(**batch, num_items_in_batch=count).loss, expected, rtol=2e-5, atol=0)
    shifted = torch.randint_like(labels, tiny.WORDS)
    expected = ForCausalLMLoss(logits, labels, vocab_size, shift_labels=shifted)
    torch.testing.assert_close(patched(**batch, shift_labels=shifted).loss, expected, rtol=2e-5, atol=0)
    valid = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(patched(**batch, num_valid=valid).loss, patched(**batch).loss)
    with pytest.raises(ValueError, match="labels do not fit hidden states"):
        patched(**batch, shift_labels=shifted[:, 1:])


def test_what_the_loss_returns(patched, parts):
    batch = tiny.packed(parts)
    outputs = patched(**batch)
    assert outputs.logits is None
    assert "logits" not in outputs
    as_tuple = patched(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs.loss)
    positional = patched(batch["input_ids"], None, batch["position_ids"], None, None, batch["labels"])
    assert positional.loss.ndim == 0
    without = patched(**{**batch, "labels": None})
    assert without.loss is None
    assert without.logits.shape == (*batch["input_ids"].shape, 320)
    ignored = patched(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert ignored.loss.isnan()  # as Hugging Face
    with pytest.raises(ValueError, match=r"target\[\d+\] is 320"):
        patched(**{**batch, "labels": batch["labels"].masked_fill(batch["labels"] >= 0, 320)})
    with torch.no_grad():
        assert patched(**{**batch, "labels": None}).logits is not None  # the error above left nothing behind


def test_samples_of_a_packed_row_do_not_see_each_other(patched, parts):
    alone = torch.cat([logits_of(patched, tiny.packed([part])) for part in parts], 1)
    batch = tiny.packed(parts)
    bounds, cu_seqlens = batch["position_ids"], tiny.cu_seqlens(parts)
    for options in (
        {},
        {"use_cache": False},
        {"cu_seq_lens_q": cu_seqlens},
        {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 30, "max_length_k": 30},
        {"cu_seq_lens_q": cu_seqlens, "position_ids": bounds[1:]},
        {"cu_seq_lens_q": cu_seqlens, "position_ids": None},
    ):
        logits = logits_of(patched, {**batch, **options})
        torch.testing.assert_close(logits, alone, rtol=0, atol=5e-5, msg=lambda m, o=tuple(options): f"{o}: {m}")
    rows = {name: torch.cat([value, value], 1 if name == "position_ids" else 0) for name, value in batch.items()}
    torch.testing.assert_close(logits_of(patched, rows), torch.cat([alone, alone]), rtol=0, atol=5e-5)


def logits_of(model, batch) -> Tensor:
    return model.eval()(**{**batch, "labels": None}).logits.detach()


def test_bad_packing_is_refused(patched, parts):
    batch, bounds = tiny.packed(parts), tiny.cu_seqlens(parts)
    with pytest.raises(ValueError, match=r"cu_seqlens\[\d+\] is \d+: expected \d+, the number of tokens"):
        patched(**batch, cu_seq_lens_q=bounds[:-1])
    with pytest.raises(ValueError, match="attention_mask must be None"):
        patched(**batch, cu_seq_lens_q=bounds, attention_mask=torch.ones_like(batch["input_ids"]))


def test_videos(plain, patched):
    part = tiny.sample(plain, 8, 4, 8, frames=3)
    batch = tiny.packed([part])
    batch |= {"pixel_values_videos": batch.pop("pixel_values"), "video_grid_thw": batch.pop("image_grid_thw")}
    assert_same_step(step(patched, batch), step(plain, batch))


def test_text_alone(plain, patched):
    input_ids = torch.randint(tiny.WORDS, (2, 19))
    batch = {"input_ids": input_ids, "labels": input_ids}
    expected = step(plain, {**batch, "attention_mask": torch.ones_like(input_ids)})
    ours = step(patched, batch)
    assert_same_step(with_gradients(ours), with_gradients(expected))


def test_dropout_of_probabilities_is_kept(patched, parts):
    batch = tiny.packed(parts)
    patched.train()
    kept = patched(**batch).loss
    assert torch.equal(kept, patched(**batch).loss)
    for layer in patched.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    dropped = [patched(**batch).loss for _ in range(2)]
    assert not torch.equal(*dropped)
    assert not torch.equal(dropped[0], kept)
    alone = {name: torch.cat([value, value], 1 if name == "position_ids" else 0) for name, value in batch.items()}
    assert patched(**alone).loss.isfinite()
    text = {"input_ids": batch["input_ids"] % tiny.WORDS, "labels": batch["labels"]}
    assert not torch.equal(patched(**text).loss, patched(**text).loss)
    patched.eval()
    assert torch.equal(logits_of(patched, batch), logits_of(patched, batch))


def test_generate_gives_the_same_tokens(plain, patched, parts):
    for part in parts[:2]:
        batch = tiny.packed([part])
        prompt = {name: batch[name] for name in ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")}
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        tokens = [model.eval().generate(**prompt, **options) for model in (plain, patched)]
        assert torch.equal(*tokens)
    assert_same_step(step(patched, tiny.packed(parts)), step(plain, tiny.packed(parts), use_cache=False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(plain, patched, parts, reentrant):
    batch = tiny.packed(parts)
    expected = step(plain, batch, use_cache=False)
    calls = []
    patched.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        patched.enable_input_require_grads()
    assert_same_step(step(patched, batch), expected)
    assert len(calls) == 2  # once more in the backward


def test_tied_embeddings(parts):
    plain = tiny.model(tie=True)
    other = copy.deepcopy(plain)
    patch(other)
    assert other.lm_head.weight is other.model.language_model.embed_tokens.weight
    assert_same_step(step(other, tiny.packed(parts)), step(plain, tiny.packed(parts), use_cache=False))


def test_output_hidden_states(plain, patched, parts):
    batch = tiny.packed(parts)
    expected = plain(**batch, use_cache=False, output_hidden_states=True).hidden_states
    ours = patched(**batch, use_cache=False, output_hidden_states=True).hidden_states
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_autocast_with_float32_weights(plain, patched, parts):
    batch = tiny.packed(parts)
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


def test_torch_compile():
    """Text in packed rows. (With images transformers itself breaks the graph a dozen times: a minute of compiling.)"""
    plain = tiny.model(num_hidden_layers=1)
    patched = copy.deepcopy(plain)
    patch(patched)
    parts = tiny.samples(plain)
    batch = {name: tiny.packed(parts)[name] for name in ("input_ids", "position_ids", "labels")}
    compiled = torch.compile(patched, backend="aot_eager")
    ours = step(compiled, batch, use_cache=False, cu_seq_lens_q=tiny.cu_seqlens(parts))
    expected = step(plain, batch, use_cache=False)
    assert_same_step(with_gradients(ours), prefixed(with_gradients(expected)))
    torch.compiler.reset()


def with_gradients(result):
    return result[0], {name: gradient for name, gradient in result[1].items() if gradient is not None}


def prefixed(result):
    return result[0], {f"_orig_mod.{name}": gradient for name, gradient in result[1].items()}


def test_saved_files_are_the_same(plain, patched, parts, tmp_path):
    plain.save_pretrained(tmp_path / "plain")
    patched.save_pretrained(tmp_path / "patched")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes(), file
    loaded = type(plain).from_pretrained(tmp_path / "patched")
    assert type(loaded) is type(plain)
    assert torch.equal(logits_of(loaded, tiny.padded(parts)), logits_of(plain, tiny.padded(parts)))
    patch(loaded)
    assert torch.equal(logits_of(loaded, tiny.padded(parts)), logits_of(patched, tiny.padded(parts)))


def test_fully_sharded(plain, parts, tmp_path):
    """Two ranks, one thread each: every parameter's gradient as on one."""
    batch = tiny.packed(parts)
    expected = step(plain, batch, use_cache=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.save((plain.state_dict(), batch), tmp_path / "inputs.pt")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "transformers", __name__])
    ranks = [context.Process(target=_sharded_rank, args=(rank, port, tmp_path), daemon=True) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
        assert rank.exitcode == 0
    loss, gradients, refused = torch.load(tmp_path / "outputs.pt")
    assert_same_step((loss, gradients), expected)
    assert "before fully_shard" in refused


def _sharded_rank(rank: int, port: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    state, batch = torch.load(folder / "inputs.pt")
    model = tiny.model()
    model.load_state_dict(state)
    patch(model)
    for part in (*model.model.language_model.layers, *model.model.visual.blocks, model.lm_head, model):
        fully_shard(part)
    loss, gradients = step(model, batch)
    gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    try:
        unpatch(model)
        refused = ""
    except ValueError as error:
        refused = str(error)
    if rank == 0:
        torch.save((loss, gradients, refused), folder / "outputs.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_cross_entropy_is_what_hugging_face_computes(plain, parts):
    """The yardstick itself: Hugging Face's loss on packed labels is the mean over labelled tokens."""
    batch = tiny.packed(parts)
    outputs = plain(**batch, use_cache=False)
    labels = batch["labels"][:, 1:].flatten()
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels))
