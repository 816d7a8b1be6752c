"""A ``hybrid-rl`` small enough for tests: a few real images, two arms of two updates, a model of a few thousand
weights. Every rank imports it."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from m4ov import config
from m4ov.hybrid import flow
from m4ov.hybrid_recipe import HybridConfig
from m4ov.train import World, command

RECIPE = """
task: hybrid-rl
run: {threads: 1}
data: {image_size: 32, images_per_step: 6, questions_per_image: 1, held_out_digits: 30, shift: 2, vocabulary: 320}
chains: {grids: 8, policy_grids: 8, held_out: 6, questions: 2}
model:
  vision: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2, deepstack_layers: [0]}
  text: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 4, key_value_heads: 2, head_dim: 16}
  initializer_range: 0.2
train: {precision: fp32, log_every: 1, checkpoint_seconds: 0, checkpoint_steps: 1}
gates: {limit: 8}
evaluate: {limit: 12, examples: 4}
start:
  steps: 2
  stages:
    knowledge: {mixture: {general: 1, domain: 1}, steps: 1, rounds: 1, warmup: 1}
    chains: {mixture: {chains: 1}, steps: 1, rounds: 1, warmup: 1}
steps: 2
policy_optim: {muon_lr: 0.005, lr: 0.001, warmup_steps: 1}
policy:
  rollout: {prompts: 4, samples: 4, max_tokens: 6, row_tokens: 256, shown: 2}
  rewards:
    components:
      accuracy: {function: "tests.hybrid.small:low", seconds: 0}
      concise: {function: adaptive-length, options: {max_length: 6}}
  advantages:
    k: 2
    objectives: {accuracy: {weight: 1.0}, concise: {weight: 0.3, among: correct}}
  perception: {weight: 0.01, cap: 2.0}
arms:
  accuracy: []
  all: [pass_at_k, perception, conciseness]
measure: {samples: 3}
"""


def low(answer: Any) -> float:
    """Right is what begins with a token of the lower half: an untrained model has some of it right."""
    return float(answer.tokens[0] < 160)


low.reward_range = (0.0, 1.0)


def write_figures(folder: Path, train: int = 40, test: int = 20) -> Path:
    """The first images of easy-vqa with their questions, laid out as the package does."""
    root = Path(next(iter(find_spec("easy_vqa").submodule_search_locations))) / "data"
    for split, count in (("train", train), ("test", test)):
        (folder / split / "images").mkdir(parents=True)
        rows = [row for row in json.loads((root / split / "questions.json").read_text()) if row[2] < count]
        (folder / split / "questions.json").write_text(json.dumps(rows))
        for number in {row[2] for row in rows}:
            shutil.copy(root / split / "images" / f"{number}.png", folder / split / "images")
    return folder


def load(folder: Path, *overrides: str) -> HybridConfig:
    """The recipe, with figures and a run folder beside its file."""
    file = folder / "small.yaml"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_figures(folder / "easy")
        file.write_text(RECIPE)
    given = [f"data.easy_vqa={folder / 'easy'}", f"run.folder={folder / 'run'}"]
    return config.load(HybridConfig, file, [*given, *overrides])


def run_on_ranks(folder: Path) -> int:
    """The run of the last arm alone on the ranks that are there, without its report."""

    class Here(World):
        @classmethod
        def start(cls, timeout_seconds: float = 600.0) -> Here:
            return cls(dist.get_rank(), dist.get_world_size())

        def close(self) -> None:
            """Whoever made the group closes it."""

    command.World, flow.ranks_started, flow.write = Here, dist.get_world_size, lambda *_: None
    torch.set_num_threads(1)
    recipe = load(folder)
    del recipe.arms["accuracy"]
    flow.run(recipe)
    return dist.get_rank()
