"""The command ``m4ov``, from outside (exit status, one line, no torch) and from inside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from m4ov import allocator, cli


def m4ov(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if k not in allocator.ENVIRONMENT and k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "m4ov", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=keep | environment, timeout=120)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["doctor", "--help"],
        ["bench", "--help"],
        ["kernels", "check", "--help"],
        ["certify", "--help"],
        ["eval", "--help"],
        ["evaluate", "--help"],
        ["quantize", "--help"],
        ["data", "--help"],
        ["data", "build", "--help"],
        ["--version"],
    ],
)
def test_help_imports_no_torch(arguments, capsys, tmp_path):
    code = (
        "import sys\n"
        "from m4ov.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as exit:\n    code = exit.code\n"
        "print(code, [m for m in sys.modules if m.partition('.')[0] in ('torch', 'transformers', 'triton')])"
    )
    child = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[-1] == "0 []"


def test_no_command_prints_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quickstrt"], "did you mean quickstart?"),
        (["run", "quickstart", "train.stpes=3"], "unknown key train.stpes; did you mean train.steps?"),
        (["run", "quickstart", "train.steps=many"], "train.steps: expected int"),
        (["run", "none.yaml"], "recipe none.yaml: no such file"),
        (["run", "quickstart", "task=rl"], "has the task 'rl'; tasks: quickstart"),
        (["bench", "nrm"], "no benchmark is named 'nrm'"),
        (["eval", "nowhere"], "MODEL: nowhere: no such folder"),
        (["evaluate", "nowhere"], "MODEL: nowhere: no such folder"),
        (["quantize", "nowhere", "--scheme", "w4"], "MODEL: nowhere: no such folder"),
        (["kernels", "check", "--target", "sm_70"], "--target: unknown target sm_70; known: sm_80, sm_90"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"m4ov {arguments[0]}: ")


def test_a_mistake_from_outside():
    child = m4ov("run", "quickstart", "train.stpes=3")
    assert child.returncode == 2
    assert child.stderr.count("\n") == 1
    assert "Traceback" not in child.stderr


def test_traceback_on_request():
    child = m4ov("--traceback", "run", "none.yaml")
    assert child.returncode == 1
    assert "Traceback" in child.stderr
    assert "ConfigError" in child.stderr


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose task is a function of the test."""

    def make(function):
        path = tmp_path / "r.yaml"
        path.write_text("task: quickstart\nstages: {all: {mixture: {general: 1}}}\n")
        monkeypatch.setattr(
            cli, "_resolve", lambda place, real=cli._resolve: function if place.endswith(":run") else real(place)
        )
        return str(path)

    return make


def test_run_hands_the_configuration_to_the_task(recipe):
    seen = []
    assert cli.main(["run", recipe(seen.append), "train.steps=7"]) == 0
    assert seen[0].train.steps == 7


def test_an_error_in_a_task_is_one_line(recipe, capsys):
    def fail(_):
        raise PermissionError(13, "Permission denied", "/nowhere/run")

    assert cli.main(["run", recipe(fail)]) == 2
    assert capsys.readouterr().err == "m4ov run: /nowhere/run: Permission denied\n"


def test_an_unexpected_error_names_its_kind(recipe, capsys):
    def fail(_):
        raise RuntimeError("something\nlong")

    assert cli.main(["run", recipe(fail)]) == 2
    assert capsys.readouterr().err == "m4ov run: RuntimeError: something long (m4ov --traceback … shows where)\n"


def test_interrupt_is_130_and_says_how_to_go_on(recipe, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    assert cli.main(["run", recipe(interrupt)]) == 130
    assert "the same command goes on where it was" in capsys.readouterr().err


def test_a_task_says_more_about_its_interruption(recipe, capsys):
    def interrupt(_):
        raise KeyboardInterrupt("stopped after step 7; the same command goes on from there")

    assert cli.main(["run", recipe(interrupt)]) == 130
    assert capsys.readouterr().err == "\nm4ov run: stopped after step 7; the same command goes on from there\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_from_outside():
    child = subprocess.Popen(
        [sys.executable, "-m", "m4ov", "bench", "norm"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    time.sleep(3)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    # CPython itself dies of the signal if the interrupt met an exec() of source text; a shell shows 130 for both.
    assert child.returncode in (130, -signal.SIGINT), errors.decode()
    assert errors.decode().strip() == "m4ov bench: interrupted"


def test_doctor_sets_the_allocator_up_and_is_json():
    child = m4ov("doctor", "--json")
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    if allocator.unavailable() is None:
        assert report["facts"]["allocator"]["set up"] == "environment"
        assert report["facts"]["allocator"]["large blocks"] == "stay in the process"


def test_doctor_says_when_it_may_not():
    if allocator.unavailable() is not None:
        pytest.skip(str(allocator.unavailable()))
    report = json.loads(
        m4ov("doctor", "--json", M4OV_ALLOCATOR="0", M4OV_BACKEND="reference", M4OV_ISA="baseline").stdout
    )
    assert report["facts"]["allocator"]["large blocks"] == "mapped afresh each time"
    assert any("page-faulted" in advice for advice in report["advice"])
    on_cpu = [served for served in report["operators"] if served["device"] == "cpu"]
    assert {served["runs"] for served in on_cpu} == {"reference"}
    assert {served["why"] for served in on_cpu} == {"M4OV_BACKEND=reference"}
