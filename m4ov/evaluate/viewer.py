"""Answers of several arms beside their questions and images, to be looked through in the page: HTML that needs nothing
else. All text is escaped; the script reads nothing but attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from jinja2 import Environment

from m4ov.evaluate.report import data_uri


@dataclass(frozen=True)
class Said:
    """One answer of an arm.

    Attributes:
        tokens: how many it has.
        on_blank: what the same seed says where the image is blank, and whether that is right; ``None``: not asked.
        notes: more about it, each a few words.
    """

    arm: str
    text: str
    right: bool
    tokens: int
    on_blank: tuple[str, bool] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Card:
    """A question and what was answered to it.

    Attributes:
        image: uint8 ``[H, W, 3]``.
        step: of the training in which it was asked; ``None``: it is held out.
    """

    image: np.ndarray
    question: str
    truth: str
    kind: str
    said: Sequence[Said]
    step: int | None = None


def viewer(cards: Sequence[Card]) -> str:
    """The cards, with filters by arm, kind, right or wrong and, where they have one, step. Where scripts are off, all
    are seen."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = (resources.files("m4ov.evaluate") / "viewer.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        cards=cards,
        pictures=[data_uri(card.image) for card in cards],
        arms=list(dict.fromkeys(said.arm for card in cards for said in card.said)),
        kinds=sorted({card.kind for card in cards}),
        steps=sorted({card.step for card in cards if card.step is not None}),
        on_blank=any(said.on_blank is not None for card in cards for said in card.said),
        notes=any(said.notes for card in cards for said in card.said),
    )
