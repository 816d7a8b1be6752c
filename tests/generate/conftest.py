"""Fresh random models and inputs in every run, as in the kernels' tests; and every instruction set, where asked for."""

from __future__ import annotations

from tests.kernels.conftest import _fresh_inputs, isa  # noqa: F401
