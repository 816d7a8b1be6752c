"""Questions: as many of each difficulty as an image was allotted, written by the teacher, each a record of its own."""

from __future__ import annotations

from typing import Any

from m4ov.data.answers import AnswerError
from m4ov.data.labels import LabelTree
from m4ov.data.production.matching import shown, trees_of
from m4ov.data.production.steps import Result, Task, add, rejected
from m4ov.data.production.teachers import Watched
from m4ov.data.records import Record, assistant, image, user
from m4ov.data.teacher import Reply
from m4ov.data.teacher.tasks import Draft, questions_request, read_questions

#: Where a run's images lie, seen from the folder of its records.
IMAGES_FROM_RECORDS = "../"


def write(task: Task) -> Result:
    """Ask for the questions of a shard's images.

    Rows: ``record``, and of its image ``image`` (the file), ``truth`` and ``hashes``. Counted: ``missing`` (allotted
    and not written) and ``surplus`` (written beyond what was allotted, and left out).
    """
    topics, capabilities = trees_of(task)
    seed = task.settings["seed"]
    turned_away: list[dict[str, Any]] = []
    counts: dict[str, int] = {"candidates": 0, "missing": 0, "surplus": 0}
    spent: dict[str, float] = {}
    asked = [row for row in task.rows() if "allotted" in row and row["allotted"]["questions"]]
    requests = [
        questions_request(
            shown(task, row), row["id"], row["allotted"]["difficulties"], row["capabilities"], row["truth"], seed
        )
        for row in asked
    ]
    teacher = Watched(task, counts, spent)
    answers = teacher.ask_many(requests, max_tokens=task.settings["teacher"]["max_tokens"], seed=seed)
    candidates: list[dict[str, Any]] = []
    for row, answer in zip(asked, answers, strict=True):
        wanted = row["allotted"]["questions"]
        try:
            drafts = read_questions(answer)
        except AnswerError as error:
            reason = "answer" if isinstance(answer, Reply) else "no answer"
            turned_away.append(rejected("questions", row["id"], reason, str(error)))
            counts["missing"] += wanted
            continue
        add(counts, {"missing": max(0, wanted - len(drafts)), "surplus": max(0, len(drafts) - wanted)})
        for number, draft in enumerate(drafts[:wanted]):
            name = f"{row['id']}-q{number:02d}"
            if isinstance(draft, AnswerError):
                turned_away.append(rejected("questions", name, "answer", str(draft)))
            elif draft.capability not in capabilities.leaves:
                detail = f"capability {draft.capability!r} is no leaf of {capabilities.name}"
                turned_away.append(rejected("questions", name, "label", detail, question=draft.question))
            else:
                record = _record(name, row, draft, topics, capabilities)
                about = {"image": row["image"], "truth": row["truth"], "hashes": row["hashes"]}
                candidates.append({"record": record.to_json(), **about})
    add(counts, {"candidates": len(candidates), "rejected": len(turned_away)})
    return Result({"candidates": candidates, "rejected": turned_away}, counts, spent)


def _record(name: str, row: dict[str, Any], draft: Draft, topics: LabelTree, capabilities: LabelTree) -> Record:
    return Record(
        id=name,
        messages=[user(image(IMAGES_FROM_RECORDS + row["image"]), draft.question), assistant(draft.answer)],
        labels={"topic": topics.path(row["topic"]), "capability": capabilities.path(draft.capability)},
        difficulty=draft.difficulty,
        kind=draft.kind or draft.capability.rpartition(".")[2],
        meta={
            "image_id": row["id"],
            "source": row["source"],
            "density": row["density"]["scores"]["combined"],
            "max_pixels": row["allotted"]["max_pixels"],
        },
    )
