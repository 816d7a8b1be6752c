"""Topics that hold too many of the images: a teacher parts them into finer ones, and says which part each image is."""

from __future__ import annotations

from collections import Counter
from typing import Any

from m4ov.data.answers import AnswerError
from m4ov.data.labels import balance
from m4ov.data.production.matching import shown, trees_of
from m4ov.data.production.steps import Result, Task, add, rejected
from m4ov.data.production.teachers import Watched
from m4ov.data.teacher.tasks import match_request, read_match


def split(task: Task) -> Result:
    """Hold the topics that matched images have against an even share of them, and have the teacher part those that hold
    over twice that.

    Outputs: ``trees``, one row, the trees as YAML with the new labels; ``parts``, one row: topic → finer topics beside
    it.
    """
    topics, capabilities = trees_of(task)
    counts: dict[str, int] = {}
    spent: dict[str, float] = {}
    held = Counter(row["topic"] for row in task.rows("matched"))
    teacher = Watched(task, counts, spent)
    used = {leaf: float(leaf in held) for leaf in topics.leaves}
    found = balance(topics, held, teacher, quotas=used, most=task.settings["most"], seed=task.settings["seed"])
    made = found.extension
    assert made is not None  # a teacher was asked
    refused = [
        rejected("labels", one.at, "label", f"parts of {one.at}: {one.reason}", proposal=one.proposal)
        for one in made.refused
    ]
    add(counts, {"topics_over": len(found.over), "topics_added": len(made.added), "topics_refused": len(refused)})
    trees = {"topics": made.tree.to_yaml(), "capabilities": capabilities.to_yaml()}
    parts = {leaf: list(finer) for leaf, finer in made.parts.items()}
    return Result({"trees": [trees], "parts": [parts], "rejected": refused}, counts, spent)


def rematch(task: Task) -> Result:
    """Ask of each image of a parted topic which part it is; where the answer is none of them, it stays where it was.

    Rows: what the match step gave.
    """
    parts: dict[str, list[str]] = next(task.rows("parts"))
    counts = {"moved": 0, "unmoved": 0}
    spent: dict[str, float] = {}
    rows = list(task.rows("matched"))
    asked = [row for row in rows if row["topic"] in parts]
    requests = [
        match_request(shown(task, row), [row["topic"], *parts[row["topic"]]], row["capabilities"], row["truth"])
        for row in asked
    ]
    answers = Watched(task, counts, spent).ask_many(requests, seed=task.settings["seed"])
    topics: dict[str, str] = {}
    for row, answer in zip(asked, answers, strict=True):
        try:
            topic = read_match(answer)[0]
        except AnswerError:
            topic = ""
        if topic in parts[row["topic"]]:
            topics[row["id"]] = topic
    add(counts, {"moved": len(topics), "unmoved": len(asked) - len(topics), "images": len(rows)})
    moved: list[dict[str, Any]] = [{**row, "topic": topics.get(row["id"], row["topic"])} for row in rows]
    return Result({"matched": moved}, counts, spent)
