"""Stage: the project's own tests of the Triton kernels (random shapes, small blocks), if there is a pytest."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys

from m4ov_bench.gpu import device as chip
from m4ov_bench.gpu.context import Context
from m4ov_bench.gpu.part import NotRun

_FILES = ("tests/kernels/test_triton.py", "tests/kernels/test_triton_layer_norm.py")
_QUICK = "check or refused"  # what a dry run takes of it: CI has run all of it
_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b(.*)")


def run(context: Context) -> None:
    part = context.part
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        with part.check(_FILES[0]):
            raise NotRun(f"{' and '.join(missing)} not installed")
        return
    # A copy beside no package of ours, so that the tests import what was installed and not the checkout.
    shutil.copytree(context.source / "tests", context.work / "tests", dirs_exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *_FILES]
    command += ["-k", _QUICK] if context.tiny else []
    lines: list[str] = []
    with (
        part.check(f"{', '.join(_FILES)}: pytest"),
        subprocess.Popen(
            command, cwd=context.work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child,
    ):
        for line in child.stdout or ():
            lines.append(line)
            print(line, end="", flush=True)
            found = _LINE.match(line)
            if found:
                _record(context, *found.groups())
        if child.wait() != 0:
            raise AssertionError(f"exit status {child.returncode}: " + "".join(lines)[-900:])


def _record(context: Context, name: str, outcome: str, rest: str) -> None:
    with context.part.check(name):
        if outcome == "SKIPPED":
            raise NotRun(f"skipped {rest}".strip())
        if outcome != "PASSED":
            raise AssertionError(outcome.lower())
        chip.require(context.device)
