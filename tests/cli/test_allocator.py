"""The allocator's set-up, seen from the processes in which it happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from m4ov import allocator

glibc = pytest.mark.skipif(allocator.unavailable() is not None, reason=str(allocator.unavailable()))
VARIABLES = {*allocator.ENVIRONMENT, allocator.SWITCH, allocator._RESTARTED, "GLIBC_TUNABLES"}
REPORT = """
import json, os, sys
from m4ov import allocator
{before}
status = {action}
status = status or allocator.status()
present = [name for name in allocator.ENVIRONMENT if name in os.environ]
seen = {{"keeps": status.keeps, "how": status.how, "reason": status.reason, "argv": sys.argv, "set": present}}
print(json.dumps(seen))
"""


def report(action: str, before: str = "", extra: dict[str, str] | None = None) -> dict:
    """Run Python in a process without the variables, and return what it says about its allocator."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    code = REPORT.format(action=action, before=before)
    child = subprocess.run(
        [sys.executable, "-c", code, "an argument", "--flag"],
        capture_output=True,
        text=True,
        env=environment | (extra or {}),
        check=True,
    )
    return json.loads(child.stdout)


@glibc
def test_untouched_glibc_maps_large_blocks():
    seen = report("None")
    assert seen["keeps"] is False
    assert seen["how"] == "not set up"


@glibc
def test_ensure_starts_the_command_again_once():
    seen = report("allocator.ensure()")
    assert seen["keeps"] is True
    assert seen["how"] == "environment"
    assert seen["argv"] == ["-c", "an argument", "--flag"]
    assert sorted(seen["set"]) == sorted(allocator.ENVIRONMENT)


@glibc
@pytest.mark.skipif(allocator._glibc_version() < (2, 35), reason="glibc.malloc.hugetlb came with glibc 2.35")
@pytest.mark.parametrize(
    ("mine", "then"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_huge_pages_are_added_to_what_the_user_tuned(mine, then):
    seen = report("allocator.ensure()", extra={"GLIBC_TUNABLES": mine})
    assert seen["reason"].endswith(f"GLIBC_TUNABLES={then}")


@glibc
def test_ensure_keeps_the_process_and_never_loops():
    """The same pid starts twice and no more, even when the variables get lost on the way."""
    code = (
        "import os, sys\n"
        "print('start', os.getpid(), flush=True)\n"
        "for name in ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_'): os.environ.pop(name, None)\n"
        "from m4ov import allocator\n"
        "allocator.ensure()\n"
        "print(allocator.status().reason)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in allocator.ENVIRONMENT}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    first, second, reason = child.stdout.splitlines()
    assert first == second
    assert "lost on the way" in reason


@glibc
@pytest.mark.parametrize(
    ("before", "extra", "reason"),
    [
        ("", {allocator.SWITCH: "0"}, "M4OV_ALLOCATOR=0"),
        ("import types; sys.modules['torch'] = types.ModuleType('torch')", {}, "torch is already imported"),
        ("", {"LD_PRELOAD": "/nowhere/libjemalloc.so.2"}, "jemalloc is preloaded"),
    ],
)
def test_ensure_leaves_the_process_alone(before, extra, reason):
    seen = report("allocator.ensure()", before=before, extra=extra)
    assert seen["set"] == []
    assert seen["how"] == "not set up"
    assert reason in seen["reason"]


@glibc
def test_tune_in_process():
    seen = report("allocator.tune_in_process()")
    assert seen["keeps"] is True
    assert seen["how"] == "in process"
    assert seen["set"] == []


@glibc
def test_tune_in_process_obeys_the_switch():
    seen = report("allocator.tune_in_process()", extra={allocator.SWITCH: "0"})
    assert seen["keeps"] is False
    assert "M4OV_ALLOCATOR=0" in seen["reason"]


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "glibc's; this is" in str(allocator.unavailable())
    allocator.ensure()  # returns
    status = allocator.status()
    assert status.keeps is None
    assert status.how == "not set up"


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "confstr", lambda name: None)
    assert "musl" in str(allocator.unavailable())


def test_only_the_standard_library_is_imported():
    code = "import sys; from m4ov import allocator; print([m for m in sys.modules if m.partition('.')[0] in sys.argv])"
    child = subprocess.run(
        [sys.executable, "-c", code, "torch", "numpy", "omegaconf", "rich"], capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == "[]"
