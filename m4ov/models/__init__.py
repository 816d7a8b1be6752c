"""Single-device model definitions."""

from __future__ import annotations
