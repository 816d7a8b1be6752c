"""Accuracy on held-out data, and the report of a run."""

from __future__ import annotations

from m4ov.evaluate.accuracy import Accuracy, accuracies, exact_match, shares
from m4ov.evaluate.examples import Example, examples
from m4ov.evaluate.report import Report, SideBySide, html, print_table

__all__ = [
    "Accuracy",
    "Example",
    "Report",
    "SideBySide",
    "accuracies",
    "exact_match",
    "examples",
    "html",
    "print_table",
    "shares",
]
