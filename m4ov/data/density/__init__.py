"""How much an image gives to ask about, and what it is therefore given. ``README.md`` has the formulas."""

from __future__ import annotations

from m4ov.data.density.allot import Allotment, allot
from m4ov.data.density.embedded import score
from m4ov.data.density.record import AXES, Density, DensityError, audit, combine, write_audits
from m4ov.data.density.teacher import Unscored, score_by_teacher
from m4ov.data.density.text import Reader, TextLine, rapidocr

__all__ = [
    "AXES",
    "Allotment",
    "Density",
    "DensityError",
    "Reader",
    "TextLine",
    "Unscored",
    "allot",
    "audit",
    "combine",
    "rapidocr",
    "score",
    "score_by_teacher",
    "write_audits",
]
