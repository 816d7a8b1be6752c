"""The manifest of a curriculum: arms made of stages, what each trains on, what it must reach and must not lose.

Names are keys: of pools, skills, arms and stages, so an override can reach any value
(``arms.curriculum.stages.knowledge.rounds=3``). Everything is checked when the manifest is made, by its full name. No
torch here.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

from m4ov.recipe import DataConfig, EvaluateConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

#: Parts of a model that can be frozen: the tower without its mergers, the mergers, the layers of the language model
#: with its last norm, the embeddings with the head.
PARTS = ("vision", "merger", "language", "embeddings")
AVERAGES = ("none", "ema", "tail")
#: Packaged sources of pools and skills; anything else is the path of records.
SOURCES = ("easy-vqa", "digits")


@dataclass
class TargetConfig:
    """What a skill must reach for a stage to end; one of the two."""

    at_least: float = 0.0  # share of right answers
    of_start: float = 0.0  # times its share when the arm began


@dataclass
class GuardConfig:
    """A skill that a stage must keep, and the replay that keeps it.

    Its share of right answers may lie ``epsilon`` below its start: the higher of its shares when the arm and when the
    stage began, so that what stages lose does not add up. Where it lies lower after a round, replay of ``pool`` rises:
    ratio ← min(most, factor · ratio + add).
    """

    epsilon: float | None = None
    pool: str = ""  # what is replayed
    replay: float = 0.0  # ratio of a step's images that are replayed, at first
    factor: float = 1.0
    add: float = 0.1
    most: float = 0.5


@dataclass
class LoraConfig:
    """Low-rank adapters instead of the weights themselves; merged into them when the stage ends."""

    rank: int = 0  # 0: the weights themselves are trained
    alpha: int = 16  # adapters count alpha / rank times
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])  # names of linears


@dataclass
class AverageConfig:
    """What a stage hands on, and is measured by, instead of its last float32 weights."""

    kind: str = "none"  # "ema": exponential moving average from the stage's start; "tail": mean over the round's steps
    decay: float = 0.99  # of "ema", a step


@dataclass
class StageConfig:
    """Rounds of training; after each the skills are measured and the gate decides.

    The stage ends when all targets hold and every guarded skill is within its epsilon; without targets, when its rounds
    are over.
    """

    mixture: dict[str, float] = field(default_factory=dict)  # pool → weight, of the images that are not replayed
    steps: int = 25  # of a round
    rounds: int = 0  # at most; 0: as many as the arm's budget has
    learning_rate: float = 1.0  # times optim.muon_lr and optim.lr, and the arm's cosine
    warmup: int = 10  # steps
    freeze: list[str] = field(default_factory=list)
    targets: dict[str, TargetConfig] = field(default_factory=dict)  # skill → what it must reach
    guards: dict[str, GuardConfig] = field(default_factory=dict)  # skill → how it is kept
    lora: LoraConfig = field(default_factory=LoraConfig)
    average: AverageConfig = field(default_factory=AverageConfig)


@dataclass
class ArmConfig:
    """A training of one model: stages one after the other, with a budget and one cosine over it."""

    start: str = ""  # an arm above this one, whose model it begins with; empty: random weights
    steps: int = 0  # budget of all stages
    stages: dict[str, StageConfig] = field(default_factory=dict)


@dataclass
class GateConfig:
    """How skills are measured after a round: on some of the held-out images, which are not in the final figures."""

    share: float = 1 / 3  # of the held-out images of each skill
    limit: int = 600  # questions of a skill; 0: all


@dataclass
class CurriculumConfig:
    """Everything `m4ov run curriculum` reads."""

    task: str = "curriculum"
    seeds: list[int] = field(default_factory=lambda: [0])  # each a run of all arms, in a folder of its own
    scale: float = 1.0  # of the steps of rounds and budgets: less for a try
    run: RunConfig = field(default_factory=lambda: RunConfig(folder="runs/curriculum"))
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    gates: GateConfig = field(default_factory=GateConfig)
    pools: dict[str, str] = field(default_factory=dict)  # easy-vqa, digits, a file of records; empty: none yet
    # The same; their held-out part, or records never trained on. Empty: not measured.
    skills: dict[str, str] = field(default_factory=dict)
    arms: dict[str, ArmConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_common()
        _require(any(self.skills.values()), "skills", "held-out data of at least one", self.skills)
        for name, source in self.skills.items():
            trained = [pool for pool, other in self.pools.items() if other == source and source not in ("", *SOURCES)]
            _require(not trained, f"skills.{name}", f"other records than those of pool {trained[:1]}", source)
        done: list[str] = []
        for name, arm in self.arms.items():
            known = "an arm that stands above it" + (f" ({', '.join(done)})" if done else ", or nothing")
            what = "itself: a cycle" if arm.start == name else arm.start
            below = (
                " which stands below: a cycle or a wrong order" if arm.start in list(self.arms)[len(done) + 1 :] else ""
            )
            _require(not arm.start or arm.start in done, f"arms.{name}.start", known, f"{what}{below}")
            self._check_arm(f"arms.{name}", arm)
            done.append(name)

    def _check_common(self) -> None:
        _require(bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "seeds", "different ones", self.seeds)
        _require(min(self.seeds) >= 0, "seeds", "at least 0", self.seeds)
        _require(0 < self.scale < math.inf, "scale", "more than 0", self.scale)
        _require(0 < self.gates.share < 1, "gates.share", "more than 0 and less than 1", self.gates.share)
        _require(self.gates.limit >= 0, "gates.limit", "at least 0", self.gates.limit)
        for name in ("pools", "skills", "arms"):
            _require(bool(getattr(self, name)), name, "at least one", getattr(self, name))
        # What the quickstart's trees have and arms say for themselves is refused, not passed over.
        elsewhere = (
            ("train.steps", self.train.steps, TrainConfig().steps, "nothing: arms.NAME.steps"),
            ("train.fp8", self.train.fp8, "off", "off"),
            ("run.seed", self.run.seed, 0, "nothing: seeds=[…]"),
            ("data.digits_per_step", self.data.digits_per_step, DataConfig().digits_per_step, "nothing: mixtures"),
            ("model.implementation", self.model.implementation, "m4ov", "m4ov"),
            ("optim.warmup_steps", self.optim.warmup_steps, OptimConfig().warmup_steps, "nothing: stages' warmup"),
        )
        for name, value, default, expected in elsewhere:
            _require(value == default, name, expected, value)

    def _check_arm(self, at: str, arm: ArmConfig) -> None:
        _require(arm.steps > 0, f"{at}.steps", "at least 1", arm.steps)
        _require(bool(arm.stages), f"{at}.stages", "at least one", arm.stages)
        for name, stage in arm.stages.items():
            self._check_stage(f"{at}.stages.{name}", stage)

    def _check_stage(self, at: str, stage: StageConfig) -> None:
        _require(bool(stage.mixture), f"{at}.mixture", "pools with weights", stage.mixture)
        for pool, weight in stage.mixture.items():
            self._known(f"{at}.mixture", "pool", pool, self.pools)
            _require(0 < weight < math.inf, f"{at}.mixture.{pool}", "more than 0", weight)
        _require(stage.steps > 0, f"{at}.steps", "at least 1", stage.steps)
        _require(stage.rounds >= 0, f"{at}.rounds", "at least 0", stage.rounds)
        _require(stage.warmup >= 0, f"{at}.warmup", "at least 0", stage.warmup)
        _require(0 < stage.learning_rate < math.inf, f"{at}.learning_rate", "more than 0", stage.learning_rate)
        for part in stage.freeze:
            self._known(f"{at}.freeze", "part", part, PARTS)
        trains = bool(stage.lora.rank) or not set(PARTS) <= set(stage.freeze)
        _require(trains, f"{at}.freeze", "something left to train", stage.freeze)
        average, lora = stage.average, stage.lora
        _require(average.kind in AVERAGES, f"{at}.average.kind", " or ".join(AVERAGES), average.kind)
        _require(0 < average.decay < 1, f"{at}.average.decay", "more than 0 and less than 1", average.decay)
        _require(lora.rank >= 0, f"{at}.lora.rank", "at least 0", lora.rank)
        _require(lora.alpha > 0, f"{at}.lora.alpha", "at least 1", lora.alpha)
        _require(0 <= lora.dropout < 1, f"{at}.lora.dropout", "at least 0 and less than 1", lora.dropout)
        _require(bool(lora.targets), f"{at}.lora.targets", "names of linear layers", lora.targets)
        measured = {name: source for name, source in self.skills.items() if source}
        for skill, target in stage.targets.items():
            self._known(f"{at}.targets", "skill", skill, measured)
            here = f"{at}.targets.{skill}"
            one = (target.at_least > 0) is not (target.of_start > 0)
            _require(one, here, "at_least or of_start, more than 0", f"{target.at_least:g} and {target.of_start:g}")
            _require(0 <= target.at_least <= 1, f"{here}.at_least", "a share, at most 1", target.at_least)
            _require(0 <= target.of_start < math.inf, f"{here}.of_start", "at least 0", target.of_start)
        for skill, guard in stage.guards.items():
            self._known(f"{at}.guards", "skill", skill, measured)
            self._check_guard(f"{at}.guards.{skill}", guard)
        most = sum(guard.most for guard in stage.guards.values())
        _require(most < 1, f"{at}.guards", "a sum of most below 1: the mixture needs some of a step", most)

    def _check_guard(self, at: str, guard: GuardConfig) -> None:
        epsilon = guard.epsilon
        right = epsilon is not None and 0 <= epsilon < 1
        _require(right, f"{at}.epsilon", "how far the share may fall, from 0 to less than 1", epsilon)
        _require(bool(guard.pool), f"{at}.pool", "the pool that is replayed", guard.pool)
        self._known(f"{at}.pool", "pool", guard.pool, self.pools)
        _require(0 <= guard.replay <= guard.most, f"{at}.replay", f"0 to most ({guard.most:g})", guard.replay)
        _require(1 <= guard.factor < math.inf, f"{at}.factor", "at least 1", guard.factor)
        _require(0 <= guard.add < 1, f"{at}.add", "at least 0 and less than 1", guard.add)
        rises = guard.add > 0 or (guard.factor > 1 and guard.replay > 0)
        _require(
            rises, at, "a rule by which replay rises: add above 0, or factor above 1 and replay above 0", "neither"
        )

    @staticmethod
    def _known(at: str, what: str, name: str, known: dict[str, str] | tuple[str, ...]) -> None:
        if name not in known:
            raise ValueError(f"{at}: no {what} is named {name!r}; {what}s: {', '.join(known)}")


def scaled(config: CurriculumConfig) -> CurriculumConfig:
    """The manifest with ``scale`` applied to its steps, and then 1."""
    config = copy.deepcopy(config)
    for arm in config.arms.values():
        arm.steps = max(1, round(arm.steps * config.scale))
        for stage in arm.stages.values():
            stage.steps = max(1, round(stage.steps * config.scale))
    config.scale = 1.0
    return config


def pools_of(arm: ArmConfig) -> set[str]:
    """The names of the pools that an arm draws from."""
    mixed = {pool for stage in arm.stages.values() for pool in stage.mixture}
    return mixed | {guard.pool for stage in arm.stages.values() for guard in stage.guards.values()}


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
