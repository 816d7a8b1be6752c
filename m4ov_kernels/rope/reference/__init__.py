"""The definitions, in plain PyTorch; a file for each operator."""

from __future__ import annotations
