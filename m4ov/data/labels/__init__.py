"""What a sample is about and what it asks: trees of topics and capabilities, their coverage, and how they grow."""

from __future__ import annotations

from m4ov.data.labels.coverage import Coverage, Dangling, check_labels, coverage
from m4ov.data.labels.growth import Balance, Extension, Refused, Share, balance, extend
from m4ov.data.labels.label import Label, LabelError
from m4ov.data.labels.picture import coverage_map, sunburst
from m4ov.data.labels.tree import LabelTree, capabilities, topics

__all__ = [
    "Balance",
    "Coverage",
    "Dangling",
    "Extension",
    "Label",
    "LabelError",
    "LabelTree",
    "Refused",
    "Share",
    "balance",
    "capabilities",
    "check_labels",
    "coverage",
    "coverage_map",
    "extend",
    "sunburst",
    "topics",
]
