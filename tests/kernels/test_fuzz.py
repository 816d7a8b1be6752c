"""A few thousand calls of the fuzzer in every run of the suite, and that it sees what it must; ``make fuzz`` makes a
million, under the sanitizers."""

from __future__ import annotations

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

CALLS = 3000
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


def test_calls():
    made = set()
    for index in range(CALLS):
        try:
            outcome = fuzz(SEED, index)
        except FuzzError as error:
            pytest.fail(f"python tests/fuzz.py --plain --only {SEED}:{index}\n{error}")
        made.add((outcome.operator, outcome.kind))
    kinds = {name: ("forward", "refused") + ("backward",) * bool(case.differentiable) for name, case in CASES.items()}
    assert made == {(name, kind) for name in CASES for kind in kinds[name]}


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
    with pytest.raises(FuzzError, match="swiglu on"):
        make(2000)


def test_the_command():
    def run(*arguments: str) -> str:
        command = [sys.executable, str(SCRIPT), "--plain", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    output = run("--calls", "60", "--seed", "1")
    assert "60 of 60 calls" in output
    assert "no call failed" in output
    assert "Outcome(operator=" in run("--only", "1:3")
