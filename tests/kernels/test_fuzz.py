"""A few thousand calls of the fuzzer in every run of the suite, and that it sees what it must; ``make fuzz`` makes a
million, under the sanitizers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m4ov_kernels.dispatch import OPERATORS, Implementation, native_extension

from .conftest import SEED
from .fuzzing import FuzzError, fuzz
from .operators import CASES

CALLS = int(os.environ.get("M4OV_FUZZ_CALLS", "3000"))
PARTS = 4  # tests, for several processes
SCRIPT = Path(__file__).parents[1] / "fuzz.py"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    extension = native_extension()[0]
    if extension is None:
        pytest.skip("there are no compiled kernels here")
    isa, threads = extension.isa(), torch.get_num_threads()
    yield
    extension.set_isa(isa)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", range(PARTS))
def test_calls(part):
    names, kinds = set(), set()
    for index in range(part, CALLS, PARTS):
        try:
            outcome = fuzz(SEED, index)
        except FuzzError as error:
            pytest.fail(f"python tests/fuzz.py --plain --only {SEED}:{index}\n{error}")
        names.add(outcome.operator)
        kinds.add(outcome.kind)
    assert names == CASES.keys()
    assert kinds == {"forward", "backward", "refused"}


def make(calls: int) -> None:
    for index in range(calls):
        fuzz(SEED, index)


def test_a_call_is_the_same_every_time():
    for index in range(20):
        assert fuzz(7, index) == fuzz(7, index)


@pytest.mark.parametrize("fault", ["unwritten", "past the end", "inaccurate", "input changed", "threads matter"])
def test_a_broken_kernel_is_found(fault, monkeypatch):
    operator = OPERATORS["swiglu"]
    real = operator.load("native")

    def broken(gate, up, numerics, *, out=None):
        last = out.view(-1)[-1:].clone() if out is not None else None
        result = real.fwd(gate, up, numerics, out=out)
        if not result.numel():
            return result
        if fault == "unwritten" and out is not None:
            out.view(-1)[-1:].view(torch.uint8).copy_(last.view(torch.uint8))
        elif fault == "past the end" and out is not None:
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
        elif fault == "inaccurate":
            result.mul_(1.03)
        elif fault == "input changed" and gate.is_contiguous():
            gate.view(-1)[0] += 1
        elif fault == "threads matter":
            result.view(-1)[0] = torch.get_num_threads()
        return result

    monkeypatch.setattr(operator, "_table", {})
    monkeypatch.setattr(operator, "load", lambda name: Implementation(name, broken, real.bwd))
    with pytest.raises(FuzzError, match=r"^(swiglu(_quantize)?|(int4|int8|fp8)_linear) on"):  # those that call it
        make(2000)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--plain", *arguments]


def test_the_command():
    def run(*arguments: str) -> str:
        done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    output = run("--calls", "60", "--seed", "1", "--first", "10")
    assert "50 of 50 calls" in output
    assert "no call failed" in output
    assert "Outcome(operator=" in run("--only", "1:3")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
def test_a_crash_is_told_and_the_run_goes_on_behind_it():
    arguments = ("--calls", "3000", "--seed", "1", "--workers", "1")
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = [process.stdout.readline(), process.stdout.readline()]  # the second: the worker is at its first call
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGSEGV)
        output += process.stdout.read()
    told = "".join(output)
    crashed = re.search(r"CRASHED at 1:(\d+) with status -11", told)
    assert crashed, told
    assert "failed: 1" in told
    assert process.returncode == 1
    made = int(re.findall(r"(\d+) of 3000 calls", told)[-1])
    assert 3000 - int(crashed[1]) - 1 <= made <= 3000, told  # all behind it, and those before that were reported
