"""The configuration tree of ``m4ov run quickstart``: data production and one arm of stages. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from m4ov.data_recipe import AllotConfig, DataBuildConfig, EngineConfig, QualityConfig, SourcesConfig
from m4ov.hybrid_recipe import ChainsConfig, policy, policy_optim
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
from m4ov.rl_recipe import RLConfig

#: The name of the one arm.
ARM = "quickstart"
#: The name of the pool that is composed, not produced.
CHAINS = "chains"
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


@dataclass
class ReinforcementConfig:
    """A short stage of reinforcement learning behind the supervised ones, on chains, by one process."""

    steps: int = 20  # updates; 0: no such stage
    policy: RLConfig = field(default_factory=policy)
    optim: OptimConfig = field(default_factory=policy_optim)
    samples: int = 8  # answers to a held-out chain, before and after

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "reinforcement.steps", "at least 0", self.steps)
        _require(self.samples >= 1, "reinforcement.samples", "at least 1", self.samples)
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
    chains: ChainsConfig = field(  # a pool of the stages too, in addition to ``pools``
        default_factory=lambda: ChainsConfig(grids=3000, policy_grids=400, held_out=80)
    )
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
        _require(CHAINS not in self.pools, f"pools.{CHAINS}", "another name", CHAINS)
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
                pools=of_pool | {CHAINS: "grids of easy_vqa and digits"},
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
