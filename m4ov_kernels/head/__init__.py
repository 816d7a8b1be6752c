"""The language-model head: a projection on the vocabulary and what is made of it, logits never whole in memory."""

from m4ov_kernels.head.cross_entropy import linear_cross_entropy
from m4ov_kernels.head.kl import LINEAR_KL, linear_kl
from m4ov_kernels.head.logprob import LINEAR_LOGPROB, LogprobOutput, linear_logprob
from m4ov_kernels.head.losses import (
    GroupAdvantages,
    RewardMean,
    dpo_loss,
    group_advantages,
    kl_estimate,
    mpo_loss,
    overlong_penalty,
    pass_at_k_advantages,
    policy_loss,
    rollout_weights,
)

__all__ = [
    "LINEAR_KL",
    "LINEAR_LOGPROB",
    "GroupAdvantages",
    "LogprobOutput",
    "RewardMean",
    "dpo_loss",
    "group_advantages",
    "kl_estimate",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
    "mpo_loss",
    "overlong_penalty",
    "pass_at_k_advantages",
    "policy_loss",
    "rollout_weights",
]
