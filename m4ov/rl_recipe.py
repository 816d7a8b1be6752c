"""What reinforcement learning is told: rewards, advantages, perception, algorithm. Plain dataclasses, checked when they
are made, by their full names. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

ONLINE = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
OFFLINE = ("dpo", "mpo")
REFERENCES = ("none", "frozen", "ema", "lora-off")
CORRECTIONS = ("none", "tis", "icepop", "mis")
CHOICES = ("pass_at_k", "pass_at_1", "skip")
ENGINE_KINDS = ("processes", "ray")
SAMPLER_WEIGHTS = ("model", "int8", "int4", "fp8")
AMONG = ("all", "correct")


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


@dataclass
class RewardConfig:
    """One component of the reward: a function by its name, or by its place (``package.module:function``)."""

    function: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # the function's keyword arguments
    low: float | None = None  # the declared range; None: the function's own
    high: float | None = None
    seconds: float | None = None  # for one answer, in a process of its own; 0: none, and none; None: the function's own
    on_failure: float | None = None  # the value of an answer that has none; None: the low end of the range

    def __post_init__(self) -> None:
        for name in ("low", "high", "on_failure"):
            _require(_finite(getattr(self, name)), f"rewards.{name}", "a finite number", getattr(self, name))
        if self.low is not None and self.high is not None:
            _require(self.low <= self.high, "rewards.high", f"at least low = {self.low:g}", self.high)
        ok = self.seconds is None or (_finite(self.seconds) and self.seconds >= 0)
        _require(ok, "rewards.seconds", "at least 0", self.seconds)


@dataclass
class RewardsConfig:
    """The components, and which of them says whether an answer is right."""

    components: dict[str, RewardConfig] = field(default_factory=dict)
    correct: str = "accuracy"  # the component that counts answers as right
    correct_at_least: float = 1.0  # from which value of it on
    workers: int = 1  # processes for the components that have a time limit, each component its own
    start_seconds: float = 60.0  # in which a process must have imported its function

    def __post_init__(self) -> None:
        for name, component in self.components.items():
            _require(bool(component.function), f"rewards.components.{name}.function", "the name of a function", "")
        if self.components:
            names = ", ".join(self.components)
            _require(self.correct in self.components, "rewards.correct", f"one of {names}", self.correct)
        _require(_finite(self.correct_at_least), "rewards.correct_at_least", "a finite number", self.correct_at_least)
        _require(self.workers >= 1, "rewards.workers", "at least 1", self.workers)
        _require(self.start_seconds > 0, "rewards.start_seconds", "more than 0", self.start_seconds)


@dataclass
class ObjectiveConfig:
    """A component of the reward as an objective."""

    weight: float = 1.0
    among: str = "all"  # which answers of a prompt are compared: "all", or the "correct" ones (others get nothing)
    scaled: bool = True  # False: not over the standard deviation of the prompt's answers: as far apart as they are

    def __post_init__(self) -> None:
        _require(_finite(self.weight) and self.weight >= 0, "advantages.weight", "at least 0", self.weight)
        _require(self.among in AMONG, "advantages.among", " or ".join(AMONG), self.among)


@dataclass
class RuleConfig:
    """Of prompts whose share of right answers is at most ``up_to``: what their advantages are."""

    up_to: float = 1.0
    use: str = "pass_at_1"

    def __post_init__(self) -> None:
        _require(0 <= self.up_to <= 1, "advantages.rules.up_to", "0 to 1", self.up_to)
        _require(self.use in CHOICES, "advantages.rules.use", " or ".join(CHOICES), self.use)


@dataclass
class AdvantageConfig:
    """How rewards of several kinds become one advantage for each answer (m4ov/rl/README.md has the formulas)."""

    kind: str = "grpo"  # "grpo": over the standard deviation of the group; "dr_grpo": not
    k: int = 4  # of pass@k
    rules: list[RuleConfig] = field(
        default_factory=lambda: [RuleConfig(0.5, "pass_at_k"), RuleConfig(1.0, "pass_at_1")]
    )
    objectives: dict[str, ObjectiveConfig] = field(default_factory=lambda: {"accuracy": ObjectiveConfig()})
    outcome: str = "accuracy"  # the objective whose advantages come from the counts (N, c); empty: none
    normalise: str = "batch"  # each objective to a root mean square of 1 over the step; or "none"
    min_std: float = 1e-6  # of an objective's values in a group; less is no difference

    def __post_init__(self) -> None:
        _require(self.kind in ("grpo", "dr_grpo"), "advantages.kind", "grpo or dr_grpo", self.kind)
        _require(self.k >= 1, "advantages.k", "at least 1", self.k)
        shares = [rule.up_to for rule in self.rules]
        ok = bool(shares) and shares == sorted(set(shares)) and shares[-1] == 1
        _require(ok, "advantages.rules", "rules with rising up_to, the last 1", shares)
        _require(bool(self.objectives), "advantages.objectives", "at least one", self.objectives)
        names = ", ".join(self.objectives)
        ok = not self.outcome or self.outcome in self.objectives
        _require(ok, "advantages.outcome", f"one of {names}, or empty", self.outcome)
        ok = not self.outcome or self.objectives[self.outcome].among == "all"
        _require(ok, f"advantages.objectives.{self.outcome}.among", "all, as the outcome is what tells them", "correct")
        _require(self.normalise in ("batch", "none"), "advantages.normalise", "batch or none", self.normalise)
        _require(_finite(self.min_std) and self.min_std >= 0, "advantages.min_std", "at least 0", self.min_std)


@dataclass
class PerceptionConfig:
    """Reward of depending on the image: the divergence between the policies that see it and see it masked."""

    weight: float = 0.0  # γ; 0: no twin is computed
    share: float = 0.6  # of an image's units that are masked
    unit: str = "feature"  # what is masked at once: "feature", the patches of one token; or "patch"
    kl: str = "sampled"  # "sampled": e^d − d − 1 of the sampled words; "exact": over the whole vocabulary
    through: str = "both"  # which policy the gradient reaches: "both", as in PAPO, or "original"
    cap: float = 0.0  # nats of a token, beyond which there is no gradient; 0: none
    entropy: float = 0.0  # η₁, on the entropy of the policy that sees the image
    masked_entropy: float = 0.0  # η₂, of the one that sees it masked

    def __post_init__(self) -> None:
        for name in ("weight", "cap", "entropy", "masked_entropy"):
            value = getattr(self, name)
            _require(_finite(value) and value >= 0, f"perception.{name}", "at least 0", value)
        _require(0 < self.share <= 1, "perception.share", "more than 0, at most 1", self.share)
        for name, kinds in (
            ("unit", ("feature", "patch")),
            ("kl", ("sampled", "exact")),
            ("through", ("both", "original")),
        ):
            _require(getattr(self, name) in kinds, f"perception.{name}", " or ".join(kinds), getattr(self, name))


@dataclass
class ReferenceConfig:
    """The policy that the trained one is held to, or compared with."""

    kind: str = "none"  # "frozen": as it began; "ema": an average of its weights; "lora-off": without its adapters
    decay: float = 0.99  # of "ema", a step

    def __post_init__(self) -> None:
        _require(self.kind in REFERENCES, "reference.kind", ", ".join(REFERENCES), self.kind)
        _require(0 <= self.decay <= 1, "reference.decay", "0 to 1", self.decay)


@dataclass
class AlgorithmConfig:
    """The loss. Bounds that are ``None`` are the algorithm's own (``m4ov_kernels.head.policy_loss``)."""

    name: str = "grpo"
    temperature: float = 1.0  # of the policy; that of the sampler
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    max_length: int = 0  # of "dr_grpo": tokens of a response at most, which its sum is divided by
    kl_coef: float = 0.0  # of the divergence from the reference
    kl_kind: str = "k3"  # k1, k2, k3 or "exact"
    entropy_coef: float = 0.0  # of the entropy bonus
    correction: str = "none"  # of a sampler that differs from the trainer: tis, icepop, mis
    correction_level: str = "token"
    correction_low: float | None = None
    correction_high: float | None = None
    beta: float = 0.1  # of "dpo" and "mpo"
    label_smoothing: float = 0.0
    preference_weight: float = 0.8  # of "mpo"
    quality_weight: float = 0.2
    generation_weight: float = 1.0
    delta_decay: float = 1.0  # what the past rewards still weigh in "mpo"'s δ after a step; 1: the mean of all
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    def __post_init__(self) -> None:
        _require(self.name in ONLINE + OFFLINE, "algorithm.name", ", ".join(ONLINE + OFFLINE), self.name)
        ok = _finite(self.temperature) and self.temperature > 0
        _require(ok, "algorithm.temperature", "more than 0", self.temperature)
        if self.name == "dr_grpo":
            _require(self.max_length >= 1, "algorithm.max_length", "at least 1 with dr_grpo", self.max_length)
        kinds = ("k1", "k2", "k3", "exact")
        _require(self.kl_kind in kinds, "algorithm.kl_kind", ", ".join(kinds), self.kl_kind)
        ok = _finite(self.kl_coef) and self.kl_coef >= 0
        _require(ok, "algorithm.kl_coef", "at least 0", self.kl_coef)
        if self.kl_coef or self.name in OFFLINE:
            expected = f"another than none, with {self.name if self.name in OFFLINE else 'kl_coef'}"
            _require(self.reference.kind != "none", "algorithm.reference.kind", expected, self.reference.kind)
        _require(self.correction in CORRECTIONS, "algorithm.correction", ", ".join(CORRECTIONS), self.correction)
        levels = ("token", "sequence", "geometric")
        _require(
            self.correction_level in levels, "algorithm.correction_level", ", ".join(levels), self.correction_level
        )
        _require(_finite(self.beta) and self.beta > 0, "algorithm.beta", "more than 0", self.beta)
        _require(0 <= self.label_smoothing <= 0.5, "algorithm.label_smoothing", "0 to 0.5", self.label_smoothing)
        for name in ("preference_weight", "quality_weight", "generation_weight"):
            value = getattr(self, name)
            _require(_finite(value) and value >= 0, f"algorithm.{name}", "at least 0", value)
        _require(0 <= self.delta_decay <= 1, "algorithm.delta_decay", "0 to 1", self.delta_decay)


@dataclass
class RolloutConfig:
    """What is drawn for a step, and how often it is learned from."""

    prompts: int = 16  # of a rollout, over all ranks
    samples: int = 8  # of each prompt
    max_tokens: int = 256  # of an answer, its end token included
    temperature: float = 1.0
    epochs: int = 1  # passes over a rollout
    minibatches: int = 1  # updates of a pass
    rounds: int = 1  # batches of prompts at most, until enough tell answers apart; 1: no dynamic sampling
    delay: int = 0  # 1: one step off: drawn with the weights before the last rollout was learned from
    rescore: bool = True  # the trainer's own log-probabilities as the old ones; False: the sampler's, where both agree
    row_tokens: int = 4096  # of a packed row, about
    shared: bool = (
        False  # the trainer computes the bits that a sampler with shared numerics does (m4ov_kernels.invariant)
    )
    seed: int = 0
    shown: int = 4  # answers of a rollout that are kept for the report
    engines: int = 0  # processes that draw, of each rank; 0: the engine is in the learner's own
    engine_kind: str = "processes"  # of this machine, or the actors of a "ray" cluster
    weights: str = "model"  # that the sampler draws with: the trained ones, or packed in int8, int4 or fp8

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "max_tokens", "epochs", "minibatches", "rounds", "row_tokens"):
            _require(getattr(self, name) >= 1, f"rollout.{name}", "at least 1", getattr(self, name))
        _require(self.delay in (0, 1), "rollout.delay", "0 or 1", self.delay)
        _require(self.shown >= 0, "rollout.shown", "at least 0", self.shown)
        ok = _finite(self.temperature) and self.temperature > 0
        _require(ok, "rollout.temperature", "more than 0", self.temperature)
        expected = f"at most prompts = {self.prompts}, as each has a prompt at least"
        _require(self.minibatches <= self.prompts, "rollout.minibatches", expected, self.minibatches)
        _require(self.engines >= 0, "rollout.engines", "at least 0", self.engines)
        kinds = " or ".join(ENGINE_KINDS)
        _require(self.engine_kind in ENGINE_KINDS, "rollout.engine_kind", kinds, self.engine_kind)
        ok = self.engines > 0 or self.engine_kind == "processes"
        _require(ok, "rollout.engines", f"at least 1 with engine_kind = {self.engine_kind}", self.engines)
        known = ", ".join(SAMPLER_WEIGHTS)
        _require(self.weights in SAMPLER_WEIGHTS, "rollout.weights", known, self.weights)
        expected = f"true with weights = {self.weights}, whose log-probabilities are not the trainer's"
        _require(self.rescore or self.weights == "model", "rollout.rescore", expected, self.rescore)

    @property
    def updates(self) -> int:
        """Steps of the optimizer that a rollout is good for."""
        return self.epochs * self.minibatches


@dataclass
class RLConfig:
    """Rewards, advantages and losses of an online run, and what is drawn for it."""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)

    def __post_init__(self) -> None:
        _require(self.algorithm.name in ONLINE, "algorithm.name", ", ".join(ONLINE), self.algorithm.name)
        same = self.algorithm.temperature == self.rollout.temperature
        expected = f"rollout.temperature = {self.rollout.temperature:g}, of the policy that is sampled"
        _require(same, "algorithm.temperature", expected, self.algorithm.temperature)
        if self.rewards.components:
            names = ", ".join(self.rewards.components)
            for name in self.advantages.objectives:
                known = name in self.rewards.components or name == self.advantages.outcome
                _require(known, f"advantages.objectives.{name}", f"one of the rewards {names}", name)
