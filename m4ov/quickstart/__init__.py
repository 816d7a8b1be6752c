"""`m4ov run quickstart`: records from real images, three stages of training, and what came of it."""

from __future__ import annotations

from m4ov.quickstart.data import gather, produce
from m4ov.quickstart.flow import fingerprint, run

__all__ = ["fingerprint", "gather", "produce", "run"]
