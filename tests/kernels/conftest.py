"""Kernel tests: fresh random values in every run (the seed is printed), and every ISA that this machine has."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from m4ov_kernels.dispatch import native_extension

# The `isa` fixture stays the same for all examples of one test, which is what is wanted.
settings.register_profile("kernels", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("kernels")

SEED = int(os.environ["M4OV_TEST_SEED"])  # ../conftest.py
# Where the extension must come from, in every process (../sanitize.py).
if os.environ.get("M4OV_TEST_EXTENSION"):
    assert native_extension()[0].__file__.startswith(os.environ["M4OV_TEST_EXTENSION"]), native_extension()[0].__file__


@pytest.fixture(autouse=True)
def _fresh_inputs(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


def _isas() -> list[str]:
    extension, _ = native_extension()
    return extension.isas() if extension else []


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine can run, forced for one test."""
    extension, _ = native_extension()
    previous = extension.isa()
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa(previous)
