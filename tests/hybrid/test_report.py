"""Policies against each other: claims as they come out; the viewer shows any text as text."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from m4ov.evaluate import Report, html, plots, print_table
from m4ov.evaluate.policies import ArmRun, Figures, claims, retention, sections
from m4ov.evaluate.report import Section
from m4ov.evaluate.viewer import Card, Said, viewer
from tests.evaluate.test_report import Page

PLAIN = Figures(0.60, 0.80, 40.0, 38.0, 0.01, 0.30, {"count": 0.7, "sum": 0.5}, 0.95, 0.90)
#: arm → changes of two seeds; the start is one.
ARMS = {
    "start": [{"pass_1": 0.40, "pass_k": 0.78, "general": 0.96}],
    "accuracy": [{"pass_1": 0.62, "pass_k": 0.80}, {"pass_1": 0.65, "pass_k": 0.82}],
    "pass_at_k": [{"pass_1": 0.60}, {"pass_1": 0.61}],
    "all": [
        {"pass_1": 0.64, "pass_k": 0.84, "length": 20.0, "survival": 0.20},
        {"pass_1": 0.66, "pass_k": 0.84, "length": 24.0, "survival": 0.20},
    ],
}


def runs(**changed) -> list[ArmRun]:
    return [
        ArmRun(arm, seed, 60, 100.0, replace(PLAIN, **figures))
        for arm, seeds in (ARMS | changed).items()
        for seed, figures in enumerate(seeds)
    ]


def every(figures: dict, **values) -> list[dict]:
    return [one | values for one in figures]


OURS = ARMS["all"]


@pytest.mark.parametrize(
    ("changed", "came_out"),
    [
        ({}, ["yes"] * 5),
        ({"pass_at_k": every(ARMS["pass_at_k"], pass_1=0.70)}, ["no", "yes", "yes", "yes", "yes"]),
        ({"start": [{"pass_1": 0.70, "general": 0.96}]}, ["no", "yes", "yes", "yes", "yes"]),
        (
            {"accuracy": [{"pass_1": 0.60, "pass_k": 0.8}, {"pass_1": 0.72, "pass_k": 0.8}]},
            ["equal within the spread", "yes", "yes", "yes", "yes"],
        ),
        ({"all": every(OURS, pass_k=0.805)}, ["yes", "no", "yes", "yes", "yes"]),
        ({"all": every(OURS, length=28.0)}, ["yes"] * 5),  # 70% exactly
        ({"all": every(OURS, length=28.1)}, ["yes", "yes", "no", "yes", "yes"]),
        ({"all": every(OURS, survival=0.30)}, ["yes", "yes", "yes", "no", "yes"]),
        ({"all": every(OURS, survival=math.nan)}, ["yes", "yes", "yes", "cannot be judged", "yes"]),
        ({"all": every(OURS, general=0.94)}, ["yes", "yes", "yes", "yes", "no"]),
        ({"start": [{"general": 0.0}]}, ["yes", "yes", "yes", "yes", "cannot be judged"]),
    ],
)
def test_claims_are_judged_by_what_came_out(changed, came_out):
    assert [row[1] for row in claims(runs(**changed), 8)] == came_out


def test_figures_of_claims():
    best, above, shorter, blind, kept = claims(runs(), 8)
    assert "65.0% ± 1.4% against start 40.0% (+25.0 ± 1.0 points), accuracy 63.5% ± 2.1% (+1.5 ± 0.5 points)" in best[2]
    assert above[0] == "“all” has a higher pass@8 than “accuracy”"
    assert above[2] == "84.0% ± 0.0% against 81.0% ± 1.4% (+3.0 ± 1.0 points)"
    assert shorter[2] == "22.0 ± 2.8 against 40.0 ± 0.0 tokens: 55%"
    assert blind[2].startswith("20.0% ± 0.0% against 30.0% ± 0.0%")
    assert kept[2] == "99.0% ± 0.0%"
    assert retention(runs(), "all", "general") == pytest.approx([0.95 / 0.96] * 2)


def test_of_one_seed_a_lower_mean_is_lower():
    one = [run for run in runs(accuracy=[{"pass_1": 0.641}] * 2) if run.seed == 0]
    assert claims(one, 8)[0][1] == "no"
    assert "(-0.1 points)" in claims(one, 8)[0][2]


def test_what_is_not_there_is_not_judged():
    assert claims([run for run in runs() if run.arm != "all"], 8) == []
    alone = [run for run in runs() if run.arm in ("all", "pass_at_k")]
    assert [row[0] for row in claims(alone, 8)] == ["“all” keeps the best pass@1"]


def test_the_tables_have_it_all():
    none = every(ARMS["pass_at_k"], survival=math.nan, length_right=math.nan)
    found = sections(runs(pass_at_k=none), 8)
    report = Report("Arms", {"a": "fact"}, sections=found)
    page = html(report)
    cells = ("63.5% ± 2.1%", "22.0 ± 2.8", "<td>–</td>", "95.0% ± 0.0%", "99.0% ± 0.0%", "seeds 0, 1", "pass@8")
    for cell in cells:
        assert cell in page, cell
    assert "nan" not in page.split("<svg")[0]
    assert [section.title for section in found if section.columns] == [
        "Arms",
        "What was to come out, and what came out",
        "What is kept",
        "pass@1 by kind of question",
    ]
    assert page.count("<svg") == 1
    console = Console(record=True, width=200, file=io.StringIO())
    print_table(report, console)
    assert "“all” keeps the best pass@1" in console.export_text()


def test_curves_have_a_panel_each():
    one = {"a": [(1, 0.5), (2, 0.6)], "b": [(1, 0.4)]}
    svg = plots.curves({"one": one, "two": {"b": [(1, 1.0)]}, "three": {"a": [(3, 2.0)]}})
    assert svg.startswith("<svg")
    for title in ("one", "two", "three"):
        assert f"<!-- {title} -->" in svg


HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src="http://example.org/x" onerror="alert(1)">',
    "' onmouseover='alert(1)",
    "<!-- {{ 7 * 7 }} {% for %} --> &amp; &#x3c;b&#x3e;",
    "\u202egnp.exe\u0000\x1b[31m",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_shown_as_text(text):
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    said = [Said(text, text, True, 3, (text, False), [text]), Said("plain", "", False, 0)]
    cards = [Card(picture, text, text, text, said, 1), Card(picture, "q", "t", "k", said[1:], 12)]
    plain = [Card(picture, "q", "t", "j", [Said("a", "x", True, 3, ("y", False), ["n"]), said[1]], 1), cards[1]]
    seen = [Report("A page", {}, sections=[Section("Seen", figure=viewer(found))]) for found in (cards, plain)]
    page, other = (Page(html(report)) for report in seen)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in other.tags]
    assert [tag for tag, _ in page.tags].count("script") == 1
    for (_, attributes), (_, expected) in zip(page.tags, other.tags, strict=True):
        assert attributes.keys() == expected.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    (row,) = [a for tag, a in page.tags if tag == "tr" and a.get("data-outcome") == "right"]
    assert without_nul(row["data-arm"]) == without_nul(text)
    assert without_nul(page.text).count(without_nul(text)) >= 6  # arm twice, kind twice, answer, blank, note, question


def without_nul(text: str) -> str:
    """HTML has no character 0."""
    return text.replace("\0", "").replace("\ufffd", "")


def test_the_viewer_has_what_its_filters_need():
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    cards = [
        Card(picture, "how many?", "3", "count", [Said("a", "Answer: 3", True, 5), Said("b", "2", False, 2)], 4),
        Card(picture, "where?", "top left", "locate", [Said("b", "no", False, 1)], 9),
    ]
    page = Page(viewer(cards))
    options = [a["value"] for tag, a in page.tags if tag == "option" and "value" in a]
    assert options == ["", "a", "b", "", "count", "locate", ""]
    assert [(a["data-arm"], a["data-outcome"]) for tag, a in page.tags if "data-arm" in a] == [
        ("a", "right"),
        ("b", "wrong"),
        ("b", "wrong"),
    ]
    figures = [(a["data-kind"], a["data-step"]) for tag, a in page.tags if tag == "figure"]
    assert figures == [("count", "4"), ("locate", "9")]
    assert [(a["min"], a["max"]) for tag, a in page.tags if tag == "input"] == [("4", "9")] * 2
    assert "on blank" not in page.text
    held_out = viewer([replace(card, step=None) for card in cards])
    assert "input" not in [tag for tag, _ in Page(held_out).tags]
    assert not re.search(r"https?://", held_out)
