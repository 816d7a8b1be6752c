"""All steps in order: what is done is left alone, what is not is made, and the results stand in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from m4ov.data.density import write_audits
from m4ov.data.labels import LabelTree
from m4ov.data.production import balancing, images, matching, quality, questions, teachers
from m4ov.data.production.engines import Engine, engine_of
from m4ov.data.production.steps import BuildError, Done, Result, Task, add, done, read_rows, sweep, tidy
from m4ov.data.records import Record
from m4ov.data.shards import write_shards
from m4ov.data.whole import write_whole
from m4ov.data_recipe import DataBuildConfig

#: Step → what it is called for people. The four stages: labels; match and allot; questions; check, judge and select.
#: ``balance`` and ``rematch`` are left out where ``labels.balance`` is 0.
STEPS = {
    "images": "images",
    "labels": "label trees",
    "match": "scores and labels of images",
    "balance": "balance of topics",
    "rematch": "finer topics of images",
    "allot": "allotment",
    "questions": "questions",
    "check": "quality, one by one",
    "judge": "quality, all together",
    "select": "selection",
}
#: Called as ``watch(step, shards, done)`` when a step begins and whenever a shard is done.
Watch = Callable[[str, int, int], None]


@dataclass
class Production:
    """What came out.

    Attributes:
        folder: the run folder.
        records: the shards of accepted records.
        counts: step → name → whole number, over all shards; equal for equal recipes.
        reasons: (stage, reason) → rejections.
        spent: what this run paid a teacher for; nothing, where it was done before or came from the cache.
        made, before: shards made by this run, and found done.
    """

    folder: Path
    records: list[Path]
    counts: dict[str, dict[str, int]]
    reasons: dict[tuple[str, str], int]
    spent: dict[str, float]
    made: int
    before: int

    def to_json(self) -> dict[str, Any]:
        """What does not depend on how, and how often, it was run."""
        reasons = [{"stage": stage, "reason": why, "count": n} for (stage, why), n in sorted(self.reasons.items())]
        return {"counts": self.counts, "rejected": reasons}


@dataclass
class _Flow:
    """One run over all steps."""

    config: DataBuildConfig
    engine: Engine
    watch: Watch
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    made: int = 0
    before: int = 0
    finished: dict[str, list[Done]] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return Path(self.config.run.folder)

    def step(
        self,
        name: str,
        function: Callable[[Task], Result],
        inputs: Sequence[dict[str, str]],
        settings: Sequence[dict[str, Any]],
        context: dict[str, Any] | None = None,
    ) -> list[Done]:
        """Run one step; a shard for each of ``inputs`` and ``settings``.

        Raises:
            KeyboardInterrupt: says where it stopped.
        """
        tidy(self.root / "steps" / name, len(inputs))
        tasks = [
            Task(str(self.root), name, index, function, files, values, context or {})
            for index, (files, values) in enumerate(zip(inputs, settings, strict=True))
        ]
        found = {task.index: there for task in tasks if (there := done(task)) is not None}
        self.before += len(found)
        self.watch(name, len(tasks), len(found))
        try:
            for one in self.engine.map([task for task in tasks if task.index not in found]):
                found[one.index] = one
                self.made += 1
                add(self.spent, one.spent)
                self.watch(name, len(tasks), len(found))
        except KeyboardInterrupt:
            where = f"{len(found)} of {len(tasks)} shards of {STEPS[name]}"
            raise KeyboardInterrupt(f"stopped after {where}; the same command goes on from there") from None
        self.counts[name] = {}
        for index in range(len(tasks)):
            add(self.counts[name], found[index].counts)
        self.finished[name] = [found[index] for index in range(len(tasks))]
        return self.finished[name]

    def outputs(self, step: str, kind: str) -> list[Path]:
        """The files of one kind that a step wrote, in order; none, if it was left out."""
        return [self.root / name for one in self.finished.get(step, ()) for name in one.of(kind)]


def build(config: DataBuildConfig, watch: Watch = lambda *_: None) -> Production:
    """Produce data as a recipe says. The same recipe in the same folder goes on where it was cut off; one that was
    changed makes anew what depends on the change. The folder's owner sees to it that nobody else works in it.

    Raises:
        BuildError, DataError, LabelError, WriteError, ImportError, ValueError: one line says what is wrong.
        KeyboardInterrupt: Ctrl-C; what was done is kept.
    """
    seed = {"seed": config.run.seed}
    trees = {name: _tree_text(getattr(config.labels, name)) for name in ("topics", "capabilities")}
    shards = images.plan(config.sources, config.engine.shard_images)
    if not shards:
        raise BuildError("sources: no image is there")
    sweep(Path(config.run.folder))
    engine = engine_of(config.engine)
    try:
        flow = _Flow(config, engine, watch)
        teacher = {"teacher": teachers.settings(config.teacher)}
        context = {"teacher": teachers.context(config.teacher, flow.root, engine.workers)}
        made = flow.step("images", images.make, [{}] * len(shards), shards)
        extend = {"extend": config.labels.extend}
        [tree] = flow.step("labels", matching.labels, [{}], [{**trees, **extend, **seed, **teacher}], context)
        known = tree.of("trees")
        scoring = {"scorer": config.allot.scorer}
        inputs = [{**known, **one.of("images")} for one in made]
        matched = flow.step("match", matching.match, inputs, [{**scoring, **seed, **teacher}] * len(made), context)
        if config.labels.balance:
            settings = {"most": config.labels.balance, **seed, **teacher}
            [tree] = flow.step(
                "balance", balancing.split, [{**known, **_joined(matched, "matched")}], [settings], context
            )
            known = tree.of("trees")
            inputs = [{**tree.of("parts"), **one.of("matched")} for one in matched]
            matched = flow.step("rematch", balancing.rematch, inputs, [{**seed, **teacher}] * len(inputs), context)
        shares = {name: getattr(config.allot, name) for name in ("by", "power", "questions", "max_pixels")}
        everything = _joined(matched, "matched")
        [allotted] = flow.step("allot", matching.allot, [everything], [shares])
        parts = _parts(allotted, len(matched))
        inputs = [{**known, **part} for part in parts]
        written = flow.step("questions", questions.write, inputs, [{**seed, **teacher}] * len(parts), context)
        limits = asdict(config.quality)
        alone = {name: limits.pop(name) for name in ("max_question", "max_answer", "ask_again")}
        inputs = [{**known, **one.of("candidates")} for one in written]
        checked = flow.step("check", quality.check, inputs, [{**alone, **seed, **teacher}] * len(inputs), context)
        [judged] = flow.step("judge", quality.judge, [_joined(checked, "checked")], [limits])
        verdicts = _parts(judged, len(checked))
        inputs = [{**one.of("checked"), **part} for one, part in zip(checked, verdicts, strict=True)]
        flow.step("select", quality.select, inputs, [{}] * len(inputs))
        return _publish(flow)
    finally:
        engine.close()
        sweep(Path(config.run.folder))


def _tree_text(name: str) -> str:
    """A tree as a file has it, so that what depends on it changes with it and not with its name."""
    return LabelTree.load(name).to_yaml()


def _joined(shards: Sequence[Done], kind: str) -> dict[str, str]:
    return {name: digest for one in shards for name, digest in one.of(kind).items()}


def _parts(of_all: Done, shards: int) -> list[dict[str, str]]:
    """The output of a step over everything that belongs to each shard."""
    return [of_all.of(f"{index:05d}") for index in range(shards)]


def _publish(flow: _Flow) -> Production:
    """Gather the shards into the files that others read."""
    root, config = flow.root, flow.config
    records = write_shards(_records(flow), root / "records", replace=True)
    if config.parquet:
        write_shards(_records(flow), root / "parquet", suffix=".parquet", replace=True)
    reasons: Counter[tuple[str, str]] = Counter()
    turned_away = []
    for step in STEPS:
        for path in flow.outputs(step, "rejected"):
            for row in read_rows(path):
                reasons[row["stage"], row["reason"]] += 1
                turned_away.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(root / "rejected.jsonl", "".join(turned_away))
    write_audits(root / "audit.jsonl", _audits(flow))
    [trees] = flow.outputs("balance", "trees") or flow.outputs("labels", "trees")
    for name, text in next(read_rows(trees)).items():
        write_whole(root / "labels" / f"{name}.yaml", text)
    found = Production(root, records, flow.counts, dict(reasons), flow.spent, flow.made, flow.before)
    recipe = {"recipe": _recipe(config), "records": [_file(path, root) for path in records]}
    results = json.dumps({**recipe, **found.to_json()}, indent=1, ensure_ascii=False)
    write_whole(root / "results.json", results + "\n")
    return found


def _records(flow: _Flow) -> Iterator[Record]:
    for path in flow.outputs("select", "records"):
        for row in read_rows(path):
            yield Record.from_json(row)


def _audits(flow: _Flow) -> Iterator[dict[str, Any]]:
    """Of each image: its scores, what they were counted from, its labels, and what it was allotted."""
    for index in range(len(flow.finished["match"])):
        for path in flow.outputs("allot", f"{index:05d}"):
            for row in read_rows(path):
                place = {"id": row["id"], "image": row["image"], "source": row["source"]}
                labels = {"topic": row["topic"], "capabilities": row["capabilities"]}
                yield {**place, **labels, **row["density"], "allotted": row["allotted"]}


def _recipe(config: DataBuildConfig) -> dict[str, Any]:
    """What the result depends on; not where and by whom it is made."""
    value = asdict(config)
    value["run"] = {"seed": config.run.seed}
    value["engine"] = {"shard_images": config.engine.shard_images}
    value["teacher"] = teachers.settings(config.teacher)
    return value


def _file(path: Path, root: Path) -> dict[str, str]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.relative_to(root).as_posix(), "sha256": digest}
