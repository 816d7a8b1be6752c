"""Exact match against greedy decoding by Hugging Face's generate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from m4ov.data import Split, patchify
from m4ov.data.tokenizer import prompt
from m4ov.evaluate import accuracy, exact_match, examples
from m4ov.models.qwen3_vl import Config, build, forward, new
from m4ov_kernels.patches import patch
from tests.tiny_task import tiny_mixture, tiny_splits, tiny_task


def few(count: int) -> Split:
    """Some held-out questions on several images, with the number of questions of an image as it comes."""
    split = tiny_splits()[1][0]
    return Split(split.name, split.images, split.samples[5 : 5 + count])


@pytest.fixture(scope="module")
def model():
    """Trained on a few questions for a moment, so that some answers are right and some are wrong."""
    task = tiny_task()
    made = build(task.model_config, 0)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    mixture = tiny_mixture(images=8)
    for step in range(25):
        forward(made, mixture.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval()


def greedy(model, sample, split) -> list[int]:
    encoder = tiny_task().encoder
    asked = torch.tensor([encoder.tokenizer.encode(prompt(sample.question, encoder.geometry.tokens)).ids])
    answered = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        mm_token_type_ids=(asked == encoder.image_token).long(),
        pixel_values=torch.from_numpy(patchify(split.images[sample.image][None], encoder.geometry)),
        image_grid_thw=torch.tensor([encoder.geometry.grid_thw]),
        max_new_tokens=6,
        do_sample=False,
    )
    return answered[0, asked.shape[1] :].tolist()


@pytest.mark.parametrize("patched", [False, True])
def test_right_is_what_greedy_decoding_says(model, patched):
    split, encoder = few(40), tiny_task().encoder
    if patched:
        model = build(tiny_task().model_config, 0)
        patch(model)
    result = exact_match(model, split, encoder, tokens_per_batch=700)
    assert len(result.right) == 40
    for sample, ok, said in zip(split.samples, result.right, result.said, strict=True):
        wanted = encoder.tokenizer.encode(sample.answer + "<|im_end|>").ids
        assert (greedy(model, sample, split) == wanted) == ok
        assert ok == (said == sample.answer) or not ok
    if not patched:
        assert 0 < sum(result.right) < 40
    assert sum(asked for _, asked in result.kinds.values()) == 40
    assert sum(hits for hits, _ in result.kinds.values()) == sum(result.right)


def test_accuracy_does_not_depend_on_the_batch(model):
    split, encoder = few(30), tiny_task().encoder
    longest = max(len(encoder(sample.question, sample.answer).input_ids) for sample in split.samples)
    results = [exact_match(model, split, encoder, tokens_per_batch=size) for size in (longest, 400, 10_000)]
    assert results[0] == results[1] == results[2]
    with pytest.raises(ValueError, match=f"tokens_per_batch: expected at least {longest}"):
        exact_match(model, split, encoder, tokens_per_batch=longest - 1)


def test_rows_are_full_and_an_image_is_seen_once(model, monkeypatch):
    split, encoder = tiny_splits()[1][0], tiny_task().encoder
    rows = []

    def counted(model, batch, **options):
        rows.append(batch)
        return forward(model, batch, **options)

    monkeypatch.setattr(accuracy, "forward", counted)
    exact_match(model, split, encoder, tokens_per_batch=2000)
    assert all(row.tokens <= 2000 for row in rows)
    assert sum(row.tokens for row in rows) > 0.97 * 2000 * (len(rows) - 1)
    assert sum(len(row.images.grids) for row in rows) == len({sample.image for sample in split.samples})


def test_a_limit_spreads_over_the_split(model):
    split, encoder = tiny_splits()[1][0], tiny_task().encoder
    result = exact_match(model, split, encoder, tokens_per_batch=2000, limit=20)
    assert len(result.right) == 20
    assert sum(asked for _, asked in result.kinds.values()) == 20


def test_examples_are_of_different_images_and_kinds(model):
    shown = examples(model, tiny_splits()[1][0], tiny_task().encoder, 6, seed=1)
    assert len({example.kind for example in shown}) == 6
    assert len({example.image.tobytes() for example in shown}) == 6
    assert all(isinstance(example.said, str) and example.image.dtype == np.uint8 for example in shown)


def test_our_own_model_answers_alike(model):
    """From the same weights, where logits are made of the answers' places alone."""
    split, encoder = few(40), tiny_task().encoder
    ours = new(Config.from_dict(tiny_task().model_config.to_dict()))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights[name])
    found = [exact_match(one, split, encoder, tokens_per_batch=512) for one in (model, ours)]
    shown = [[example.said for example in examples(one, split, encoder, 6, seed=2)] for one in (model, ours)]
    assert shown[0] == shown[1]
    assert found[0] == found[1]
    assert 0 < sum(found[1].right) < len(found[1].right)
