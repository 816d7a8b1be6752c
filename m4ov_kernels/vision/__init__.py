"""The front end of a vision tower, and the way of its features into the language model."""

from __future__ import annotations

__all__: list[str] = []
