"""The operators through the compiled kernels (CPU); a file for each."""

from __future__ import annotations
