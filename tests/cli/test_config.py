"""Recipes: what is right is loaded, what is wrong is refused with its place, its name and the nearest right one."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from m4ov import config


class Reduction(enum.Enum):
    MEAN = "mean"
    SUM = "sum"


@dataclass
class Optimizer:
    lr: float = 1e-3
    steps: int = 3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    kind: Literal["adamw", "muon"] = "adamw"
    reduction: Reduction = Reduction.MEAN
    folder: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr: expected more than 0, got {self.lr}")


@dataclass
class Source:
    name: str = ""
    weight: float = 1.0


@dataclass
class Recipe:
    task: str = "test"
    optimizer: Optimizer = field(default_factory=Optimizer)
    sources: list[Source] = field(default_factory=list)
    shuffle: bool = False


@pytest.fixture
def load(tmp_path):
    def loader(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return config.load(Recipe, path, overrides)

    return loader


def test_file_and_overrides_fill_the_tree(load):
    loaded = load(
        "optimizer: {lr: 1e-2, kind: muon}\nsources: [{name: a}, {name: b, weight: 2}]",
        "optimizer.steps=7",
        "optimizer.betas=[0.8, 0.9]",
        "optimizer.reduction=sum",
        "optimizer.folder=/data/x=y",
        "shuffle=true",
    )
    assert isinstance(loaded, Recipe)
    assert isinstance(loaded.optimizer, Optimizer)
    assert loaded.optimizer == Optimizer(0.01, 7, [0.8, 0.9], "muon", Reduction.SUM, "/data/x=y")
    assert loaded.sources == [Source("a"), Source("b", 2.0)]
    assert loaded.shuffle is True


def test_an_empty_file_gives_the_defaults(load):
    assert load("") == Recipe()


def test_the_last_override_wins(load):
    assert load("optimizer: {steps: 1}", "optimizer.steps=2", "optimizer.steps=3").optimizer.steps == 3


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("optimzer: {lr: 1}", "optimzer", "optimizer"),
        ("optimizer: {lrr: 1}", "optimizer.lrr", "optimizer.lr"),
        ("lr: 1", "lr", "optimizer.lr"),  # the right name in the wrong place
        ("sources: [{name: a}, {nme: b}]", "sources.1.nme", "sources.1.name"),
        ("optimizer: {shufle: true}", "optimizer.shufle", "shuffle"),
    ],
)
def test_an_unknown_key_in_a_file_names_the_nearest(load, text, key, nearest):
    with pytest.raises(config.ConfigError) as error:
        load(text)
    assert f"recipe.yaml: unknown key {key}; did you mean {nearest}?" in str(error.value)


def test_an_unknown_key_in_an_override_names_the_nearest(load):
    with pytest.raises(config.ConfigError, match=r"override 'optimizer.stpes=3': unknown key optimizer.stpes; did you"):
        load("", "optimizer.stpes=3")


def test_a_key_like_no_other_lists_what_is_valid(load):
    with pytest.raises(config.ConfigError, match="unknown key zzz; valid here: task, optimizer, sources, shuffle"):
        load("zzz: 1")


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optimizer.lr=fast", "optimizer.lr", "float"),
        ("optimizer.steps=1.5", "optimizer.steps", "int"),
        ("optimizer.steps=true", "optimizer.steps", "int"),
        ("optimizer.steps=many", "optimizer.steps", "int"),
        ("optimizer.limit=0.5", "optimizer.limit", "int"),
        ("optimizer.steps=null", "optimizer.steps", "int"),
        ("optimizer.kind=sgd", "optimizer.kind", "adamw"),
        ("optimizer.reduction=none", "optimizer.reduction", "Reduction"),
        ("optimizer=3", "optimizer", "mapping"),
        ("sources=a", "sources", "list"),
        ("sources=[1]", "sources.0", "mapping"),
        ("shuffle=3", "shuffle", "bool"),
        ("optimizer.betas=0.9", "optimizer.betas", "list"),
    ],
)
def test_a_wrong_type_is_named(load, override, key, expected):
    with pytest.raises(config.ConfigError) as error:
        load("", override)
    assert f"override {override!r}: {key}: " in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_that_the_dataclass_refuses(load):
    with pytest.raises(config.ConfigError, match=r"optimizer\.lr: expected more than 0, got -1"):
        load("", "optimizer.lr=-1")


@pytest.mark.parametrize("override", ["optimizer.steps", "=3", "optimizer..steps=3", "a b=3", "-x=1"])
def test_an_override_without_key_or_value(load, override):
    with pytest.raises(config.ConfigError, match="expected key=value"):
        load("", override)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "task: a\ntask: b", "\x00"])
def test_a_file_that_is_no_mapping(load, text):
    with pytest.raises(config.ConfigError, match=r"recipe.yaml: (not a YAML mapping|expected a mapping)"):
        load(text)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(config.ConfigError, match="no such file"):
        config.find(str(tmp_path / "none.yaml"))
    with pytest.raises(config.ConfigError, match="is a folder"):
        config.find(str(tmp_path))


def test_an_unknown_recipe_lists_the_recipes():
    assert "quickstart" in config.recipes()
    with pytest.raises(config.ConfigError) as error:
        config.find("quickstrt")
    assert "did you mean quickstart?" in str(error.value)
    assert all(name in str(error.value) for name in config.recipes())


def test_the_shipped_recipes_load():
    from m4ov.cli import TASKS, _resolve

    for name, path in config.recipes().items():
        task = config.task(path)
        assert task in TASKS, f"{name} names the task {task!r}"
        config.load(_resolve(TASKS[task][0]), path)


def test_the_task_can_be_overridden(tmp_path):
    path = Path(tmp_path / "r.yaml")
    path.write_text("task: a")
    assert config.task(path) == "a"
    assert config.task(path, ["task=b"]) == "b"
    path.write_text("other: 1")
    assert config.task(path) is None
