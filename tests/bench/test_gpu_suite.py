"""The GPU suite: its judges can fail, and nothing is lost when a stage crashes, hangs or the whole run is cut off.

The stages themselves run in ``make gpu-dry``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from m4ov_bench.gpu import install, operators, results, runner, stages
from m4ov_bench.gpu.example import Example, Maker, operator_named, poisoned_memory, recorded
from m4ov_bench.gpu.machine import run as machine_stage
from m4ov_bench.gpu.part import FAILED, NOT_RUN, PASSED, NotRun, Part
from m4ov_bench.gpu.properties import _no_host_synchronisation, _same_bits_twice
from m4ov_kernels import dispatch

ROOT = Path(__file__).parents[2]
# Stages by name: one passes, one dies of a signal, one never ends, one ends without having finished.
STAGES = """
import os, signal, sys, time
from pathlib import Path
from m4ov_bench.gpu.part import NotRun, Part
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
part, module = Part(Path(arguments["--part"])), sys.argv[1]
if module == "machine":
    part.facts(operators=["one"], gpu="a GPU")
with part.check("first"):
    if module == "sanitizer":
        raise NotRun("no CUDA device")
if module == "properties":
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
if module == "speed":
    part.row(family="norm", operator="one", seconds=1.0)
    time.sleep(600)
if module == "training":
    with part.check("second"):
        raise AssertionError("wrong")
if module == "tests":
    sys.exit(0)
part.finish()
"""


def outcomes_of(tmp_path: Path, seconds: float, device: str = "cuda") -> tuple[dict[str, runner.Outcome], list[int]]:
    script = tmp_path / "stages.py"
    script.write_text(STAGES)
    reported: list[int] = []
    settings = runner.Settings(
        work=tmp_path,
        source=ROOT,
        device=device,
        seed=1,
        deadline=time.monotonic() + seconds,
        jobs=2,
        interpreter=(sys.executable, str(script)),
    )
    found = runner.run(settings, lambda outcomes: reported.append(len(outcomes)))
    return {outcome.stage.name: outcome for outcome in found}, reported


def test_a_crash_and_a_stage_that_never_ends_leave_the_results_of_the_others(tmp_path, monkeypatch):
    plan = stages.plan

    def short(names):
        return [
            stages.Stage(s.module, 2.0 if s.module == "speed" else s.limit, s.group, s.operator) for s in plan(names)
        ]

    monkeypatch.setattr(runner, "plan", short)
    found, reported = outcomes_of(tmp_path, 60)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "machine": PASSED,
        "numerics:one": PASSED,
        "properties:one": runner.CRASHED,
        "speed:one": runner.CUT_OFF,
        "training": FAILED,
        "sanitizer": NOT_RUN,
        "tests": runner.CRASHED,  # it ended with status 0, but without finishing
    }
    assert reported == list(range(1, 8))  # the results were written anew after every stage
    assert "about to die" in found["properties:one"].log
    assert found["properties:one"].part["checks"][0]["status"] == PASSED
    assert found["speed:one"].part["rows"] == [{"family": "norm", "operator": "one", "seconds": 1.0}]
    assert runner.verdict(list(found.values())) == FAILED
    green = [found[name] for name in ("machine", "numerics:one", "sanitizer")]
    assert runner.verdict(green) == PASSED
    assert runner.verdict([*green, found["speed:one"]]) == runner.CUT_OFF


def test_when_the_time_is_up_the_stages_left_are_cut_off_and_not_passed(tmp_path):
    found, _ = outcomes_of(tmp_path, 7)
    assert found["machine"].status == PASSED
    assert found["speed:one"].status == runner.CUT_OFF
    assert found["training"].status == runner.CUT_OFF
    assert "no time left" in found["training"].problem


def test_nothing_is_planned_if_the_first_stage_dies(tmp_path):
    settings = runner.Settings(
        tmp_path, ROOT, "cpu", 1, time.monotonic() + 60, 1, (sys.executable, "-c", "raise SystemExit('no torch')")
    )
    found = runner.run(settings, lambda _: None)
    assert [outcome.status for outcome in found] == [runner.CRASHED]
    assert "no torch" in found[0].problem
    assert runner.verdict(found) == FAILED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_keeps_its_results_and_leaves_no_process(tmp_path, number):
    command = [sys.executable, "-m", "m4ov_bench.gpu", "--dry-run", "--source", str(ROOT), "--jobs", "1"]
    command += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("machine: passed")
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == 3  # cut off: nothing is red, and it is no success either
    (path,) = (tmp_path / "results").glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["verdict"] == runner.CUT_OFF
    assert kept["dry_run"] is True
    assert kept["stages"][0]["status"] == PASSED
    assert {stage["status"] for stage in kept["stages"][1:]} == {runner.CUT_OFF}
    assert kept["machine"]["limits"]["copy B/s"] > 0
    assert "dry run" in path.with_suffix(".md").read_text()
    listed = [Path(f"/proc/{name}/cmdline") for name in os.listdir("/proc") if name.isdigit()]
    running = [path.read_bytes() for path in listed if path.exists()]
    assert not [line for line in running if str(tmp_path).encode() in line]


def test_an_operator_without_a_case_is_red(monkeypatch, tmp_path):
    assert operators.uncovered() == []
    monkeypatch.setitem(dispatch.FUNCTIONS, "new_operator", None)
    assert operators.uncovered() == ["new_operator"]
    with pytest.raises(LookupError, match=r"'new_operator' is registered .* no case in m4ov_bench.gpu.operators"):
        operators.cases_of("new_operator")
    from m4ov_bench.gpu.context import Context

    monkeypatch.delenv("PYTHONPATH", raising=False)
    part = Part(tmp_path / "part.json")
    machine_stage(Context(part, torch.device("cpu"), True, "", ROOT, tmp_path, 1))
    red = [check for check in json.loads(part.path.read_text())["checks"] if check["status"] == FAILED]
    assert len(red) == 1
    assert "new_operator" in red[0]["problem"]


def doubling(function, definition=lambda x: 2 * x) -> Example:
    x = torch.randn(4, 8, requires_grad=True)
    return Example("doubling", function, definition, (x,), (torch.randn(4, 8),), ("doubled", "grad_x"))


class HalfWritten(torch.autograd.Function):
    """Writes all but the last row."""

    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        torch.mul(x[:-1], 2, out=out[:-1])
        return out

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_an_element_that_nothing_wrote_is_red():
    example = doubling(HalfWritten.apply)
    with poisoned_memory():
        ours = example.run()
    assert ours[0][-1].isnan().all()
    assert not example.judge(ours).green
    assert "doubled" in example.judge(ours).problem
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_wrong_gradient_is_red_and_a_right_one_is_green():
    example = doubling(lambda x: 2 * x)
    assert example.judge(example.run()).green
    wrong = doubling(lambda x: x + x.detach())
    assert "grad_x" in wrong.judge(wrong.run()).problem


def test_other_bits_in_the_second_run_are_red(tmp_path):
    part = Part(tmp_path / "part.json")
    _same_bits_twice(part, doubling(lambda x: 2 * x), {})
    _same_bits_twice(part, doubling(lambda x: 2 * x + 1e-6 * torch.rand_like(x)), {})
    _same_bits_twice(part, doubling(lambda x: x * float("nan")), {})  # the same NaNs
    assert [check["status"] for check in part.data["checks"]] == [PASSED, FAILED, PASSED]


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: 2 * x + 0 * x.sum().item(),
        lambda x: 2 * x if bool((x > -9).all()) else 3 * x,
        lambda x: 2 * x + 0 * x[x > 0].sum(),
    ],
)
def test_a_host_that_reads_values_is_red_even_in_a_dry_run(reading, tmp_path):
    part = Part(tmp_path / "part.json")
    for function in (lambda x: 2 * x, reading):
        _no_host_synchronisation(part, torch.device("cpu"), doubling(function), {"backend": "triton"})
    assert [check["status"] for check in part.data["checks"]] == [NOT_RUN, FAILED]
    assert part.data["checks"][0]["problem"] == "no CUDA device"
    assert "host wait" in part.data["checks"][1]["problem"]


def test_every_example_can_be_made_and_recorded():
    for name, cases in operators.CASES.items():
        operator = operator_named(name)
        implementation = operator.select(torch.device("cpu"), torch.float32)
        if implementation is None:
            pytest.skip("no kernels on this machine")
        example = next(cases.examples(Maker(torch.device("cpu"), torch.float32), True))
        with recorded(operator, implementation) as calls:
            example.run()
        assert [len(calls[kind]) for kind in ("fwd", "bwd")] == [1, 1]
        assert "select" not in vars(operator)  # the class's own choice is back


def test_a_part_is_whole_after_every_check(tmp_path):
    part = Part(tmp_path / "part.json")
    for status, error in ((PASSED, None), (FAILED, ValueError("bad")), (NOT_RUN, NotRun("no CUDA device"))):
        with part.check("a check", operator="one") as found:
            found["error"] = 0.5
            if error:
                raise error
        last = json.loads(part.path.read_text())["checks"][-1]
        assert (last["status"], last["error"], last["operator"]) == (status, 0.5, "one")
    assert json.loads(part.path.read_text())["complete"] is False
    part.finish()
    assert json.loads(part.path.read_text())["complete"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_a_failed_build_makes_the_verdict_red():
    facts = {"gpu": "NVIDIA H200", "peers without a counterpart": {"a peer": "nothing to compare"}}
    machine = runner.Outcome(stages.MACHINE, PASSED, data={"facts": facts})
    rest = runner.Outcome(stages.Stage("numerics", 1, 1, "one"), PASSED)
    about = {"dry_run": False, "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "dirty": True, "seed": 1}
    about |= {"seconds": 1.0, "build": {"status": FAILED, "problem": "no nvcc | here", "seconds": 1.0}}
    made = results.assembled([machine, rest], about)
    assert made["verdict"] == FAILED
    assert results.file_name(made) == "nvidia-h200-2026-01-02t0304-abc"
    assert "no nvcc \\| here" in results.markdown(made)
    assert "uncommitted changes" in results.markdown(made)
    assert "Not measured: a peer: nothing to compare." in results.markdown(made)


def test_what_the_build_lacks_is_named(monkeypatch):
    assert install.missing() == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(install, "_NEEDED", {"pybind11": 999})
    assert len(install.missing()) == 2
    assert "pybind11>=999" in install.missing()[0]
    assert "C++ compiler" in install.missing()[1]
