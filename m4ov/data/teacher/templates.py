"""Questions that follow from an image's ground truth, and nothing that does not follow from it.

The truth of an image, every part optional:

``topic``
    id of a leaf of the tree of topics.
``label``
    what the image as a whole shows, with its article ("a cat").
``size``
    ``[width, height]`` in pixels; needed for what is said about places.
``thing``
    the noun for one object ("shape"); needed for what is said about objects as such.
``objects``
    ``[{"label", "box": [x0, y0, x1, y1], "attributes": {name: value}}]``; ``x1``, ``y1`` are the first beyond it.
``complete``
    true: these are all objects of their sort, so that they can be counted and found absent.
``vocabulary``
    ``{attribute: {value: [singular, plural]}}``: all values that an attribute can have, in words.
``text``
    lines of text, from the top, all that there are.
``facts``
    ``{what: value}`` or ``{what: {"value", "kind", "choices"}}``: ``what`` is a phrase that follows "What is the".
    ``choices`` are other values that are wrong.
``questions``
    ``[[question, answer, kind]]``, as people wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

from m4ov.data.teacher.ranks import pick, rank

#: Kind of question → the leaf of the shipped tree of capabilities that it asks for.
CAPABILITIES = {
    "object": "perception.recognition.object",
    "shape": "perception.recognition.shape",
    "existence": "perception.recognition.existence",
    "colour": "perception.attributes.colour",
    "size": "perception.attributes.size",
    "material": "perception.attributes.material",
    "counting": "perception.quantity.counting",
    "comparison": "perception.quantity.comparison",
    "style": "perception.image.style",
    "blur": "perception.image.quality",
    "region": "spatial.position.region",
    "direction": "spatial.relations.direction",
    "order": "spatial.relations.order",
    "digit": "text.reading.digit",
    "word": "text.reading.word",
    "line": "text.reading.line",
    "lookup": "text.documents.lookup",
    "negation": "reasoning.logic.negation",
    "conjunction": "reasoning.logic.conjunction",
    "same": "reasoning.logic.comparison",
    "arithmetic": "reasoning.mathematics.arithmetic",
    "country": "knowledge.identity.country",
    "person": "knowledge.identity.person",
    "species": "knowledge.identity.species",
    "geography": "knowledge.facts.geography",
    "science": "knowledge.facts.science",
    "culture": "knowledge.facts.culture",
    "machine": "knowledge.technology.machines",
    "instrument": "knowledge.technology.instruments",
}
_KNOWLEDGE = ("country", "person", "species", "geography", "science", "culture", "machine", "instrument")
_SUBJECT = ("What is the main subject of this image?", "What does this image show?", "What can be seen here?")
_COUNT = ("How many {} are there?", "How many {} can be seen?", "Count the {}. How many are there?")
_EXISTS = ("Is there {} in the image?", "Does the image contain {}?", "Can {} be seen here?")
_ABSENT = ("Is there no {} in the image?", "Is it true that the image has no {}?")
_FACT = ("What is the {}?", "Name the {}.", "Give the {}.")
_ROW = ("What does row {} say, read from left to right?", "Read row {} from left to right.")
_LARGE_RATIO = 2.0  # of two boxes' areas, from which one thing is said to look larger


class Question(NamedTuple):
    text: str
    answer: str
    kind: str
    difficulty: str


def questions(truth: dict[str, Any], salt: str) -> list[Question]:
    """All questions on an image, each text once. ``salt`` decides on wording, and which of many absent things are
    asked for."""
    found: dict[str, Question] = {}
    for one in _all(truth, salt):
        found.setdefault(one.text.casefold(), one)
    return list(found.values())


def _all(truth: dict[str, Any], salt: str) -> Iterator[Question]:
    for text, answer, kind in truth.get("questions", ()):
        yield Question(text, answer, kind, _own_difficulty(answer, kind))
    if label := truth.get("label"):
        yield Question(pick(_SUBJECT, salt, "subject"), label, "object", "easy")
    yield from _facts(truth, salt)
    objects = truth.get("objects", [])
    if truth.get("complete") and truth.get("thing"):
        yield from _counts(truth, objects, salt)
        yield from _numbers(truth, objects)
    if truth.get("size"):
        yield from _places(truth, objects)
    yield from _relations(objects, salt)
    yield from _rows(truth, salt)


def _own_difficulty(answer: str, kind: str) -> str:
    if kind in ("negation", "line", *_KNOWLEDGE):
        return "medium"
    return "hard" if kind in ("arithmetic", "order", "same", "conjunction") else "easy"


def _facts(truth: dict[str, Any], salt: str) -> Iterator[Question]:
    for what, fact in truth.get("facts", {}).items():
        fact = fact if isinstance(fact, dict) else {"value": fact}
        value, kind = str(fact["value"]), fact.get("kind", "object")
        text = pick(_FACT, salt, what).format(what)
        yield Question(text, value, kind, "hard" if kind in _KNOWLEDGE else "medium")
        if choices := fact.get("choices"):
            options = sorted([value, *choices], key=lambda option: rank(salt, what, option))
            yield Question(f"What is the {what}: {', '.join(options[:-1])} or {options[-1]}?", value, kind, "medium")


def _counts(truth: dict[str, Any], objects: list[dict[str, Any]], salt: str) -> Iterator[Question]:
    thing = truth["thing"]
    if len(objects) > 1:
        text = pick(_COUNT, salt, thing).format(f"{thing}s")
        yield Question(text, str(len(objects)), "counting", _count_difficulty(len(objects)))
    for attribute, words in truth.get("vocabulary", {}).items():
        counts = {value: sum(one["attributes"].get(attribute) == value for one in objects) for value in words}
        present = [value for value, count in counts.items() if count]
        absent = sorted((value for value in words if not counts[value]), key=lambda value: rank(salt, value))
        asked = [*present, *absent[: len(present)]]  # as many "no" as "yes"
        for value in asked:
            singular, plural = words[value]
            yes = "yes" if counts[value] else "no"
            text = pick(_EXISTS, salt, "exists", value).format(_with_article(singular))
            yield Question(text, yes, "existence", "easy")
            no = "no" if counts[value] else "yes"
            yield Question(pick(_ABSENT, salt, "absent", value).format(singular), no, "negation", "medium")
            if len(objects) > 1:
                text = pick(_COUNT, salt, "count", value).format(plural)
                yield Question(text, str(counts[value]), "counting", _count_difficulty(counts[value]))
        for one, other in combinations(sorted(asked, key=lambda value: rank(salt, "more", value)), 2):
            if len(objects) > 1 and counts[one] != counts[other]:
                text = f"Are there more {words[one][1]} than {words[other][1]}?"
                yield Question(text, "yes" if counts[one] > counts[other] else "no", "comparison", "hard")
        if len(objects) == 1 and (value := objects[0]["attributes"].get(attribute)):
            text = f"Which {thing} is this?" if attribute == thing else f"What {attribute} is the {thing}?"
            yield Question(text, value, attribute if attribute in CAPABILITIES else "object", "easy")
    if len(objects) > 1 and len(truth.get("vocabulary", {})) == 2:
        yield from _pairs(truth["vocabulary"], objects, salt)


def _pairs(vocabulary: dict[str, Any], objects: list[dict[str, Any]], salt: str) -> Iterator[Question]:
    """Both of two attributes at one thing: pairs that there are, and as many that come apart only."""
    (first, _), (second, nouns) = vocabulary.items()
    there = list(dict.fromkeys((one["attributes"][first], one["attributes"][second]) for one in objects))
    apart = [(a, b) for a, _ in there for _, b in there if (a, b) not in there]
    apart = sorted(dict.fromkeys(apart), key=lambda pair: rank(salt, *pair))[: len(there)]
    for a, b in [*there, *apart]:
        text = pick(_EXISTS, salt, a, b).format(_with_article(f"{a} {nouns[b][0]}"))
        yield Question(text, "yes" if (a, b) in there else "no", "conjunction", "hard")


def _numbers(truth: dict[str, Any], objects: list[dict[str, Any]]) -> Iterator[Question]:
    thing = truth["thing"]
    values = [one["attributes"].get(thing, "") for one in objects]
    if len(values) < 2 or not all(value.isdigit() for value in values):
        return
    numbers = [int(value) for value in values]
    yield Question(f"What is the sum of all the {thing}s?", str(sum(numbers)), "arithmetic", "hard")
    yield Question(f"What is the largest {thing}?", str(max(numbers)), "arithmetic", "medium")
    yield Question(f"What is the smallest {thing}?", str(min(numbers)), "arithmetic", "medium")
    text = f"By how much is the largest {thing} larger than the smallest?"
    yield Question(text, str(max(numbers) - min(numbers)), "arithmetic", "hard")


def _places(truth: dict[str, Any], objects: list[dict[str, Any]]) -> Iterator[Question]:
    width, height = truth["size"]
    if len(objects) == 1:
        (x0, y0, x1, y1), label = objects[0]["box"], objects[0]["label"]
        if x1 <= width / 2 or x0 >= width / 2:
            side = "left" if x1 <= width / 2 else "right"
            yield Question(f"Is the {label} in the left or the right half of the image?", side, "region", "medium")
        if y1 <= height / 2 or y0 >= height / 2:
            side = "upper" if y1 <= height / 2 else "lower"
            yield Question(f"Is the {label} in the upper or the lower half of the image?", side, "region", "medium")
        return
    thing = truth.get("thing")
    if not thing or not truth.get("complete"):
        return
    corners = {}
    for name, x0, y0 in (
        ("top left", 0.0, 0.0),
        ("top right", width / 2, 0.0),
        ("bottom left", 0.0, height / 2),
        ("bottom right", width / 2, height / 2),
    ):
        x1, y1 = x0 + width / 2, y0 + height / 2
        touching = [one for one in objects if _overlap(one["box"], (x0, y0, x1, y1))]
        if len(touching) == 1 and _inside(touching[0]["box"], (x0, y0, x1, y1)):
            corners[name] = touching[0]
    for name, one in corners.items():
        for attribute, value in one["attributes"].items():
            text = f"Which {attribute} does the {thing} at the {name} have?"
            yield Question(
                f"Which {thing} is at the {name}?" if attribute == thing else text, value, "region", "medium"
            )
    for (name, one), (other_name, other) in combinations(corners.items(), 2):
        for attribute, value in one["attributes"].items():
            if attribute in other["attributes"]:
                places = f"the {thing}s at the {name} and at the {other_name}"
                text = f"Are {places} the same?" if attribute == thing else f"Do {places} have the same {attribute}?"
                yield Question(text, "yes" if value == other["attributes"][attribute] else "no", "same", "hard")


def _relations(objects: list[dict[str, Any]], salt: str) -> Iterator[Question]:
    labels = [one["label"] for one in objects]
    named = [one for one in objects if labels.count(one["label"]) == 1]
    for one, other in combinations(named, 2):
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = one["box"], other["box"]
        a, b = one["label"], other["label"]
        for words, a_first, b_first in (
            (("left of", "right of"), ax1 <= bx0, bx1 <= ax0),
            (("above", "below"), ay1 <= by0, by1 <= ay0),
        ):
            if a_first != b_first:  # apart in this direction
                asked = pick(words, salt, a, b)
                yield Question(
                    f"Is the {a} {asked} the {b}?",
                    "yes" if a_first == (asked == words[0]) else "no",
                    "direction",
                    "medium",
                )
        areas = (ax1 - ax0) * (ay1 - ay0), (bx1 - bx0) * (by1 - by0)
        if min(areas) > 0 and max(areas) >= _LARGE_RATIO * min(areas):
            larger = a if areas[0] > areas[1] else b
            yield Question(f"Which looks larger, the {a} or the {b}?", f"the {larger}", "size", "medium")


def _rows(truth: dict[str, Any], salt: str) -> Iterator[Question]:
    lines = truth.get("text", [])
    if len(lines) == 1:
        kind = "digit" if lines[0].replace(" ", "").isdigit() else "word" if " " not in lines[0] else "line"
        text = "Which digits are shown, from left to right?" if kind == "digit" else "What does the text say?"
        yield Question(text, lines[0], kind, "easy" if len(lines[0]) == 1 else "medium")
    for number, line in enumerate(lines, 1):
        if len(lines) == 1:
            continue
        words = line.split()
        difficulty = "medium" if len(words) < 3 else "hard"
        yield Question(pick(_ROW, salt, number).format(number), line, "line", difficulty)
        if len(words) > 1:
            yield Question(f"What stands first in row {number}?", words[0], "order", "medium")
            yield Question(f"What stands last in row {number}?", words[-1], "order", "medium")


def _count_difficulty(count: int) -> str:
    return "easy" if count <= 2 else "medium" if count <= 5 else "hard"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[:1] in 'aeiou8' else 'a'} {noun}"


def _overlap(a: Any, b: Any) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(a: Any, b: Any) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]
