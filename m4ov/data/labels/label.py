"""A label, and how labels are told apart."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

_IDLE_WORDS = frozenset(("a", "an", "and", "for", "in", "of", "on", "or", "the", "with"))


class LabelError(ValueError):
    """A tree of labels, or what is asked of it, is wrong; the message names the file and the label."""


@dataclass(frozen=True)
class Label:
    """One label.

    Attributes:
        id: stable, because records carry it: lower-case letters and digits, joined by ``.``, ``-`` or ``_``.
        title: what people read.
        about: one line on what belongs here.
        parent: id of the label above; empty for the broadest.
        vertical: at the broadest level: a vertical domain, not part of the general tree.
        line: of the file it was read from; 0: none.
    """

    id: str
    title: str
    about: str
    parent: str = ""
    vertical: bool = False
    line: int = field(default=0, compare=False)


def near(id: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown id: the nearest one that is known."""
    close = difflib.get_close_matches(id, known, n=1) if isinstance(id, str) and len(id) < 200 else []
    return f"; did you mean {close[0]!r}?" if close else ""


def normalised(title: str) -> str:
    """A title as duplicates are told by it: case, punctuation, a plural s, "of", "the" and the like do not count."""
    folded = unicodedata.normalize("NFKC", title).casefold()
    words = "".join(sign if sign.isalnum() else " " for sign in folded).split()
    kept = [word for word in words if word not in _IDLE_WORDS] or words
    return " ".join(word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] != "s" else word for word in kept)
