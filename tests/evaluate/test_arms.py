"""Arms against each other: mean and spread, what is claimed and what came out, as a page and in the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from m4ov.evaluate import Report, html, print_table
from m4ov.evaluate.arms import ArmRun, claims, retention, sections, spread

SHARES = {  # arm → (general, domain) of two seeds
    "start": [(0.80, 0.10), (0.90, 0.12)],
    "domain_only": [(0.40, 0.970), (0.54, 0.960)],
    "mixture": [(0.82, 0.90), (0.90, 0.91)],
    "curriculum": [(0.80, 0.965), (0.89, 0.950)],
}


def runs(**changed) -> list[ArmRun]:
    return [
        ArmRun(arm, seed, 100, 5000 + seed, 60.0, {"general": general, "domain": domain})
        for arm, found in (SHARES | changed).items()
        for seed, (general, domain) in enumerate(found)
    ]


def test_spread_is_mean_and_sample_deviation():
    assert spread([0.5]) == "50.0%"
    assert spread([0.4, 0.6]) == "50.0% ± 14.1%"
    assert retention(runs(), "domain_only") == pytest.approx([0.5, 0.6])


@pytest.mark.parametrize(
    ("changed", "came_out"),
    [
        ({}, ["yes", "yes", "yes", "no"]),
        ({"curriculum": [(0.80, 0.954), (0.89, 0.954)]}, ["no", "yes", "yes", "no"]),
        ({"curriculum": [(0.70, 0.965), (0.89, 0.950)]}, ["yes", "no", "yes", "no"]),
        ({"domain_only": [(0.80, 0.97), (0.90, 0.96)]}, ["yes", "yes", "no", "no"]),
        ({"mixture": [(0.80, 0.90), (0.89, 0.90)]}, ["yes", "yes", "yes", "yes"]),
        (
            {"allotted": [(0.5, 0.5), (0.5, 0.5)], "uniform": [(0.5, 0.4), (0.5, 0.4)]},
            ["yes", "yes", "yes", "no", "yes"],
        ),
        (
            {"allotted": [(0.5, 0.5), (0.52, 0.5)], "uniform": [(0.6, 0.5), (0.6, 0.5)]},
            ["yes", "yes", "yes", "no", "no"],
        ),
        (
            {"allotted": [(0.5, 0.5), (0.52, 0.5)], "uniform": [(0.53, 0.5), (0.5, 0.5)]},
            ["yes", "yes", "yes", "no", "equal within the spread"],
        ),
    ],
)
def test_claims_are_judged_by_what_came_out(changed, came_out):
    assert [row[1] for row in claims(runs(**changed))] == came_out


def test_what_is_not_there_is_not_judged():
    assert claims([run for run in runs() if run.arm in ("start", "mixture")]) == []
    other = [ArmRun("curriculum", 0, 1, 1, 1.0, {"counting": 0.5})]
    assert claims(other) == []
    assert [section.title for section in sections(other, {}, [])] == ["Arms", "Final figures"]


DECISION = {
    "stage": 1,
    "name": "knowledge",
    "round": 2,
    "step": 60,
    "arm_step": 60,
    "action": "raise replay",
    "figures": {"general": 0.75, "domain": 0.93},
    "targets": {"domain": {"is": 0.93, "must be": 0.9, "holds": True}},
    "guards": {"general": {"is": 0.75, "must be": 0.78, "holds": False}},
    "next_images": {"general": 20, "domain": 52},
}


def test_the_report_has_it_all():
    courses = {arm: [(0, {"general": 0.8, "domain": 0.1}), (60, {"general": 0.7, "domain": 0.9})] for arm in SHARES}
    report = Report("A <comparison>", {"a": "fact"}, sections=sections(runs(), courses, [DECISION]))
    page = html(report)
    assert page.count("<svg") == 2
    for found in (
        "A &lt;comparison&gt;",
        "85.0% ± 7.1%",  # the start's general skill
        "55.0% ± 7.1%",  # what domain-only training keeps of it
        "mean ± standard deviation over seeds 0, 1",
        "domain 93.0% ≥ 90.0%; general 75.0% &lt; 78.0%",
        "raise replay",
        "general 20; domain 52",
        "the curriculum keeps at least 98% of the general skill",
    ):
        assert found in page, found
    for left_out in ("Accuracy on held-out questions", "Examples", "Patched against unpatched", "<h2>Loss</h2>"):
        assert left_out not in page
    console = Console(record=True, width=200, file=io.StringIO())
    print_table(report, console)
    text = console.export_text()
    assert "curriculum" in text
    assert "raise replay" not in text  # decisions are for the page
