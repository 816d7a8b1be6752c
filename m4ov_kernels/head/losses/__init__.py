"""Policy and preference losses over per-token log-probabilities, on packed rows: plain differentiable PyTorch."""

from __future__ import annotations

from m4ov_kernels.head.losses.advantages import (
    GroupAdvantages,
    group_advantages,
    overlong_penalty,
    pass_at_k_advantages,
)
from m4ov_kernels.head.losses.corrections import rollout_weights
from m4ov_kernels.head.losses.kl import kl_estimate
from m4ov_kernels.head.losses.policy import policy_loss
from m4ov_kernels.head.losses.preference import RewardMean, dpo_loss, mpo_loss

__all__ = [
    "GroupAdvantages",
    "RewardMean",
    "dpo_loss",
    "group_advantages",
    "kl_estimate",
    "mpo_loss",
    "overlong_penalty",
    "pass_at_k_advantages",
    "policy_loss",
    "rollout_weights",
]
