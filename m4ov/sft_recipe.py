"""The configuration tree of ``m4ov run sft``: a checkpoint, or a new model, trained on records from files. Plain
dataclasses, checked when they are made. No torch here."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from m4ov.manifest import AVERAGES, PARTS, AverageConfig, LoraConfig
from m4ov.recipe import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TextConfig, TrainConfig, VisionConfig


@dataclass
class SftDataConfig:
    """Conversations with images of any size, in any format that :mod:`m4ov.data.formats` reads."""

    train: str = ""  # a file, or a folder of files
    held_out: str = ""  # the same, never trained on; empty: a share of data.train, or nothing is measured
    held_out_share: float = 0.0  # of data.train, where data.held_out is empty; what shows one image stays together
    format: str = ""  # its name; empty: detected, file by file
    chat: str = "auto"  # what stands around turns: as the checkpoint's template has it; or chatml, plain
    capacity: int = 2048  # tokens of a packed row
    rows: int = 4  # of a step, over all ranks
    min_pixels: int = 0  # of an image, which is scaled up; 0: the checkpoint's processor's, of a new model 64 x 64
    max_pixels: int = 0  # of an image, which is scaled down; 0: the same (256 x 256), and at most half a row of tokens
    vocabulary: int = 2048  # of a new model's tokenizer, at most
    too_long: str = "turns"  # a record of more than a row: loses "turns" at its end; is "drop"ped; or an "error"
    max_bad: float = 0.1  # share of the records that may be unusable; they are named in quarantine.jsonl
    shuffle: bool = True
    window: float = 4.0  # steps' worth of tokens that wait to be packed: more fills rows better
    workers: int = 2  # threads that decode images
    ahead: int = 2  # steps that are made ahead of the one that trains

    def __post_init__(self) -> None:
        _require(0 <= self.held_out_share < 1, "data.held_out_share", "0 or more, less than 1", self.held_out_share)
        chats = ("auto", "chatml", "plain")
        _require(self.chat in chats, "data.chat", " or ".join(chats), self.chat)
        kinds = ("turns", "drop", "error")
        _require(self.too_long in kinds, "data.too_long", " or ".join(kinds), self.too_long)
        for name in ("capacity", "rows", "workers", "ahead"):
            _require(getattr(self, name) > 0, f"data.{name}", "at least 1", getattr(self, name))
        for name in ("min_pixels", "max_pixels"):
            _require(getattr(self, name) >= 0, f"data.{name}", "at least 0", getattr(self, name))
        _require(self.vocabulary >= 300, "data.vocabulary", "at least 300 (256 bytes, 8 special)", self.vocabulary)
        _require(0 <= self.max_bad <= 1, "data.max_bad", "0 to 1", self.max_bad)
        _require(self.window >= 1, "data.window", "at least 1", self.window)


@dataclass
class SftModelConfig(ModelConfig):
    """A checkpoint, or a new model of these sizes."""

    path: str = ""  # a folder as Hugging Face has it, of a Qwen3-VL, dense or with experts; empty: a new model

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.implementation == "m4ov", "model.implementation", "m4ov", self.implementation)
        if self.path:
            expected = "nothing beside model.path, whose sizes they are"
            for name, default in (("vision", VisionConfig()), ("text", TextConfig())):
                _require(getattr(self, name) == default, f"model.{name}", expected, getattr(self, name))


@dataclass
class SftOptimConfig(OptimConfig):
    """Rates of 0 are chosen: 0.012 and 2e-3 for a new model; 3e-4 and 1e-5 for a checkpoint; 2e-4 for its adapters."""

    muon_lr: float = 0.0
    lr: float = 0.0
    warmup_steps: int = 20


@dataclass
class SftEvaluateConfig:
    """What is measured on the held-out records."""

    every: int = 50  # steps between measurements of the loss; it is measured at the start and at the end too
    limit: int = 512  # records, evenly spread; 0: all
    short: int = 16  # an answer of so many tokens at most, its end included, is compared with what the model says
    examples: int = 12  # shown in the report, answered token after token by transformers

    def __post_init__(self) -> None:
        _require(self.every > 0, "evaluate.every", "at least 1", self.every)
        for name in ("limit", "short", "examples"):
            _require(getattr(self, name) >= 0, f"evaluate.{name}", "at least 0", getattr(self, name))


@dataclass
class SftConfig:
    """Everything `m4ov run sft` reads."""

    task: str = "sft"
    run: RunConfig = field(default_factory=lambda: RunConfig(folder="runs/sft"))
    data: SftDataConfig = field(default_factory=SftDataConfig)
    model: SftModelConfig = field(default_factory=SftModelConfig)
    freeze: list[str] = field(default_factory=list)  # parts that keep their weights
    lora: LoraConfig = field(default_factory=LoraConfig)
    average: AverageConfig = field(default_factory=AverageConfig)  # "tail": over the last fifth of the steps
    optim: SftOptimConfig = field(default_factory=SftOptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluate: SftEvaluateConfig = field(default_factory=SftEvaluateConfig)
    dtype: str = "auto"  # of the written model: fp32, bf16; auto: of a checkpoint's files, of a new model fp32

    def __post_init__(self) -> None:
        for part in self.freeze:
            _require(part in PARTS, "freeze", f"some of {', '.join(PARTS)}", part)
        lora, average = self.lora, self.average
        trains = bool(lora.rank) or not set(PARTS) <= set(self.freeze)
        _require(trains, "freeze", "something left to train", self.freeze)
        _require(lora.rank >= 0, "lora.rank", "at least 0", lora.rank)
        _require(lora.alpha > 0, "lora.alpha", "at least 1", lora.alpha)
        _require(0 <= lora.dropout < 1, "lora.dropout", "at least 0 and less than 1", lora.dropout)
        _require(bool(lora.targets), "lora.targets", "names of linear layers", lora.targets)
        whole = lora.rank == 0 or self.parallel.tp == 1
        _require(whole, "lora.rank", "0 with parallel.tp above 1, where linears are split", lora.rank)
        _require(average.kind in AVERAGES, "average.kind", " or ".join(AVERAGES), average.kind)
        _require(0 < average.decay < 1, "average.decay", "more than 0 and less than 1", average.decay)
        dtypes = ("auto", "fp32", "bf16")
        _require(self.dtype in dtypes, "dtype", " or ".join(dtypes), self.dtype)
        # What the quickstart's trees have and is another's here is refused, not passed over.
        accumulate = self.train.accumulate
        _require(accumulate == 1, "train.accumulate", "1: a rank takes its share of data.rows one by one", accumulate)
        _require(self.train.fp8 == "off", "train.fp8", "off", self.train.fp8)
        for name in ("muon_lr", "lr"):
            _require(getattr(self.optim, name) >= 0, f"optim.{name}", "at least 0", getattr(self.optim, name))


def resolved(config: SftConfig) -> SftConfig:
    """The configuration of a run, with the learning rates that are chosen.

    Raises:
        ValueError: it names no data; the recipe that comes with the package does not.
    """
    _require(bool(config.data.train), "data.train", "a file or folder of records", config.data.train)
    config = copy.deepcopy(config)
    muon, rest = (3e-4, 1e-5) if config.model.path else (0.012, 2e-3)
    if config.lora.rank:
        rest = 2e-4
    config.optim.muon_lr = config.optim.muon_lr or muon
    config.optim.lr = config.optim.lr or rest
    return config


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
