"""What holds for all tests: one seed, whatever runs before them; Triton interprets where there is no GPU; Ctrl-C means
what it does at a terminal."""

from __future__ import annotations

import os
import random
import secrets
import signal
import zlib

# One for all processes of a run: pytest-xdist's inherit it.
if not os.environ.get("M4OV_TEST_SEED"):
    os.environ["M4OV_TEST_SEED"] = str(secrets.randbits(32))
if "PYTEST_XDIST_WORKER" in os.environ:  # they share the cores: threads that wait should not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A cached graph holds the shapes that an operator's fake gave when it was compiled.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import numpy as np
import pytest
import torch

from m4ov.parallel import ranks

# The server from which ranks are forked imports once what most of them would import each for itself.
ranks.PRELOAD += ("m4ov.sft", "tests.train.small", "torch.utils.tensorboard")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton must find it when it is first imported

# A shell starts background jobs with SIGINT ignored, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"kernel inputs: M4OV_TEST_SEED={os.environ['M4OV_TEST_SEED']}"


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    _seed(f"{request.node.nodeid} {fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.nodeid)


def _seed(name: str) -> None:
    """The global generators, for a test that draws from them: with one seed of the run a test has one set of inputs, in
    whatever order and process it comes."""
    seed = zlib.crc32(f"{os.environ['M4OV_TEST_SEED']} {name}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
