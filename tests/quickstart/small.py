"""A quickstart small enough for tests: a hundred real images, three stages of a few steps, a model of a few thousand
weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from m4ov import config
from m4ov.quickstart_recipe import QuickstartConfig

RECIPE = """
task: quickstart
run: {threads: 1}
production: {sources: {easy_vqa: 40, digits: 48}, allot: {questions: 360}, engine: {kind: local, shard_images: 24}}
data: {images_per_step: 5, held_out_digits: 30, shift: 2}
model:
  vision: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2, deepstack_layers: [0]}
  text: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 4, key_value_heads: 2, head_dim: 16}
train: {steps: 6, precision: fp32, log_every: 1, checkpoint_seconds: 0, checkpoint_steps: 1}
gates: {share: 0.2, limit: 12}
evaluate: {limit: 20, examples: 3}
compare: {steps: 1, images_per_step: 3}
operators: false
reinforcement:
  steps: 2
  questions: 20
  samples: 2
  policy: {rollout: {prompts: 2, samples: 2, max_tokens: 4, rounds: 1}, advantages: {k: 2}}
stages:
  knowledge: {mixture: {general: 3, domain: 2}, steps: 1, rounds: 2, warmup: 1}
  restore:
    mixture: {general: 1}
    steps: 1
    rounds: 2
    guards: {domain: {epsilon: 0.02, pool: domain, replay: 0.2}}
  refine: {mixture: {general: 1, domain: 1}, steps: 2, average: {kind: ema, decay: 0.5}}
"""


def load(folder: Path, *overrides: str) -> QuickstartConfig:
    """The recipe, with a run folder beside its file."""
    file = folder / "small.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():  # ranks read it at once
        file.write_text(RECIPE)
    return config.load(QuickstartConfig, file, [f"run.folder={folder / 'run'}", *overrides])


def digest(folder: Path, *patterns: str) -> dict[str, str]:
    """File → SHA-256, of those that match."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


#: What does not depend on how often a run was stopped.
KEPT = (
    "data/records/*",
    "data/images/*/*",
    "data/results.json",
    "decisions.jsonl",
    "model/*",
    "[123]-*/model/*",
    "reinforcement/before.json",
    "reinforcement/after.json",
    "reinforcement/model/*",
)
