"""How a tree grows: a teacher proposes labels, each is checked, and what is refused stays with its reason."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m4ov.data.answers import AnswerError, mismatch, parse_answer
from m4ov.data.labels.coverage import leaf_counts
from m4ov.data.labels.label import Label, LabelError, normalised
from m4ov.data.labels.tree import LabelTree
from m4ov.data.records import short
from m4ov.data.shares import largest_remainder
from m4ov.data.teacher import Reply, Teacher, TeacherError
from m4ov.data.whole import write_whole

_TITLE, _ABOUT = 80, 200  # characters, at most
_SLUG = 48
_SYSTEM = (
    "You extend a tree of labels for visual question answering data. Reply with one JSON object and nothing else. "
    "Titles are short noun phrases in English, unlike every title you are shown; each description is one sentence."
)


class Refused(NamedTuple):
    """A proposal that was not taken up.

    Attributes:
        at: id of the label that the teacher was asked about; empty: the root.
        proposal: as it came; ``None``: the whole answer.
        reason: why.
    """

    at: str
    proposal: Any
    reason: str


@dataclass(frozen=True)
class Extension:
    """What came of asking a teacher.

    Attributes:
        tree: with the new labels.
        added: the new labels, parents first, in the order of the nodes asked about and then of the answers.
        refused: in the same order.
        parts: ids of the leaves that were made beside a leaf that held too much (:func:`balance`).
        prompt_tokens, completion_tokens: of all answers; cached ones count nothing.
    """

    tree: LabelTree
    added: tuple[Label, ...]
    refused: tuple[Refused, ...]
    parts: Mapping[str, tuple[str, ...]]
    prompt_tokens: int
    completion_tokens: int

    def save(self, path: str | Path) -> None:
        """Write the tree as YAML, and beside it ``<stem>.refused.jsonl``; each whole or not at all, the tree last.

        Raises:
            WriteError: a file cannot be written.
        """
        path = Path(path)
        lines = (json.dumps(refused._asdict(), ensure_ascii=True) for refused in self.refused)
        write_whole(path.with_name(f"{path.stem}.refused.jsonl"), "".join(f"{line}\n" for line in lines))
        self.tree.save(path)


@dataclass(frozen=True)
class Share:
    """A leaf, what it holds and what it should: ``state`` is ``"over"``, ``"under"`` or ``"within"``."""

    leaf: str
    count: int
    quota: int
    state: str


@dataclass(frozen=True)
class Balance:
    """Which leaves hold too much or too little.

    Attributes:
        shares: of all leaves, in the order of the tree.
        extension: finer leaves beside those that hold too much; ``None`` if no teacher was asked.
    """

    shares: tuple[Share, ...]
    extension: Extension | None = None

    @property
    def over(self) -> tuple[Share, ...]:
        """The fullest first."""
        found = [share for share in self.shares if share.state == "over"]
        return tuple(sorted(found, key=lambda share: share.quota - share.count))

    @property
    def under(self) -> tuple[Share, ...]:
        """Those that lack most first; ``quota - count`` says how many."""
        found = [share for share in self.shares if share.state == "under"]
        return tuple(sorted(found, key=lambda share: share.count - share.quota))


def extend(
    tree: LabelTree, teacher: Teacher, *, at: Iterable[str] | None = None, most: int = 6, seed: int = 0
) -> Extension:
    """Ask a teacher for labels that are missing below some labels.

    Every proposal is held against a JSON Schema and against all titles of the tree, normalised, those just taken up
    included. A proposed branch reaches the last level or is refused as a whole.

    Args:
        at: ids of labels above the last level; ``""`` is the root. ``None``: all labels right above the leaves.
        most: how many proposals a label may get.
        seed: given to the teacher.

    Returns:
        The same for the same tree and the same answers.

    Raises:
        LabelError: a label of ``at`` is unknown, is a leaf or stands twice.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    nodes = list(at) if at is not None else list(tree.at_level(tree.levels - 1)) if tree.levels > 1 else [""]
    for id, times in Counter(nodes).items():
        if times > 1:
            raise LabelError(f"tree {tree.name!r}: label {id!r} is asked about {times} times")
        if id and len(tree.path(id)) == tree.levels:
            raise LabelError(
                f"tree {tree.name!r}: label {id!r} is a leaf; nothing stands below it (balance splits leaves)"
            )
    order = {"": -1, **{label.id: place for place, label in enumerate(tree.labels)}}
    nodes.sort(key=order.__getitem__)
    asked = [(id, id, f"Propose up to {most} labels that are missing {_place(tree, id)}.") for id in nodes]
    return _ask(tree, teacher, asked, most, seed)


def balance(
    tree: LabelTree,
    counts: Mapping[str, int],
    teacher: Teacher | None = None,
    *,
    quotas: Mapping[str, float] | None = None,
    low: float = 0.5,
    high: float = 2.0,
    most: int = 4,
    seed: int = 0,
) -> Balance:
    """Hold what leaves hold against what they should, and have a teacher split those that hold too much.

    A leaf's quota is its share of the total, by largest remainder. It holds too little below ``low`` times its quota,
    too much above ``high`` times. A split makes finer leaves *beside* the full one, which stays for what fits none of
    them, so that no label of a record dangles; which records move is for whoever labels them to say.

    Args:
        counts: records of each leaf (``Coverage.of_topics()``); leaves not named have none.
        teacher: ``None``: nobody is asked.
        quotas: weights of leaves, from 0; leaves not named weigh 1.
        most: how many finer leaves a split may make; fewer than two that can be used make no split.

    Raises:
        LabelError: a count or quota is of no leaf, or no count.
        ValueError: quotas are not finite and at least 0, or not 0 <= low <= 1 <= high.
    """
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"low and high must be 0 <= low <= 1 <= high, got {low} and {high}")
    if most < 2:
        raise ValueError(f"most must be at least 2, got {most}")
    held = leaf_counts(tree, counts)
    leaf_counts(tree, dict.fromkeys(quotas or {}, 0))  # names those that are no leaves
    weights = {**dict.fromkeys(held, 1.0), **(quotas or {})}
    due = largest_remainder([weights[leaf] for leaf in held], sum(held.values())).tolist()
    shares = tuple(
        Share(leaf, count, quota, "over" if count > high * quota else "under" if count < low * quota else "within")
        for (leaf, count), quota in zip(held.items(), due, strict=True)
    )
    found = Balance(shares)
    if teacher is None:
        return found
    asked = []
    full = {share.leaf for share in found.over}
    for leaf in held:
        if leaf in full:
            parent = tree[leaf].parent
            says = f"{tree[leaf].title!r} ({tree[leaf].about}) holds too much. Propose 2 to {most} finer labels that"
            asked.append((leaf, parent, f"{says} part it; they will stand beside it, {_place(tree, parent)}."))
    return Balance(shares, _ask(tree, teacher, asked, most, seed))


def _place(tree: LabelTree, id: str) -> str:
    if not id:
        return "at the top of the tree"
    return f"below {' / '.join(map(repr, tree.titles(id)))} ({tree[id].about})"


def _ask(tree: LabelTree, teacher: Teacher, asked: Sequence[tuple[str, str, str]], most: int, seed: int) -> Extension:
    """``asked``: the label asked about, the one that proposals stand below, and what is asked."""
    if not asked:
        return Extension(tree, (), (), {}, 0, 0)
    answers = teacher.ask_many([_messages(tree, under, wish) for _, under, wish in asked], max_tokens=2048, seed=seed)
    if len(answers) != len(asked):
        raise RuntimeError(f"teacher {teacher.name!r} gave {len(answers)} answers to {len(asked)} requests")
    growing = _Growing(tree)
    parts: dict[str, tuple[str, ...]] = {}
    for (id, under, _), answer in zip(asked, answers, strict=True):
        taken = growing.take(id, under, answer, most, least=2 if id != under else 1)
        if id != under and taken:
            parts[id] = taken
    replies = [answer for answer in answers if isinstance(answer, Reply) and not answer.cached]
    spent = (sum(reply.prompt_tokens for reply in replies), sum(reply.completion_tokens for reply in replies))
    added = tuple(growing.added)
    return Extension(tree.extended(added) if added else tree, added, tuple(growing.refused), parts, *spent)


def _messages(tree: LabelTree, under: str, wish: str) -> list[dict[str, Any]]:
    depth = tree.levels - (len(tree.path(under)) if under else 0)
    form = '{"title": "…", "about": "…"}'
    for _ in range(depth - 1):
        form = '{"title": "…", "about": "…", "children": [' + form + ", …]}"
    there = "\n".join(f"- {label.title}: {label.about}" for label in tree.children(under))
    task = f"{wish}\nAlready there:\n{there}\nReply as " + '{"proposals": [' + form + ", …]}"
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": task}]


def proposal_schema(depth: int) -> dict[str, Any]:
    """JSON Schema of a proposed branch of ``depth`` levels."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "title": {"type": "string", "pattern": r"\S", "maxLength": _TITLE},
            "about": {"type": "string", "pattern": r"\S", "maxLength": _ABOUT},
        },
        "required": ["title", "about"],
        "additionalProperties": False,
    }
    if depth > 1:
        below = {"type": "array", "items": proposal_schema(depth - 1), "minItems": 1, "maxItems": 32}
        schema["properties"]["children"] = below
        schema["required"].append("children")
    return schema


_ENVELOPE = {
    "type": "object",
    "properties": {"proposals": {"type": "array"}},
    "required": ["proposals"],
    "additionalProperties": False,
}


class _Growing:
    """A tree while proposals come in."""

    def __init__(self, tree: LabelTree) -> None:
        self.tree = tree
        self.added: list[Label] = []
        self.refused: list[Refused] = []
        self._titles = {normalised(label.title): label.title for label in tree.labels}
        self._ids = {label.id for label in tree.labels}

    def take(self, at: str, under: str, answer: Reply | TeacherError, most: int, least: int) -> tuple[str, ...]:
        """The ids right below ``under`` of what is taken up."""
        try:
            proposals = parse_answer(answer, _ENVELOPE)["proposals"]
        except AnswerError as error:
            text = answer.text if isinstance(answer, Reply) else None
            self.refused.append(Refused(at, text if text is None else text[:2000], str(error)))
            return ()
        schema = proposal_schema(self.tree.levels - (len(self.tree.path(under)) if under else 0))
        titles = dict(self._titles)
        ids = set(self._ids)
        branches: list[tuple[Any, list[Label]]] = []
        for proposal in proposals:
            reason = mismatch(proposal, schema) or _unfit(proposal, titles)
            if not reason and len(branches) == most:
                reason = f"more than the {most} that were asked for"
            if reason:
                self.refused.append(Refused(at, proposal, reason))
            else:
                titles.update((normalised(title), title) for title, _ in _texts(proposal))
                branches.append((proposal, _branch(proposal, under, ids)))
        if len(branches) < least:
            reason = f"the only part of {at!r} that can be used; a split needs {least}"
            self.refused += [Refused(at, proposal, reason) for proposal, _ in branches]
            return ()
        self._titles, self._ids = titles, ids
        self.added += [label for _, labels in branches for label in labels]
        return tuple(labels[0].id for _, labels in branches)


def _unfit(proposal: Any, known: Mapping[str, str]) -> str:
    """Why a proposal that is in form is not taken: a title that is there, or stands twice in it; empty if none."""
    seen = dict(known)
    for title, about in _texts(proposal):
        key = normalised(title)
        if not key or not title.strip().isprintable() or not " ".join(about.split()).isprintable():
            return f"{short(title)}: expected a title and a description of letters, without control characters"
        if key in seen:
            return f"duplicate: {short(title)} is {seen[key]!r}"
        seen[key] = title
    return ""


def _branch(proposal: dict[str, Any], parent: str, taken: set[str]) -> list[Label]:
    title, about = proposal["title"].strip(), " ".join(proposal["about"].split())
    id = _id(parent, title, taken)
    taken.add(id)
    below = [label for child in proposal.get("children", ()) for label in _branch(child, id, taken)]
    return [Label(id, title, about, parent), *below]


def _texts(proposal: dict[str, Any]) -> list[tuple[str, str]]:
    """Title and description of a branch's labels."""
    below = [texts for child in proposal.get("children", ()) for texts in _texts(child)]
    return [(proposal["title"], proposal["about"]), *below]


def _id(parent: str, title: str, taken: set[str]) -> str:
    """An id that follows from the title; where that has no Latin letter, or is taken, from its digest too."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain)[:_SLUG].strip("-")
    digest = hashlib.sha256(normalised(title).encode()).hexdigest()[:8]
    prefix = f"{parent}." if parent else ""
    id = f"{prefix}{slug or f'x{digest}'}"
    return f"{id}-{digest}" if id in taken else id
