"""The snippets of ``integrations/README.md``, run as they stand there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers

README = Path(__file__).parents[2] / "m4ov_kernels" / "integrations" / "README.md"
SNIPPETS = re.findall(
    r"^## (\w+)[^\n]*\n(?:(?!^## ).)*?```python\n(.*?)```", README.read_text(), re.DOTALL | re.MULTILINE
)


def given(title, folder):
    """What a snippet takes as there."""
    if title == "transformers":
        ids = torch.randint(32, (2, 9))
        return {"config": config(), "input_ids": ids, "labels": ids}
    if title == "TRL":
        from datasets import Dataset
        from trl import GRPOConfig

        from .test_trl import arguments, model, sentence, tokenizer

        options = arguments(folder, num_generations=4, max_completion_length=5, max_steps=1)
        return {
            "model": model(),
            "reward": lambda completions, **_: [float(len(text)) for text in completions],
            "arguments": GRPOConfig(**options | {"max_steps": 1}),
            "dataset": Dataset.from_list([{"prompt": sentence(4)}] * 4),
            "tokenizer": tokenizer(),
        }
    if title == "verl":
        return {"hidden": torch.randn(2, 5, 8), "weight": torch.randn(30, 8), "labels": torch.randint(30, (2, 5))}
    values = {name: -torch.rand(2, 20) for name in ("rollout_logprobs", "train_logprobs")}
    return values | {"mask": torch.ones(2, 20).bool(), "token_types": torch.randint(3, (2, 20))}


def config():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=24, **sizes)


def test_every_snippet_is_found():
    assert [title for title, _ in SNIPPETS] == ["transformers", "TRL", "verl", "Do"]
    assert README.read_text().count("```python") == len(SNIPPETS)


@pytest.mark.parametrize(("title", "code"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_a_snippet_runs(title, code, tmp_path, monkeypatch):
    if title == "TRL" and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed: pip install 'm4ov[trl]'")
    monkeypatch.chdir(tmp_path)
    names = given(title, tmp_path)
    exec(compile(code, f"{README}: {title}", "exec"), names)
    if title == "verl":
        assert names["logprobs"].shape == names["entropy"].shape == (10,)
    if title == "Do":
        assert (tmp_path / "certificate.png").exists()
