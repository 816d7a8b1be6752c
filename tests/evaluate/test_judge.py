"""A judge behind a real server: what it extracts is read by the rules that ask one; nothing is drawn where it fails."""

from __future__ import annotations

import pytest

from m4ov.data.teacher.http import HttpTeacher
from m4ov.evaluate.asking import Asking, Said
from m4ov.evaluate.benchmarks import BENCHMARKS
from m4ov.evaluate.benchmarks.base import Question
from m4ov.evaluate.judge import judge
from m4ov.evaluate.scoring import outcome, score
from tests.data import chat_server
from tests.data.chat_server import ChatServer

OPTIONS = {"A": "a cat", "B": "a dog", "C": "a bird"}


def question(name: str, answer: str = "B", kind: str = "option") -> Question:
    options = OPTIONS if kind == "option" else {}
    return Question(name, f"What is it ({name})?", (), answer, kind, options=options, group=name, precision=1)


def asked(teacher, name: str, *items: tuple[Question, str]):
    bench = BENCHMARKS[name]
    return bench, score(bench, {Asking(one): Said(answer, "stop", 1) for one, answer in items}, teacher)


def reply(seen) -> str:
    if "hound" in seen.text:
        return "B"
    if "fourteen" in seen.text:
        return "14"
    return "NONE" if "horse" in seen.text else "(B) a dog, as the response says, " + "which I think is right " * 20


def teacher_of(server: ChatServer, **options) -> HttpTeacher:
    return HttpTeacher(server.url, "judge", **{"retries": 0, "concurrency": 2} | options)


def test_a_judge_is_asked_where_a_rule_extracts_nothing():
    items = [
        (question("1"), "a hound, barking"),
        (question("2"), "a horse"),
        (question("3"), "B"),
        (question("4"), "a poodle"),
        (question("5"), ""),
    ]
    with ChatServer(reply) as server, teacher_of(server, prompt_price=1e6) as teacher:
        bench, found = asked(teacher, "mmbench", *items)
        assert sorted(seen.text.split("[Response]\n")[1].split("\n")[0] for seen in server.seen) == [
            "a horse",
            "a hound, barking",
            "a poodle",
        ]
        assert teacher.usage.cost == 3 * 7
    records = [one.to_json("mmbench") for one in found]
    for rule in ("official", "VLMEvalKit", "lmms-eval"):
        assert [row["rules"][rule]["by"] for row in records] == ["judge", "nothing", "rule", "nothing", "nothing"]
        assert [row["rules"][rule]["right"] for row in records] == [True, False, True, False, False]
    assert records[0]["judged"] == "B"
    assert (records[1]["judged"], records[1]["judge_problem"]) == (None, "")
    assert "a judgement of" in records[3]["judge_problem"]  # a lecture is no answer
    assert "judged" not in records[4]  # nothing was said
    assert outcome(bench, found).shares["official", "circular"].value == 0.4


def test_each_tools_own_second_half_reads_what_was_extracted():
    with ChatServer(reply) as server, teacher_of(server) as teacher:
        _, (letter, number) = asked(
            teacher,
            "mathvista",
            (question("1", "a dog"), "a hound, surely"),
            (question("2", "14", "integer"), "It is fourteen."),
        )
        assert len(server.seen) == 2  # one for all rules
    assert {rule: (one.value, one.right) for rule, one in letter.readings.items()} == {
        "official": ("a dog", True),
        "VLMEvalKit": ("B", True),
        "lmms-eval": ("a dog", True),
    }
    assert {(one.value, one.right) for one in number.readings.values()} == {("14", True)}


def test_rules_without_a_judge_ask_none():
    with ChatServer(reply) as server, teacher_of(server) as teacher:
        _, (found,) = asked(teacher, "mmstar", (question("1"), "hound"))
        assert found.readings["VLMEvalKit"].right
        assert found.readings["official"].value is found.readings["lmms-eval"].value is None
        _, (found,) = asked(teacher, "mathvision", (question("2", "14", "free"), "so it is fourteen"))
        assert {rule: one.value for rule, one in found.readings.items()} == {
            "official": None,
            "VLMEvalKit": "14",
            "lmms-eval": None,
        }


@pytest.mark.parametrize("fault", [chat_server.status(500), chat_server.body(b"{}"), chat_server.hang_up()])
def test_a_judge_that_fails_draws_nothing(fault):
    """Elsewhere an option is drawn at random after three failures. Here twenty answers stay unread, every time."""
    items = [(question(str(place)), f"a horse {place}") for place in range(20)]
    with ChatServer(lambda seen: fault) as server, teacher_of(server) as teacher:
        bench, found = asked(teacher, "mmbench", *items)
        assert teacher.usage.failed == 20
        assert all(one.value is None for scored in found for one in scored.readings.values())
        assert all(scored.judged.problem for scored in found)
        assert outcome(bench, found).failures["neither letter nor option"]["VLMEvalKit"] == 20
        assert [one.problem[:6] for one in judge(teacher, items[:2])] == ["judge:"] * 2
