"""Fresh random models and inputs in every run, as in the kernels' tests."""

from __future__ import annotations

from tests.kernels.conftest import _fresh_inputs  # noqa: F401
