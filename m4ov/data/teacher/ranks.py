"""Choices that look random and follow from their subject alone, on every machine and in every order of work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def rank(*parts: object) -> int:
    """A whole number of 64 bits."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def pick(options: Sequence[T], *parts: object) -> T:
    """One of the options."""
    return options[rank(*parts) % len(options)]
