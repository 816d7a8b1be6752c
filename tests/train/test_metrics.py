"""What a run says of itself: model FLOPs against a count of the products that PyTorch makes, rates, memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from m4ov.models.qwen3_vl import build, forward, training_flops
from m4ov.train.machine import peak_flops, peak_mib
from m4ov.train.metrics import read
from tests.tiny_task import mixture_batch, tiny_config, tiny_task, train_stage


def test_model_flops_are_the_products_of_the_forward():
    """The unpatched model's products, by PyTorch's counter; it makes logits of all tokens and sees no causality, nor
    that a row has many samples and images: what these cost is taken away."""
    batch, config = mixture_batch(0), tiny_task().model_config
    model = build(config, 0)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(model.eval(), batch)
    text, vision = config.text_config, config.vision_config
    heads = text.num_attention_heads * text.head_dim
    seen = sum(length * (length + 1) // 2 for length in batch.lengths)
    more = text.num_hidden_layers * 4 * heads * (batch.tokens**2 - seen)
    more += 2 * text.hidden_size * text.vocab_size * (batch.tokens - batch.num_labels)
    rotary = counter.get_total_flops() - more - training_flops(config, batch) / 3
    # Left over: the angles of the rotary embeddings, which Hugging Face makes by products, [half, 1] · [1, tokens].
    assert 0 <= rotary <= 2 * 3 * batch.tokens * text.head_dim + 2 * 1000 * vision.hidden_size


def test_a_run_logs_its_rates(tmp_path):
    config = tiny_config(tmp_path, precision="fp32", steps=3, peak_tflops=0.05)
    train_stage(config, tmp_path)
    rows = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for step, row in enumerate(rows):
        flops = training_flops(tiny_task().model_config, mixture_batch(step))
        assert row["mfu"] == pytest.approx(flops / row["step_seconds"] / 0.05e12)
        assert row["tokens_per_second"] == pytest.approx(mixture_batch(step).tokens / row["step_seconds"])
        assert 0 < row["data_wait_seconds"] < row["step_seconds"]
        assert row["communication_seconds"] == 0
        assert row["peak_memory_mib"] > 50
    assert peak_mib() is not None


def test_the_peak_is_declared_or_measured():
    assert peak_flops(torch.bfloat16, 2.5) == (2.5e12, "declared")
    rate, source = peak_flops(torch.float32)
    assert rate > 1e8
    assert source == "measured" or torch.cuda.is_available()
