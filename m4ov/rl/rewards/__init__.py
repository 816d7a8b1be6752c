"""Rewards of answers: functions with declared ranges, composed, bounded in time, and their distributions."""

from __future__ import annotations

from m4ov.rl.rewards.answers import Answer
from m4ov.rl.rewards.compose import Rewards, Scores
from m4ov.rl.rewards.distribution import FAILURES, Distribution
from m4ov.rl.rewards.registry import BUILT_IN, Function, RewardError, build

__all__ = ["BUILT_IN", "FAILURES", "Answer", "Distribution", "Function", "RewardError", "Rewards", "Scores", "build"]
