"""Packed batches against the same samples one by one, with Hugging Face's own positions."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch

from m4ov.data import patchify
from m4ov.models.qwen3_vl import build, cast_parameters, forward
from m4ov_kernels.patches import patch
from tests.tiny_task import mixture_batch, tiny_splits, tiny_task


def test_encoded_samples_have_labels_on_the_answer_only():
    encoder = tiny_task().encoder
    sample = encoder("what color is the circle?", "blue")
    answered = sample.input_ids[sample.labels != -100]
    assert encoder.tokenizer.decode(answered.tolist(), skip_special_tokens=False) == "blue<|im_end|>"
    assert (sample.input_ids == encoder.image_token).sum() == encoder.geometry.tokens
    assert torch.equal(sample.labels[sample.labels != -100], answered)
    assert encoder.tokenizer.decode(sample.input_ids.tolist()) == "what color is the circle?blue"


def test_an_encoder_travels_without_its_memory():
    """A tensor that is sent to a process costs a file descriptor, and a forkserver takes 256."""
    encoder = tiny_task().encoder
    for number in range(300):
        encoder(f"what is {number}?", "blue")
    packed = pickle.dumps(encoder)
    assert len(packed) < len(pickle.dumps(encoder.tokenizer)) + 1000
    there = pickle.loads(packed)
    assert torch.equal(there("what is 7?", "blue").input_ids, encoder("what is 7?", "blue").input_ids)


def test_the_encoding_is_what_the_chat_template_says():
    from m4ov.data import to_hugging_face

    encoder = tiny_task().encoder
    tokenizer = to_hugging_face(encoder.tokenizer)
    content = [{"type": "image"}, {"type": "text", "text": "is there a circle?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * encoder.geometry.tokens)
    assert tokenizer(text)["input_ids"] == encoder("is there a circle?", "no").input_ids.tolist()


def test_any_text_can_be_encoded():
    tokenizer = tiny_task().tokenizer
    text = "Zwölf Boxkämpfer 你好 🙂\n\t"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def each_alone(model, batch):
    """Logits of each sample by an unpacked call of the unpatched Hugging Face model, with its own positions."""
    patches = tiny_task().geometry.patches
    bounds = [0, *itertools.accumulate(batch.lengths)]
    for (start, end), (image,) in zip(itertools.pairwise(bounds), batch.images.shown, strict=True):
        outputs = model(
            input_ids=batch.input_ids[None, start:end],
            mm_token_type_ids=batch.mm_token_type_ids[None, start:end],
            pixel_values=batch.images.pixel_values[image * patches : (image + 1) * patches],
            image_grid_thw=batch.images.grid_thw[image : image + 1],
        )
        yield slice(start, end), outputs.logits[0]


@pytest.mark.parametrize("patched", [False, True])
def test_packed_logits_and_loss_equal_unpacked_hugging_face(patched):
    batch = mixture_batch(0)
    plain, packed = build(tiny_task().model_config, 1).eval(), build(tiny_task().model_config, 1).eval()
    if patched:
        patch(packed)
    with torch.no_grad():
        got = forward(packed, batch)
        expected = torch.empty_like(got.logits[0])
        for place, logits in each_alone(plain, batch):
            expected[place] = logits
    scale = expected.abs().max()
    assert (got.logits[0] - expected).abs().max() <= 1e-5 * scale
    loss = torch.nn.functional.cross_entropy(expected[:-1], batch.labels[1:])
    assert abs(got.loss - loss) <= 1e-5 * loss.abs()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sample_does_not_feel_its_neighbours(patched, precision):
    """Other questions and other images beside a sample leave its logits alone: to the bit when patched."""
    task = tiny_task(precision)
    geometry, split = task.geometry, tiny_splits()[0][0]
    model = build(task.model_config, 2).eval()
    if patched:
        patch(model)
    cast_parameters(model, task.dtype)
    mine = task.encoder("what shape is in the image?", "circle")
    length = len(mine.input_ids)
    seen = []
    for other, answer in (("is there a red shape?", "no"), ("is no red shape present?", "yes")):
        neighbours = [task.encoder(other, answer)] * 2
        for image in (1, 2):
            pixels = patchify(split.images[[image, 0, image + 4]], geometry)
            batch = task.encoder.pack([neighbours[0], mine, neighbours[1]], [0, 1, 2], pixels, task.dtype)
            with torch.no_grad():
                logits = forward(model, batch, with_labels=False).logits[0]
            start = batch.lengths[0]
            seen.append(logits[start : start + length].float())
    for logits in seen[1:]:
        difference = (logits - seen[0]).abs().max()
        allowed = (1e-5 if precision == "fp32" else 2e-2) * seen[0].abs().max()
        assert difference <= allowed


def test_gradients_reach_an_image_from_all_its_questions():
    """The vision tower's gradient from one pass over an image equals the sum over its questions one by one."""
    batch = mixture_batch(0)
    shared, alone = build(tiny_task().model_config, 3), build(tiny_task().model_config, 3)
    (forward(shared, batch).loss * batch.num_labels).backward()
    for place, logits in each_alone(alone, batch):
        labels = batch.labels[place]
        torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").backward()
    ours = dict(shared.model.visual.named_parameters())
    for name, parameter in alone.model.visual.named_parameters():
        scale = parameter.grad.abs().max()
        assert (ours[name].grad - parameter.grad).abs().max() <= 1e-4 * scale + 1e-7, name


def test_pack_refuses_an_image_that_is_not_there():
    task = tiny_task()
    sample = task.encoder("is there a circle?", "no")
    pixels = patchify(tiny_splits()[0][0].images[:2], task.geometry)
    with pytest.raises(ValueError, match="0 to 1; got 2 to 2"):
        task.encoder.pack([sample], [2], pixels)
    with pytest.raises(ValueError, match="needs samples"):
        task.encoder.pack([], [], pixels)
