"""What a question must pass, and the reason that is kept when it does not.

By itself (``check``): schema, labels, length; with a teacher over HTTP, whether it answers the same with the image, and
something else without. Among all (``judge``): contradictions, exact and near duplicates, and answers that the question
alone gives away. ``select`` then parts the kept from the rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from m4ov.data.labels import check_labels
from m4ov.data.production.duplicates import near_texts, normalised, same_answer, similar_images
from m4ov.data.production.matching import trees_of
from m4ov.data.production.steps import Result, Task, add, rejected
from m4ov.data.production.teachers import Watched, sees
from m4ov.data.records import Record, RecordError, Where
from m4ov.data.teacher import Reply, TeacherError
from m4ov.data.teacher.ranks import rank
from m4ov.data.teacher.tasks import answer_request, data_uri


def check(task: Task) -> Result:
    """Each question of a shard by itself. Rows: ``record``, ``hashes`` of its image."""
    topics, capabilities = trees_of(task)
    counts: dict[str, int] = {}
    spent: dict[str, float] = {}
    passed: list[tuple[Record, dict[str, Any]]] = []
    turned_away: list[dict[str, Any]] = []
    for row in task.rows("candidates"):
        name = str(row["record"].get("id"))
        try:
            record = Record.from_json(row["record"], Where(f"questions {task.index}"))
        except RecordError as error:
            turned_away.append(rejected("quality", name, "schema", f"{error.field}: {error.problem}"))
            continue
        dangling = check_labels(record, topics, capabilities)
        problem = _length(record, task.settings)
        if dangling:
            turned_away.append(_rejected(record, "label", dangling[0].problem))
        elif problem:
            turned_away.append(_rejected(record, "length", problem))
        else:
            passed.append((record, row))
    if sees(task) and task.settings["ask_again"]:
        passed = _asked_again(task, passed, turned_away, Watched(task, counts, spent))
    rows = [{"record": record.to_json(), "hashes": row["hashes"]} for record, row in passed]
    add(counts, {"passed": len(rows), "rejected": len(turned_away)})
    return Result({"checked": rows, "rejected": turned_away}, counts, spent)


def _length(record: Record, settings: dict[str, Any]) -> str:
    for name, text in (("question", record.question), ("answer", record.answer)):
        most = settings[f"max_{name}"]
        if len(text) > most:
            return f"the {name} has {len(text)} characters; at most {most} are kept"
    return ""


def _asked_again(
    task: Task, passed: list[tuple[Record, dict[str, Any]]], turned_away: list[dict[str, Any]], teacher: Watched
) -> list[tuple[Record, dict[str, Any]]]:
    """Those whose answer the teacher gives again when it sees the image, and does not give when it does not."""
    seed = task.settings["seed"] + 1  # not the answer it gave when it wrote the question
    uris = {row["image"]: data_uri(task.path(row["image"])) for _, row in passed}
    seeing = [answer_request(uris[row["image"]], record.question) for record, row in passed]
    blind = [answer_request(None, record.question) for record, _ in passed]
    answers = teacher.ask_many([*seeing, *blind], max_tokens=256, seed=seed)
    kept = []
    for (record, row), seen, unseen in zip(passed, answers[: len(passed)], answers[len(passed) :], strict=True):
        if isinstance(seen, TeacherError) or isinstance(unseen, TeacherError):
            failed = seen if isinstance(seen, TeacherError) else unseen
            turned_away.append(_rejected(record, "no answer", str(failed)))
            continue
        agrees, guessed = _says(seen, record), _says(unseen, record)
        add(teacher.counts, {"asked_again": 1, "right_with_image": int(agrees), "right_without_image": int(guessed)})
        if not agrees:
            turned_away.append(_rejected(record, "disagreement", f"asked again, the teacher says {seen.text[:200]!r}"))
        elif guessed:
            turned_away.append(_rejected(record, "blind", "the teacher gives the same answer without the image"))
        else:
            kept.append((record, row))
    return kept


def _says(reply: Reply, record: Record) -> bool:
    return same_answer(reply.text, record.answer)


class _Asked(NamedTuple):
    """What the judgement among all needs of a question."""

    id: str
    question: str
    answer: str
    kind: str
    image: str
    hashes: dict[str, str]


def judge(task: Task) -> Result:
    """All questions together: one output for each shard of the check step (``00012`` …), a row for each rejection.

    A prior is the share of the most frequent answer among questions of equal words, or, where there are fewer than
    ``prior_support`` of them, of one kind. Whoever guesses it without looking is right that often; so its questions are
    cut, in an order that has nothing to do with the images, until it is at most ``max_prior``.
    """
    shards: dict[str, list[_Asked]] = {}
    for name in task.inputs:
        part = Task(task.root, task.step, task.index, task.function, {name: ""})
        shards[Path(name).name.partition(".")[0]] = [_asked(row) for row in part.rows("checked")]
    asked = [one for shard in shards.values() for one in shard]
    verdicts: dict[str, tuple[str, str]] = {}
    _judge_duplicates(asked, task.settings, verdicts)
    left = [one for one in asked if one.id not in verdicts]
    counts = {"asked": len(asked), "unlike": len(left)}
    for group in _prior_groups(left, task.settings["prior_support"]):
        answers = Counter(one.answer for one in group)
        answer, most = answers.most_common(1)[0]
        add(counts, {"judged_blind": len(group), "guessed_before": most})
        others = len(group) - most
        share = task.settings["max_prior"]
        allowed = most if share >= 1 else min(most, int(share / (1 - share) * others + 1e-9))
        same = sorted((one for one in group if one.answer == answer), key=lambda one: rank("prior", one.id))
        for one in same[allowed:]:
            detail = f"{answer!r} answers {most} of {len(group)} such questions; {allowed} are kept"
            verdicts[one.id] = ("blind", detail)
        kept = Counter({**answers, answer: allowed})
        add(counts, {"kept_blind": others + allowed, "guessed_after": max(kept.values())})
    outputs = {
        name: [
            {"id": one.id, "reason": verdicts[one.id][0], "detail": verdicts[one.id][1]}
            for one in shard
            if one.id in verdicts
        ]
        for name, shard in shards.items()
    }
    return Result(dict(outputs), {**counts, "rejected": len(verdicts)})


def _asked(row: dict[str, Any]) -> _Asked:
    record = Record.from_json(row["record"])
    answer = normalised(record.answer)
    return _Asked(
        record.id, normalised(record.question), answer, record.kind or "", record.meta["image_id"], row["hashes"]
    )


def _judge_duplicates(asked: list[_Asked], settings: dict[str, Any], verdicts: dict[str, tuple[str, str]]) -> None:
    """Equal questions on equal images: one is kept, or none if their answers differ; and nearly equal ones on nearly
    equal images, if their answers are equal."""
    exact: dict[tuple[str, str], list[_Asked]] = {}
    for one in asked:
        exact.setdefault((one.hashes["pixels"], one.question), []).append(one)
    for group in exact.values():
        first = group[0]
        if any(not same_answer(one.answer, first.answer) for one in group):
            answers = ", ".join(sorted({repr(one.answer) for one in group}))
            verdicts.update(
                (one.id, ("contradiction", f"answers to one question on one image: {answers}")) for one in group
            )
        else:
            verdicts.update((one.id, ("duplicate", f"of {first.id}")) for one in group[1:])
    images: dict[str, dict[str, str]] = {}
    for one in asked:
        images.setdefault(one.image, one.hashes)
    group_of = dict(zip(images, similar_images(list(images.values()), settings["near_image"]), strict=True))
    near: dict[tuple[int, str], list[_Asked]] = {}
    for one in asked:
        if one.id not in verdicts:
            near.setdefault((group_of[one.image], one.answer), []).append(one)
    for members in near.values():
        if len(members) > 1:
            found = near_texts([one.question for one in members], settings["near_text"])
            for one, place in zip(members, found, strict=True):
                if place is not None:
                    other = members[place]
                    verdicts[one.id] = ("near duplicate", f"of {other.id}: {other.question!r}")


def _prior_groups(asked: list[_Asked], support: int) -> Iterator[list[_Asked]]:
    """Questions that someone who sees no image cannot tell apart: of equal words, if there are enough, else of one
    kind; smaller groups tell nothing."""
    words: dict[str, list[_Asked]] = {}
    for one in asked:
        words.setdefault(one.question, []).append(one)
    kinds: dict[str, list[_Asked]] = {}
    for group in words.values():
        if len(group) >= support:
            yield group
        else:
            for one in group:
                kinds.setdefault(one.kind, []).append(one)
    yield from (group for group in kinds.values() if len(group) >= support)


def select(task: Task) -> Result:
    """Part the questions of a shard by the judgement on them. Rows: records; rejected ones with their reason."""
    verdicts = {row["id"]: row for row in task.rows() if "reason" in row and "record" not in row}
    kept, turned_away = [], []
    for row in task.rows("checked"):
        if verdict := verdicts.get(row["record"]["id"]):
            record = Record.from_json(row["record"])
            turned_away.append(_rejected(record, verdict["reason"], verdict["detail"]))
        else:
            kept.append(row["record"])
    counts = {"accepted": len(kept), "rejected": len(turned_away)}
    return Result({"records": kept, "rejected": turned_away}, counts)


def _rejected(record: Record, reason: str, detail: str) -> dict[str, Any]:
    return rejected("quality", record.id, reason, detail, record=record.to_json())
