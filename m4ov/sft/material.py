"""What arms are made of and measured by: pools, held-out records, the tokenizer of the pools' text."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from m4ov.data import DataError, Pool, RecordError, Split, digits, easy_vqa
from m4ov.data.recorded import divide, recorded
from m4ov.data.shards import shards_of
from m4ov.manifest import SOURCES, ArmConfig, CurriculumConfig, pools_of
from m4ov.sft.task import Task, task_of


@dataclass(frozen=True)
class Material:
    """What arms are made of and measured by.

    Attributes:
        task: the tokenizer, trained on the pools' text, and the model's configuration.
        pools: name → samples; those that the manifest gives no source are not there.
        gates: skill → held-out records that decisions rest on.
        tests: skill → others, for the final figures.
    """

    task: Task
    pools: dict[str, Pool]
    gates: dict[str, Split]
    tests: dict[str, Split]


def material_of(
    config: CurriculumConfig, pools: dict[str, Pool], gates: dict[str, Split], tests: dict[str, Split]
) -> Material:
    """With the tokenizer trained on the pools' text, in their order."""
    samples = (sample for pool in pools.values() for sample in pool.split.samples)
    texts = [text for sample in samples for text in (sample.question, sample.answer)]
    return Material(task_of(config.data, config.model, config.train.precision, texts), pools, gates, tests)


def gather(config: CurriculumConfig, console: Console) -> Material:
    """Read the pools and the skills' records, train the tokenizer: a function of the manifest and its files alone.

    Raises:
        DataError: data is missing or broken, and is not to be skipped; or a skill has too little to be divided.
    """
    sources = _Sources(config, console)
    pools = {name: sources.pool(name, source) for name, source in config.pools.items() if source}
    divided = {
        name: divide(sources.held_out(name, source), config.gates.share)
        for name, source in config.skills.items()
        if source
    }
    gates, tests = ({name: parts[place] for name, parts in divided.items()} for place in (0, 1))
    return material_of(config, pools, gates, tests)


class _Sources:
    """Pools and held-out splits by source; packaged ones are read once."""

    def __init__(self, config: CurriculumConfig, console: Console) -> None:
        self.config, self.console = config, console
        self._read: dict[str, tuple[Split, Split]] = {}

    def pool(self, name: str, source: str) -> Pool:
        data = self.config.data
        if source == "easy-vqa":
            return Pool(name, self._packaged(source)[0], data.questions_per_image, flip=data.flip)
        if source == "digits":
            return Pool(name, self._packaged(source)[0], shift=data.shift)
        return Pool(name, recorded(name, source, data.image_size), by_sample=True)

    def held_out(self, name: str, source: str) -> Split:
        if source in SOURCES:
            return dataclasses.replace(self._packaged(source)[1], name=name)
        return recorded(name, source, self.config.data.image_size)

    def _packaged(self, source: str) -> tuple[Split, Split]:
        data = self.config.data
        if source not in self._read and source == "digits":
            self._read[source] = digits(data.image_size, held_out=data.held_out_digits, split_seed=data.split_seed)
        if source not in self._read:
            options = {"folder": data.easy_vqa, "on_bad_image": data.on_bad_image}
            training, test = (easy_vqa(split, data.image_size, **options) for split in ("train", "test"))
            for split in (training, test):
                say_left_out(split, self.console)
            self._read[source] = training, test
        return self._read[source]


def say_left_out(split: Split, console: Console) -> None:
    """Which images a split is without, the first five by name."""
    for line in split.left_out[:5]:
        console.print(f"[yellow]left out: {line}[/yellow]")
    if len(split.left_out) > 5:
        console.print(f"[yellow]left out: {len(split.left_out) - 5} more[/yellow]")


def missing_pools(config: CurriculumConfig, name: str) -> list[str]:
    """Pools without a source that an arm, or one that it starts from, draws from: such an arm is left out."""
    arm = config.arms[name]
    missing = [pool for pool in sorted(pools_of(arm)) if not config.pools[pool]]
    return missing + (missing_pools(config, arm.start) if arm.start else [])


def arms_of(config: CurriculumConfig) -> list[tuple[str, ArmConfig]]:
    """The arms that can be trained, in their order."""
    return [(name, arm) for name, arm in config.arms.items() if not missing_pools(config, name)]


def fingerprint_of(config: CurriculumConfig, seed: int) -> dict[str, Any]:
    """What a seed's arms depend on, flat: key → value, with a digest of each file of records. Another folder, other
    ranks and other ways of looking at it are not in it.

    Raises:
        DataError: a file of records is missing.
    """
    tree = dataclasses.asdict(config)
    parts = {name: tree[name] for name in ("data", "model", "optim", "gates", "pools", "skills", "arms")}
    trained = {name: tree["train"][name] for name in ("precision", "patch", "fp8")}
    files = {*config.pools.values(), *config.skills.values()} - {"", *SOURCES}
    return flat({**parts, "seed": seed, "train": trained}) | digests(files)


def digests(sources: Iterable[str | Path]) -> dict[str, str]:
    """Records, by their path → SHA-256 of the content of their files.

    Raises:
        DataError: there is no such file.
    """
    found = {}
    for source in sorted(map(str, sources)):
        digest = hashlib.sha256()
        try:
            for file in shards_of(source):
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                digest.update(file.read_bytes())
        except (RecordError, OSError) as error:
            raise DataError(str(error)) from error
        found[f"records of {source}"] = digest.hexdigest()
    return found


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one: dotted key → value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
