"""The label trees, which of their labels an image can serve, and what each image is allotted."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m4ov.data import density
from m4ov.data.answers import AnswerError
from m4ov.data.images import read_image
from m4ov.data.labels import LabelTree, extend
from m4ov.data.production.duplicates import hashes
from m4ov.data.production.steps import Result, Task, add, rejected
from m4ov.data.production.teachers import Watched, sees
from m4ov.data.teacher import Reply
from m4ov.data.teacher.tasks import data_uri, match_request, read_match

_TREES = ("topics", "capabilities")


def labels(task: Task) -> Result:
    """The two trees, extended by the teacher where the recipe asks for it. One row: the trees as YAML, by name."""
    trees, refused, counts, spent = {}, [], dict[str, int](), dict[str, float]()
    for name in _TREES:
        tree = LabelTree.from_yaml(task.settings[name], f"{name}.yaml")
        if most := task.settings["extend"]:
            found = extend(tree, Watched(task, counts, spent), most=most, seed=task.settings["seed"])
            tree = found.tree
            for proposal in found.refused:
                detail = f"below {proposal.at or 'the root'}: {proposal.reason}"
                refused.append(rejected("labels", proposal.at, "label", detail, proposal=proposal.proposal))
            add(counts, {f"{name}_added": len(found.added), f"{name}_refused": len(found.refused)})
        trees[name] = tree.to_yaml()
        counts[name] = len(tree.leaves)
    return Result({"trees": [trees], "rejected": refused}, counts, spent)


def trees_of(task: Task) -> tuple[LabelTree, LabelTree]:
    """(topics, capabilities), from the inputs of a task."""
    row = next(task.rows("trees"))
    return _tree(row["topics"], "topics.yaml"), _tree(row["capabilities"], "capabilities.yaml")


@lru_cache(maxsize=4)
def _tree(text: str, source: str) -> LabelTree:
    return LabelTree.from_yaml(text, source)


def match(task: Task) -> Result:
    """Score each image, hash it, and find the topic and the capabilities that questions on it can have.

    Rows: what the images step gave, with ``topic``, ``capabilities``, ``density`` and ``hashes``.

    Raises:
        ImageError: an image of the run folder is not what the images step wrote.
    """
    topics, capabilities = trees_of(task)
    turned_away: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    spent: dict[str, float] = {}
    teacher = Watched(task, counts, spent)
    read = [(row, read_image(task.path(row["image"]))) for row in task.rows("images")]
    scored = []
    for (row, image), found in zip(read, _scores(task, read, teacher), strict=True):
        if isinstance(found, density.Density):
            scored.append({**row, "density": found.to_json(), "hashes": hashes(image)})
        else:
            turned_away.append(rejected("match", row["id"], "score", found))
    leaves = list(topics.leaves), list(capabilities.leaves)
    requests = [match_request(shown(task, row), *leaves, row["truth"]) for row in scored]
    kept = []
    for row, answer in zip(scored, teacher.ask_many(requests, seed=task.settings["seed"]), strict=True):
        try:
            topic, able = read_match(answer)
        except AnswerError as error:
            reason = "answer" if isinstance(answer, Reply) else "no answer"
            turned_away.append(rejected("match", row["id"], reason, str(error)))
            continue
        known = [one for one in able if one in leaves[1]]
        add(counts, {"dangling_capabilities": len(able) - len(known)})
        if topic not in leaves[0]:
            detail = f"topic {topic!r} is no leaf of {topics.name}" if topic else "no topic fits"
            turned_away.append(rejected("match", row["id"], "label", detail))
        elif not known:
            detail = f"no leaf of {capabilities.name} fits (of {len(able)} that were named)"
            turned_away.append(rejected("match", row["id"], "label", detail))
        else:
            kept.append({**row, "topic": topic, "capabilities": known})
    add(counts, {"images": len(kept), "rejected": len(turned_away), "pairs": sum(len(r["capabilities"]) for r in kept)})
    return Result({"matched": kept, "rejected": turned_away}, counts, spent)


def allot(task: Task) -> Result:
    """What each image gets, of all images: one output for each shard of the match step (``00012`` …), and ``rejected``.

    ``uniform`` gives every image what one of the mean density would get. Rows: what the match step gave, with
    ``allotted``. Of images with one id the first is kept.
    """
    shards: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    turned_away = []
    for name in task.inputs:
        shard = shards.setdefault(Path(name).name.partition(".")[0], [])
        part = Task(task.root, task.step, task.index, task.function, {name: ""})
        for row in part.rows("matched"):
            if row["id"] in seen:
                detail = f"{row['image']}: the id was there before"
                turned_away.append(rejected("match", row["id"], "duplicate id", detail))
                continue
            seen.add(row["id"])
            shard.append(row)
    rows = [row for shard in shards.values() for row in shard]
    found = [density.Density.from_json(row["density"]) for row in rows]
    if task.settings["by"] == "uniform" and found:
        mean = float(np.mean([one.combined for one in found]))
        found = [density.Density(mean, mean, mean, mean, mean)] * len(found)
    total, most = task.settings["questions"], task.settings["max_pixels"]
    power, minimum = task.settings["power"], int(total >= len(found))
    allotted = density.allot(found, total if found else 0, minimum=minimum, power=power, max_pixels=most)
    for row, share in zip(rows, allotted, strict=True):
        row["allotted"] = share.to_json()
    counts = {"images": len(rows), "rejected": len(turned_away), "questions": sum(one.questions for one in allotted)}
    return Result({**shards, "rejected": turned_away}, counts)


def _scores(
    task: Task, read: list[tuple[dict[str, Any], Image.Image]], teacher: Watched
) -> list[density.Density | str]:
    """The density of each image, or why it has none."""
    known = [_metadata(row["truth"]) for row, _ in read]
    names = [str(row["id"]) for row, _ in read]
    if task.settings["scorer"] == "teacher":
        images = [image for _, image in read]
        told = density.score_by_teacher(images, teacher, known, names=names, seed=task.settings["seed"])
        return [one if isinstance(one, density.Density) else one.reason for one in told]
    reader = density.rapidocr() if task.settings["scorer"] == "ocr" else None
    return [
        _score(np.asarray(image), about, reader, name)
        for (_, image), about, name in zip(read, known, names, strict=True)
    ]


def _score(image: np.ndarray, known: dict[str, Any], reader: density.Reader | None, name: str) -> density.Density | str:
    try:
        return density.score(image, known, reader, name=name)
    except density.DensityError as error:
        return str(error)


def _metadata(truth: dict[str, Any]) -> dict[str, Any]:
    return {name: truth[name] for name in ("facts", "text", "objects", "names", "categories") if name in truth}


def shown(task: Task, row: dict[str, Any]) -> str | None:
    """A row's image as the task's teacher is shown it; ``None``: it looks at none."""
    return data_uri(task.path(row["image"])) if sees(task) else None
