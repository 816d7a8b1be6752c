"""The configuration tree of ``m4ov run hybrid-rl``: a start, arms of reinforcement learning, what is measured. No torch
here."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field, replace

from m4ov.manifest import ArmConfig, CurriculumConfig, GateConfig, StageConfig, scaled
from m4ov.recipe import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    _require,
)
from m4ov.rl_recipe import (
    AdvantageConfig,
    AlgorithmConfig,
    ObjectiveConfig,
    PerceptionConfig,
    RewardConfig,
    RewardsConfig,
    RLConfig,
    RolloutConfig,
    RuleConfig,
)

#: What an arm may have beside accuracy: rules and other objectives of ``policy.advantages``, ``policy.perception``.
PARTS = ("pass_at_k", "perception", "conciseness")
#: The name of the supervised arm that all others begin with.
START = "start"
POOLS = ("general", "domain", "chains")


@dataclass
class ChainsConfig:
    """Verifiable questions on grids of real images (:mod:`m4ov.data.chains`)."""

    grids: int = 6000  # that the start is trained on
    policy_grids: int = 1500  # that policies are: of the same images, other grids
    held_out: int = 150  # grids of held-out images
    questions: int = 3  # on a grid, at most
    styles: dict[str, float] = field(default_factory=lambda: {"long": 0.4, "short": 0.4, "direct": 0.2})
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("grids", "policy_grids", "held_out", "questions"):
            _require(getattr(self, name) >= 1, f"chains.{name}", "at least 1", getattr(self, name))
        known = {"long", "short", "direct"}
        ok = self.styles.keys() <= known and all(0 <= share < math.inf for share in self.styles.values())
        _require(ok and sum(self.styles.values()) > 0, "chains.styles", "shares of long, short, direct", self.styles)


def policy() -> RLConfig:
    """How a policy learns on chains, with all :data:`PARTS`: what recipes change by name."""
    return RLConfig(
        rollout=RolloutConfig(prompts=16, samples=8, max_tokens=64, shared=True, rescore=False),
        rewards=RewardsConfig(
            components={
                "accuracy": RewardConfig("exact-match"),
                "concise": RewardConfig("adaptive-length", {"max_length": 64}),
            }
        ),
        advantages=AdvantageConfig(
            k=4,
            rules=[RuleConfig(0.5, "pass_at_k"), RuleConfig(1.0, "pass_at_1")],
            objectives={"accuracy": ObjectiveConfig(), "concise": ObjectiveConfig(0.25, "correct", scaled=False)},
        ),
        perception=PerceptionConfig(weight=0.002, cap=2.0),
        algorithm=AlgorithmConfig("grpo", clip_high=0.28),
    )


def policy_optim() -> OptimConfig:
    """Learning rates of a policy: a tenth of the start's for Muon, half for AdamW."""
    return OptimConfig(muon_lr=0.001, lr=1e-3, weight_decay=0.0, warmup_steps=5)


@dataclass
class StartConfig:
    """The supervised model that reinforcement learning begins with: trained here, or another curriculum's."""

    model: str = ""  # a model's folder that a curriculum wrote: only the last stage is trained, from there
    seed: int = 0
    steps: int = 0  # budget of all stages
    stages: dict[str, StageConfig] = field(default_factory=dict)


@dataclass
class MeasureConfig:
    """What is asked of every arm's model."""

    samples: int = 8  # of a question, and k of pass@k
    questions: int = 0  # of the held-out chains; 0: all

    def __post_init__(self) -> None:
        _require(self.samples >= 1, "measure.samples", "at least 1", self.samples)
        _require(self.questions >= 0, "measure.questions", "at least 0", self.questions)


@dataclass
class HybridConfig:
    """Everything `m4ov run hybrid-rl` reads."""

    task: str = "hybrid-rl"
    seeds: list[int] = field(default_factory=lambda: [0])  # of reinforcement learning; the start is one
    scale: float = 1.0  # of all steps: less for a try
    run: RunConfig = field(default_factory=lambda: RunConfig(folder="runs/hybrid-rl"))
    data: DataConfig = field(default_factory=DataConfig)
    chains: ChainsConfig = field(default_factory=ChainsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)  # of the start
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    gates: GateConfig = field(default_factory=lambda: GateConfig(limit=256))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    start: StartConfig = field(default_factory=StartConfig)
    policy: RLConfig = field(default_factory=policy)
    policy_optim: OptimConfig = field(default_factory=policy_optim)
    steps: int = 60  # updates of an arm
    arms: dict[str, list[str]] = field(default_factory=dict)  # name → its parts, of PARTS
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", "at least 1", self.steps)
        _require(bool(self.start.stages), "start.stages", "at least one", self.start.stages)
        _require(bool(self.arms), "arms", "at least one", self.arms)
        _require(START not in self.arms, f"arms.{START}", "another name", START)
        for name, parts in self.arms.items():
            ok = set(parts) <= set(PARTS) and len(set(parts)) == len(parts)
            _require(ok, f"arms.{name}", f"different ones of {', '.join(PARTS)}", parts)
        _require(bool(self.policy.rewards.components), "policy.rewards.components", "at least one", {})
        outcome = self.policy.advantages.outcome
        _require(bool(outcome), "policy.advantages.outcome", "an objective: what every arm learns", outcome)
        for name, parts in self.arms.items():
            has = self.policy.perception.weight > 0
            _require("perception" not in parts or has, "policy.perception.weight", f"more than 0, for arms.{name}", 0)
            others = len(self.policy.advantages.objectives) > 1
            expected = f"another objective than {outcome}, for arms.{name}"
            _require("conciseness" not in parts or others, "policy.advantages.objectives", expected, [outcome])
        for name in ("dp_shard", "tp", "ep"):
            value = getattr(self.parallel, name)
            _require(value == 1, f"parallel.{name}", "1: a policy is whole on every rank", value)
        try:
            self.manifest()
        except ValueError as error:  # by the names that things have here
            named = str(error).replace(f"arms.{START}.", "start.")
            raise ValueError(re.sub(r"\btrain\.steps\b", "train.steps (steps, start.steps)", named)) from None

    def manifest(self) -> CurriculumConfig:
        """The start as a curriculum of one arm; ``scale`` is applied."""
        stages, steps = self.start.stages, self.start.steps
        if self.start.model:
            name, last = list(stages.items())[-1]
            stages, steps = {name: last}, last.steps * last.rounds or steps
        return scaled(
            CurriculumConfig(
                seeds=[self.start.seed],
                scale=self.scale,
                run=replace(self.run, seed=0),
                data=self.data,
                model=self.model,
                optim=self.optim,
                train=self.train,
                parallel=self.parallel,
                evaluate=self.evaluate,
                gates=self.gates,
                pools={"general": "easy-vqa", "domain": "digits", "chains": "chains"},
                skills={"general": "easy-vqa", "domain": "digits"},
                arms={START: ArmConfig(steps=steps, stages=stages)},
            )
        )

    def policy_of(self, arm: str, seed: int) -> RLConfig:
        """What an arm is trained with: the recipe's ``policy`` without the parts that it has not."""
        policy, parts = copy.deepcopy(self.policy), self.arms[arm]
        policy.rollout.seed = seed
        advantages = policy.advantages
        if "pass_at_k" not in parts:
            advantages.rules = [RuleConfig(1.0, "pass_at_1")]
        if "conciseness" not in parts:
            advantages.objectives = {advantages.outcome: advantages.objectives[advantages.outcome]}
        if "perception" not in parts:
            policy.perception = PerceptionConfig()
        return policy

    @property
    def updates(self) -> int:
        """Steps of an arm, ``scale`` applied: whole rollouts."""
        each = self.policy.rollout.updates
        return max(1, round(self.steps * self.scale / each)) * each
