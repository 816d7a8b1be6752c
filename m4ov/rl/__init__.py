"""Reinforcement learning: rewards, advantages, the perception loss, and the algorithms on the fused head.

Names are imported when they are asked for: the processes that compute rewards need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m4ov.rl.advantages import Composed, Outcomes, compose, outcomes, pass_at_k
    from m4ov.rl.algorithms import PolicyBatch, PolicyLoss
    from m4ov.rl.certificates import Mismatch, mismatch
    from m4ov.rl.offline import PairBatch, PreferenceLoss, pairs_of
    from m4ov.rl.perception import mask_patches, twin
    from m4ov.rl.reference import Reference
    from m4ov.rl.rewards import Answer, RewardError, Rewards, Scores
    from m4ov.rl.rollouts import Drawn, Prompt, Rollouts, Sampler
    from m4ov.rl.samplers import sampler
    from m4ov.rl.sampling import Sampled, informative
    from m4ov.rl.trainer import EngineSampler, train_policy

_HOMES = {
    "advantages": ("Composed", "Outcomes", "compose", "outcomes", "pass_at_k"),
    "algorithms": ("PolicyBatch", "PolicyLoss"),
    "certificates": ("Mismatch", "mismatch"),
    "offline": ("PairBatch", "PreferenceLoss", "pairs_of"),
    "perception": ("mask_patches", "twin"),
    "reference": ("Reference",),
    "rewards": ("Answer", "RewardError", "Rewards", "Scores"),
    "rollouts": ("Drawn", "Prompt", "Rollouts", "Sampler"),
    "samplers": ("sampler",),
    "sampling": ("Sampled", "informative"),
    "trainer": ("EngineSampler", "train_policy"),
}

__all__ = [
    "Answer",
    "Composed",
    "Drawn",
    "EngineSampler",
    "Mismatch",
    "Outcomes",
    "PairBatch",
    "PolicyBatch",
    "PolicyLoss",
    "PreferenceLoss",
    "Prompt",
    "Reference",
    "RewardError",
    "Rewards",
    "Rollouts",
    "Sampled",
    "Sampler",
    "Scores",
    "compose",
    "informative",
    "mask_patches",
    "mismatch",
    "outcomes",
    "pairs_of",
    "pass_at_k",
    "sampler",
    "train_policy",
    "twin",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"m4ov.rl.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
