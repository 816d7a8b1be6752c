"""What a set of records covers: topics × capabilities, counted, with its holes and its balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from m4ov.data.labels.label import LabelError
from m4ov.data.labels.tree import LabelTree, capabilities, topics


class Labelled(Protocol):
    """What is read of a record; ``m4ov.data.records.Record`` is one."""

    @property
    def id(self) -> str: ...

    @property
    def labels(self) -> Mapping[str, Sequence[str]]: ...


class Dangling(NamedTuple):
    """A label that a record should carry and does not, or carries and should not.

    Attributes:
        id: of the record.
        tree: ``"topic"``, ``"capability"``, or a name that no tree has.
        kind: for counts: ``"missing"``, ``"dangling"`` or ``"no such tree"``.
        problem: for people.
    """

    id: str
    tree: str
    kind: str
    problem: str

    def __str__(self) -> str:
        return f"record {self.id!r}: labels.{self.tree}: {self.problem}"


def check_labels(
    record: Labelled, topic_tree: LabelTree | None = None, capability_tree: LabelTree | None = None
) -> list[Dangling]:
    """What is wrong with a record's labels: every sample carries a path to a leaf in both trees, and nothing else.

    Args:
        topic_tree, capability_tree: ``None``: those of the package.
    """
    trees = _trees(topic_tree, capability_tree)
    found = []
    for name, tree in trees.items():
        if name not in record.labels:
            found.append(Dangling(record.id, name, "missing", f"no path in the tree {tree.name!r}"))
        elif problem := tree.problem(record.labels[name]):
            found.append(Dangling(record.id, name, "dangling", problem))
    unknown = sorted(set(record.labels) - set(trees))
    return found + [Dangling(record.id, name, "no such tree", f"trees are {', '.join(trees)}") for name in unknown]


@dataclass(frozen=True)
class Coverage:
    """Records by topic and capability.

    Attributes:
        topics, capabilities: the trees.
        counts: int64 ``[topic leaves, capability leaves]``, in the order of ``leaves``.
        refused: how many records had which kind of problem; a record counts once, by its first.
        named: the first such problems, as many as were asked for.
    """

    topics: LabelTree
    capabilities: LabelTree
    counts: np.ndarray
    refused: Mapping[str, int] = field(default_factory=dict)
    named: tuple[Dangling, ...] = ()

    @property
    def records(self) -> int:
        """That were counted."""
        return int(self.counts.sum())

    def of_topics(self) -> dict[str, int]:
        """Records of each topic leaf, those without one too."""
        return dict(zip(self.topics.leaves, self.counts.sum(axis=1).tolist(), strict=True))

    def of_capabilities(self) -> dict[str, int]:
        """Records of each capability leaf, those without one too."""
        return dict(zip(self.capabilities.leaves, self.counts.sum(axis=0).tolist(), strict=True))

    def at_level(self, level: int) -> np.ndarray:
        """Counts int64 ``[topics, capabilities]`` of the labels of one level, from 1; the last are the leaves."""
        rows = np.add.reduceat(self.counts, _starts(self.topics, level), axis=0)
        return np.add.reduceat(rows, _starts(self.capabilities, level), axis=1)

    def holes(self, level: int = 1) -> list[tuple[str, str]]:
        """The (topic, capability) pairs of one level that no record has, in the order of the trees."""
        rows, columns = self.topics.at_level(level), self.capabilities.at_level(level)
        return [(rows[row], columns[column]) for row, column in np.argwhere(self.at_level(level) == 0).tolist()]

    def evenness(self) -> dict[str, float]:
        """Entropy over its maximum, in [0, 1]: over topic leaves, over capability leaves, and over their pairs.

        1: all leaves hold the same; 0: one holds everything, or there is no record.
        """
        marginals = {"topic": self.counts.sum(axis=1), "capability": self.counts.sum(axis=0), "pair": self.counts}
        return {name: evenness(values) for name, values in marginals.items()}

    def table(self, level: int = 1) -> list[dict[str, Any]]:
        """A row for each topic of one level: ``topic`` (its title), a count for each capability's title, ``sum``."""
        names = [" / ".join(self.capabilities.titles(id)) for id in self.capabilities.at_level(level)]
        rows = []
        for id, counts in zip(self.topics.at_level(level), self.at_level(level).tolist(), strict=True):
            cells = dict(zip(names, counts, strict=True))
            rows.append({"topic": " / ".join(self.topics.titles(id)), **cells, "sum": sum(counts)})
        return rows

    def to_json(self) -> dict[str, Any]:
        """For a report: what is counted, the pairs of leaves that have records, evenness and what was refused."""
        pairs = [
            [self.topics.leaves[row], self.capabilities.leaves[column], int(self.counts[row, column])]
            for row, column in np.argwhere(self.counts).tolist()
        ]
        return {
            "records": self.records,
            "pairs": pairs,
            "leaves_without_records": {
                "topic": [id for id, count in self.of_topics().items() if not count],
                "capability": [id for id, count in self.of_capabilities().items() if not count],
            },
            "holes": [list(pair) for pair in self.holes()],
            "evenness": self.evenness(),
            "refused": dict(self.refused),
            "named": [problem._asdict() for problem in self.named],
        }


def coverage(
    records: Iterable[Labelled],
    topic_tree: LabelTree | None = None,
    capability_tree: LabelTree | None = None,
    *,
    named: int = 100,
) -> Coverage:
    """Count records by topic and capability. A record whose labels are not in both trees is refused and counted apart.

    Args:
        records: read once, as a stream.
        topic_tree, capability_tree: ``None``: those of the package.
        named: how many refused records are kept by name.
    """
    trees = _trees(topic_tree, capability_tree)
    of_topics, of_capabilities = trees.values()
    rows = {id: place for place, id in enumerate(of_topics.leaves)}
    columns = {id: place for place, id in enumerate(of_capabilities.leaves)}
    counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
    refused: Counter[str] = Counter()
    kept: list[Dangling] = []
    for record in records:
        problems = check_labels(record, of_topics, of_capabilities)
        if problems:
            refused[problems[0].kind] += 1
            kept += problems[: named - len(kept)]
        else:
            counts[rows[record.labels["topic"][-1]], columns[record.labels["capability"][-1]]] += 1
    return Coverage(of_topics, of_capabilities, counts, dict(sorted(refused.items())), tuple(kept))


def leaf_counts(tree: LabelTree, counts: Mapping[str, int]) -> dict[str, int]:
    """Counts of all leaves of a tree, in its order.

    Raises:
        LabelError: a count is of no leaf, or not a whole number of at least 0.
    """
    leaves = dict.fromkeys(tree.leaves, 0)
    for id, count in counts.items():
        if id not in leaves:
            raise LabelError(f"tree {tree.name!r}: a count for {tree[id].id!r}, which is not a leaf")
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            raise LabelError(
                f"tree {tree.name!r}: the count of {id!r} must be a whole number of at least 0, got {count!r}"
            )
        leaves[id] = int(count)
    return leaves


def evenness(counts: np.ndarray) -> float:
    """Entropy of counts over that of equal counts (Pielou's evenness), in [0, 1]; 0 if there are none, 1 for one cell
    that holds something."""
    values = np.asarray(counts, dtype=np.float64).ravel()
    total = values.sum()
    if not total:
        return 0.0
    if len(values) == 1:
        return 1.0
    shares = values[values > 0] / total
    return float(np.clip(-(shares * np.log(shares)).sum() / np.log(len(values)), 0.0, 1.0))


def _trees(topic_tree: LabelTree | None, capability_tree: LabelTree | None) -> dict[str, LabelTree]:
    return {"topic": topic_tree or topics(), "capability": capability_tree or capabilities()}


def _starts(tree: LabelTree, level: int) -> list[int]:
    """Where in ``leaves`` each label of a level begins; its leaves stand together."""
    tree.at_level(level)  # a level that is not there is named
    above = [tree.path(leaf)[level - 1] for leaf in tree.leaves]
    return [place for place, id in enumerate(above) if place == 0 or above[place - 1] != id]
