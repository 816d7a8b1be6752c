"""What holds for all tests: one seed, Triton interprets where there is no GPU, and Ctrl-C means what it does at a
terminal."""

from __future__ import annotations

import os
import secrets
import signal

# One for all processes of a run: pytest-xdist's inherit it.
if not os.environ.get("M4OV_TEST_SEED"):
    os.environ["M4OV_TEST_SEED"] = str(secrets.randbits(32))
if "PYTEST_XDIST_WORKER" in os.environ:  # they share the cores: threads that wait should not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A cached graph holds the shapes that an operator's fake gave when it was compiled.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

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
