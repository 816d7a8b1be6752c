"""Build the extension with AddressSanitizer and UBSan into build/sanitize, and run the native tests with it.

``python tests/sanitize.py [pytest arguments]``; by default, what calls the kernels of every operator: drawn calls
(many more of the fuzzer's than elsewhere, for they cost least), outputs in guard zones, calls from threads, and each
family's own tests. That results are right and wrong arguments refused is what the other run of these files is for.
By hand, after one run of this script::

    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) \
        $(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
        PYTHONPATH=build/sanitize pytest --import-mode=append tests/kernels/test_norm.py
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "build" / "sanitize"
# Of the families that have compiled kernels.
NAMES = (
    "norm",
    "activation",
    "attention",
    "gemm",
    "head",
    "kl",
    "logprob",
    "moe",
    "pack_patches",
    "packing",
    "rope",
    "rope_positions",
    "vision",
)
SHARED = ("operators.py::test_every_element_is_written_and_nothing_else", "threads.py", "fuzz.py::test_calls")
TESTS = [f"tests/kernels/test_{name}" for name in (*SHARED, *(f"{name}.py" for name in NAMES))]
FUZZ_CALLS = 12_000
# PyTorch is not built for it: it leaks at exit, and its libraries allocate and free by different means.
ASAN_OPTIONS = "detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=0:exitcode=66"

# Reads past the end of both inputs: shows that the sanitizer sees PyTorch's allocations.
OVERRUN = """
import torch
from m4ov_kernels import _C
x, y = torch.ones(1000), torch.empty(2000)
_C.swiglu_fwd(y.data_ptr(), x.data_ptr(), x.data_ptr(), 1, 1001, 1001, 1001, 0, 0, 1)
"""


def build() -> None:
    environment = {**os.environ, "M4OV_SANITIZE": "1", "M4OV_CUDA": "0", "M4OV_BUILD": "1"}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(TARGET), str(ROOT)]
    subprocess.run(pip, env=environment, check=True)


def environment() -> dict[str, str]:
    compiler = shlex.split(os.environ.get("CXX") or "g++")

    def library(name: str) -> str:
        found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    return {
        **os.environ,
        # libstdc++ too: the sanitizer looks for its exceptions when it starts, before PyTorch brings them.
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so.6"))),
        "ASAN_OPTIONS": ASAN_OPTIONS,
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(TARGET),
    }


def main(arguments: list[str]) -> int:
    build()
    overrun = subprocess.run(
        [sys.executable, "-c", OVERRUN], env=environment(), cwd=TARGET, capture_output=True, text=True
    )
    if overrun.returncode != 66 or "heap-buffer-overflow" not in overrun.stderr:
        print(overrun.stderr, f"the sanitizer missed a read out of bounds (status {overrun.returncode})", sep="\n")
        return 1
    tests = arguments or [str(ROOT / test) for test in TESTS]
    options = ["--import-mode=append", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    if not arguments:
        options += ["-n", str(min(8, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *tests]
    with tempfile.TemporaryDirectory() as folder:  # pytest holds what a test prints, and loses it in a crash
        variables = environment() | {"M4OV_TEST_EXTENSION": str(TARGET), "M4OV_FUZZ_CALLS": str(FUZZ_CALLS)}
        for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS"):
            variables[name] += f":log_path={folder}/report"
        status = subprocess.run(command, env=variables, cwd=TARGET).returncode
        reports = sorted(Path(folder).iterdir())
        for report in reports:
            print(report.read_text(errors="replace"))
    return status or (1 if reports else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
