"""Installs this checkout into a folder with the running Python, without a network: ``python bench/gpu/install.py``.

Run as a file, before anything of ours can be imported; standard library alone. Needs ``pip``, ``setuptools`` ≥ 77 and
``pybind11`` in that Python (wheels to carry to a machine without them), ``g++``, and ``nvcc`` for the CUDA kernels.
Where the compiled extension cannot be built, that is recorded as a failure, and pure Python is installed so that the
Triton kernels can still be checked and measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NEEDED = {"setuptools": 77, "pybind11": 2, "pip": 23}  # the oldest major version that will do
_TAIL = 2000  # characters of a failed build's output that are kept


def missing() -> list[str]:
    """What the build needs and this Python or this machine does not have, in words."""
    found = []
    for name, oldest in _NEEDED.items():
        version = _version(name)
        if not version or int(version.split(".")[0]) < oldest:
            found.append(f"Python package {name}>={oldest} (here: {version or 'none'}); carry its wheel and install it")
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        found.append("a C++ compiler: g++ 11 or newer, or CXX naming one")
    return found


def _version(package: str) -> str:
    """Empty if it is not installed. By its metadata: to look for the module ``pip`` makes setuptools give up its own
    ``distutils`` for the rest of the process."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def install(target: Path, limit: float) -> dict[str, object]:
    """Install into ``target`` (emptied first) within ``limit`` seconds.

    Returns:
        ``status`` (``"passed"``, ``"failed"`` or ``"cut off"``), ``problem``, ``seconds``, ``usable`` (whether the
        stages can run: pure Python is enough) and ``path``.
    """
    begun = time.monotonic()
    problem, status = "; ".join(missing()), "passed"
    if problem:
        status, problem = "failed", f"the build lacks {problem}"
    else:
        problem = _pip(target, {}, limit)
        if problem:
            status = "cut off" if problem.startswith("cut off") else "failed"
    usable = status == "passed"
    if not usable and _version("setuptools") and _version("pip"):
        second = _pip(target, {"M4OV_BUILD": "0"}, limit)
        usable = not second
        problem += f"; and pure Python: {second}" if second else "; installed as pure Python instead"
    seconds = round(time.monotonic() - begun, 1)
    return {"status": status, "problem": problem, "seconds": seconds, "usable": usable, "path": str(target)}


def _pip(target: Path, variables: dict[str, str], limit: float) -> str:
    """The end of pip's output if it failed; empty if it did not."""
    # What setuptools left of an earlier build would be installed again, files that are gone by now included.
    for old in (target, *(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist*")):
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--no-compile", "--target", str(target), str(ROOT)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"cut off after {limit:.0f} s"
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip()[-_TAIL:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the folder to install into; emptied first")
    parser.add_argument("record", type=Path, help="the JSON file that says how it went")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds (default: 150)")
    arguments = parser.parse_args()
    result = install(arguments.target.resolve(), arguments.limit)
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    arguments.record.write_text(json.dumps(result), encoding="utf-8")
    print(f"build: {result['status']} in {result['seconds']} s", result["problem"])
    return 0 if result["usable"] else 1


if __name__ == "__main__":
    sys.exit(main())
