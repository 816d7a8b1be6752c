"""The report: one page that needs nothing else, with everything that was found."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
from rich.console import Console

from m4ov.evaluate import Accuracy, Example, Report, SideBySide, html, print_table

ROWS = [
    {"operator": "rms_norm", "case": "4096 x 4096", "what": "forward", "seconds": 2e-3, "limit_seconds": 1.9e-3}
    | {"fraction": 0.95, "limit": "copy bandwidth"},
    {
        "operator": "swiglu",
        "case": "1 x 1",
        "what": "forward",
        "seconds": None,
        "limit_seconds": None,
        "fraction": None,
    },
]


def report(operators=ROWS, **changed) -> Report:
    comparison = {
        "patched_seconds": (0.2, 0.1, 0.1),
        "unpatched_seconds": (0.4, 0.3, 0.3),
        "patched_step": 0.1,
        "unpatched_step": 0.3,
        "patched_peak_mib": 500.0,
        "unpatched_peak_mib": None,
        "loss_differences": (0.0, 1e-4, -2e-3),
        "samples": 26,
        "tokens": 800,
        "patch": "norm <5> replaced",
    }
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    return Report(
        title="A run",
        facts={"model": "a <small> one"},
        metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.1}],
        accuracies=[
            Accuracy("general", {"colour": (3, 4), "shape": (0, 1)}, (True,) * 3 + (False,) * 2, ("a",) * 5),
            Accuracy("domain", {"digit": (1, 1)}, (True,), ("7",)),
        ],
        examples=[
            Example(picture, "which <digit>?", "7", "7", "digit"),
            Example(picture, "what color is it?", "", "blue", "colour"),
        ],
        comparison=SideBySide(**{**comparison, **changed}),
        operators=operators,
        machine="a machine",
    )


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else():
    text = html(report())
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 4
    assert tags.count("img") == 2
    assert "script" not in tags
    assert "link" not in tags
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert not re.search(r"url\((?!#|\"#|'#)", text)
    for found in ("60.00%", "100.00%", "3.00 ×", "0.002", "rms_norm", "95%", "a <small> one", "which <digit>?"):
        assert found in page.text, found
    for found in ("true: blue", "(nothing)", "500 MiB", "not observable here", "norm <5> replaced", "a machine"):
        assert found in page.text, found


def test_the_page_does_without_operators():
    page = Page(html(report(operators=[])))
    assert "Operators against the limit" not in page.text
    assert [tag for tag, _ in page.tags].count("svg") == 3


def test_the_table_says_the_same():
    console = Console(record=True, width=120, file=io.StringIO())
    print_table(report(), console)
    text = console.export_text()
    for found in ("60.00% of 5", "100.00% of 1", "75.0% of 4", "100 / 300 ms (3.00 ×)", "500 MiB / –", "0.002"):
        assert found in text, found


def test_speedup_and_differences():
    comparison = report(loss_differences=(0.1, -0.3)).comparison
    assert comparison.speedup == 0.3 / 0.1
    assert comparison.largest_loss_difference == 0.3
