"""A supervised run from start to saved model, and the comparison with and without the patch."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from m4ov import sft
from m4ov.data import patchify
from m4ov.models.qwen3_vl import build, from_pretrained
from m4ov.recipe import TrainConfig
from m4ov.sft.training import loss_of, model_of, save_model
from m4ov.train import CheckpointError, TrainingError
from m4ov_kernels.integrations import transformer_engine
from tests.kernels.steps import assert_same_step
from tests.tiny_task import mixture_batch, tiny_config, tiny_material, tiny_splits, tiny_task, train_stage


@pytest.mark.parametrize("implementation", ["m4ov", "transformers"])
def test_the_saved_model_is_the_trained_one(implementation, tmp_path):
    """A folder for transformers and for us, whichever was trained."""
    task, config = tiny_task(), tiny_config(tmp_path, precision="fp32")
    config.model.implementation = implementation
    end = train_stage(config, tmp_path)
    assert (end.result.steps, end.result.resumed_at) == (6, 0)
    saved = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "model")
    ours = from_pretrained(tmp_path / "model")
    assert dict(saved.named_parameters()).keys() == dict(ours.named_parameters()).keys() == end.result.weights.keys()
    for model in (saved, ours):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, end.weights[name]), name
    first = model_of(config, task, 0)
    assert type(first).__module__.split(".")[0] == implementation
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), saved.parameters(), strict=True))
    batch = mixture_batch(0)
    with torch.no_grad():
        before, after, again = (float(loss_of(model.eval(), batch)[0]) for model in (first, saved, ours))
    assert after < before
    assert again == pytest.approx(after, rel=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "model").architectures == ["Qwen3VLForConditionalGeneration"]
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == task.encoder.end_token
    assert not list(tmp_path.glob(".writing-*"))


def test_both_implementations_train_alike():
    """From the same weights, on the same batch: the same loss and gradients."""
    task, config = tiny_task(), tiny_config(precision="fp32")
    weights = {name: weight.detach() for name, weight in model_of(config, task, 0).named_parameters()}
    found = {}
    for implementation in ("m4ov", "transformers"):
        config = tiny_config(precision="fp32")
        config.model.implementation = implementation
        model = model_of(config, task, 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        total, count = loss_of(model.train(), mixture_batch(0))
        (total / count).backward()
        found[implementation] = (total.detach() / count, {n: p.grad for n, p in model.named_parameters()})
    assert_same_step(found["m4ov"], found["transformers"])


def test_the_saved_tokenizer_and_processor_encode_as_training_did(tmp_path):
    task = tiny_task()
    model = build(task.model_config, 0)
    save_model(task, dict(model.named_parameters()), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    sample = task.encoder("what color is the circle?", "blue")
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "blue"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * task.geometry.tokens)
    assert tokenizer(text)["input_ids"] == sample.input_ids.tolist()
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "model")
    images = tiny_splits()[0][0].images[:2]
    made = processor(list(images), return_tensors="np")
    assert np.array_equal(made["pixel_values"], patchify(images, task.geometry))
    for name in ("processor_config.json", "video_preprocessor_config.json"):
        assert json.loads((tmp_path / "model" / name).read_text())["processor_class"] == "Qwen3VLProcessor"


def test_a_model_that_cannot_be_written_is_named(tmp_path):
    task = tiny_task()
    weights = dict(build(task.model_config, 0).named_parameters())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"model .*model: cannot be written"):
        save_model(task, weights, tmp_path / "file" / "model")


FULL_DISK = """
import resource, sys
from pathlib import Path
from m4ov.train import CheckpointError
from tests.tiny_task import tiny_config, tiny_task, train_stage
folder = Path(sys.argv[1])
tiny_task()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    train_stage(tiny_config(folder, precision="fp32", checkpoint_steps=2), folder)
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_ends_the_run_with_the_name_of_the_file(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, cwd=_root(), check=True
    )
    assert "step-00000002: cannot be written" in child.stdout
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _root():
    from pathlib import Path

    return Path(__file__).parents[2]


def test_the_comparison_runs_both_sides_on_the_same_batches():
    config = tiny_config()
    config.compare.steps = 3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = sft.compare(config, tiny_task("bf16"), tiny_material().pools, {"domain": 1, "general": 2})
    finally:
        torch.set_num_threads(threads)
    assert found.steps == len(found.patched.losses) == len(found.unpatched.losses) == 3
    assert max(map(abs, found.loss_differences)) < 0.02 * max(found.unpatched.losses)
    assert found.patched.losses[0] != found.patched.losses[1]
    for side in (found.patched, found.unpatched):
        assert side.step_seconds > 0
        assert side.peak_mib is None or side.peak_mib >= side.held_mib > 50
    assert "rms_norm" in found.patch or "norm" in found.patch


def test_a_side_that_fails_says_why():
    config = tiny_config()
    config.compare.steps = 1
    config.train.precision = "fp16"  # no such precision
    with pytest.raises(RuntimeError, match="patched side: KeyError: 'fp16'"):
        sft.compare(config, tiny_task(), tiny_material().pools, {"general": 2})


def test_fp8_where_there_is_none(tmp_path):
    """Said before anything is built; and which layers it would be."""
    config = tiny_config()
    config.train.fp8 = "transformer_engine"
    if transformer_engine.unavailable() is None:
        pytest.skip("transformer-engine and a GPU are here")
    with pytest.raises(TrainingError, match=r"train\.fp8: transformer-engine(?:'s fp8 linears need| is not installed)"):
        train_stage(config, tmp_path)
    assert not list(tmp_path.iterdir())
    model = build(tiny_task().model_config, 0)
    chosen = set(transformer_engine.eligible(model))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            sixteenths = module.in_features % 16 == module.out_features % 16 == 0
            assert (name in chosen) == (sixteenths and name != "lm_head"), name
    assert chosen
    with pytest.raises(ValueError, match=r"train\.fp8: expected off or transformer_engine, got 'fp9'"):
        TrainConfig(fp8="fp9")
