"""The configuration tree of ``m4ov run quickstart``: data production and one arm of stages. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from m4ov.data_recipe import AllotConfig, DataBuildConfig, EngineConfig, QualityConfig, SourcesConfig
from m4ov.manifest import ArmConfig, CurriculumConfig, GateConfig, StageConfig, scaled
from m4ov.recipe import (
    CompareConfig,
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
    PerceptionConfig,
    RewardConfig,
    RewardsConfig,
    RLConfig,
    RolloutConfig,
)

#: The name of the one arm.
ARM = "quickstart"
_SOURCES = ("easy_vqa", "scenes", "digits", "sheets", "flags", "photos")


@dataclass
class ProductionConfig:
    """What the records are made of: as of ``m4ov data build``, with the embedded teacher, in this run's folder."""

    sources: SourcesConfig = field(
        default_factory=lambda: SourcesConfig(easy_vqa=4000, scenes=0, digits=1797, sheets=0, flags=0, photos=0)
    )
    allot: AllotConfig = field(default_factory=lambda: AllotConfig(questions=44_000))
    # Two of the single figures are alike far more often than two photographs: only copies are near duplicates.
    quality: QualityConfig = field(default_factory=lambda: QualityConfig(near_image=0))
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(kind="processes", shard_images=128))


def _policy() -> RLConfig:
    """Accuracy by pass@k and pass@1, and perception. Answers are a word: most of them are right before, so that prompts
    are drawn until enough tell answers apart."""
    return RLConfig(
        rollout=RolloutConfig(prompts=16, samples=8, max_tokens=8, rounds=6, shared=True, rescore=False),
        rewards=RewardsConfig(components={"accuracy": RewardConfig("exact-match", {"ignore_case": False})}),
        advantages=AdvantageConfig(k=4),
        perception=PerceptionConfig(weight=0.002, cap=2.0),
        algorithm=AlgorithmConfig("grpo", clip_high=0.28),
    )


@dataclass
class ReinforcementConfig:
    """A short stage of reinforcement learning behind the supervised ones, on their own questions, by one process."""

    steps: int = 30  # updates; 0: no such stage
    questions: int = 4000  # of all pools, to draw from
    policy: RLConfig = field(default_factory=lambda: _policy())
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(muon_lr=0.0003, lr=3e-4, weight_decay=0.0, warmup_steps=5)
    )
    samples: int = 8  # answers to a question that is held back, before and after

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "reinforcement.steps", "at least 0", self.steps)
        for name in ("questions", "samples"):
            _require(getattr(self, name) >= 1, f"reinforcement.{name}", "at least 1", getattr(self, name))
        components = self.policy.rewards.components
        _require(bool(components), "reinforcement.policy.rewards.components", "at least one", components)


@dataclass
class QuickstartConfig:
    """Everything `m4ov run quickstart` reads."""

    task: str = "quickstart"
    scale: float = 1.0  # of the steps of rounds and of train.steps: less for a try
    run: RunConfig = field(default_factory=RunConfig)
    production: ProductionConfig = field(default_factory=ProductionConfig)
    pools: dict[str, list[str]] = field(  # of the stages' mixtures, each a skill too → sources whose records it has
        default_factory=lambda: {"general": ["easy_vqa"], "domain": ["digits"]}
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    gates: GateConfig = field(default_factory=lambda: GateConfig(share=1 / 20, limit=256))  # of the produced images
    stages: dict[str, StageConfig] = field(default_factory=dict)  # one after the other
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    reinforcement: ReinforcementConfig = field(default_factory=ReinforcementConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    operators: bool = True  # a short benchmark of the operators, for the report

    def __post_init__(self) -> None:
        self._check_pools()
        for name, elsewhere in (
            ("easy_vqa_folder", "easy_vqa"),
            ("held_out_digits", "held_out_digits"),
            ("split_seed", "split_seed"),
        ):
            value = getattr(self.production.sources, name)
            _require(
                value == getattr(SourcesConfig(), name),
                f"production.sources.{name}",
                f"nothing: data.{elsewhere}",
                value,
            )
        try:
            self.manifest()
        except ValueError as error:  # by the names that things have here
            named = re.sub(rf"\barms\.{ARM}\.steps\b", "train.steps", str(error))
            raise ValueError(re.sub(rf"\barms\.{ARM}\.", "", named)) from None

    def _check_pools(self) -> None:
        expected, owner = f"sources: {', '.join(_SOURCES)}", dict[str, str]()
        for pool, sources in self.pools.items():
            _require(bool(sources), f"pools.{pool}", expected, sources)
            for source in sources:
                _require(source in _SOURCES, f"pools.{pool}", expected, source)
                _require(source not in owner, f"pools.{pool}", f"what {owner.get(source)} has not", source)
                owner[source] = pool

    def manifest(self) -> CurriculumConfig:
        """The training as a curriculum of one arm; ``scale`` is applied."""
        of_pool = {pool: ", ".join(sources) for pool, sources in self.pools.items()}
        return scaled(
            CurriculumConfig(
                seeds=[self.run.seed],
                scale=self.scale,
                run=replace(self.run, seed=0),
                data=self.data,
                model=self.model,
                optim=self.optim,
                train=replace(self.train, steps=TrainConfig().steps),
                parallel=self.parallel,
                evaluate=self.evaluate,
                gates=self.gates,
                pools=of_pool,
                skills={pool: f"held back: {sources}" for pool, sources in of_pool.items()},
                arms={ARM: ArmConfig(steps=self.train.steps, stages=self.stages)},
            )
        )

    @property
    def updates(self) -> int:
        """Steps of reinforcement learning, ``scale`` applied: whole rollouts."""
        if not self.reinforcement.steps:
            return 0
        each = self.reinforcement.policy.rollout.updates
        return max(1, round(self.reinforcement.steps * self.scale / each)) * each

    def build(self) -> DataBuildConfig:
        """The data production; what is held out of the digits, and where easy-vqa stands, is as ``data`` has it."""
        data, made = self.data, self.production
        return DataBuildConfig(
            run=replace(self.run, folder=f"{self.run.folder}/data"),
            sources=replace(
                made.sources,
                easy_vqa_folder=data.easy_vqa,
                held_out_digits=data.held_out_digits,
                split_seed=data.split_seed,
            ),
            allot=made.allot,
            quality=made.quality,
            engine=made.engine,
        )
