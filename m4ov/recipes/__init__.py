"""Recipes that come with the package: `m4ov run NAME`."""

from __future__ import annotations
