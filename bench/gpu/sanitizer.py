"""Stage: a small set of calls of every operator under compute-sanitizer's memcheck, where that tool is on the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from m4ov_bench.gpu import device as chip
from m4ov_bench.gpu.context import Context
from m4ov_bench.gpu.example import Maker, backends, dtypes_of, operator_named
from m4ov_bench.gpu.operators import CASES
from m4ov_bench.gpu.part import NotRun
from m4ov_kernels import backend

_ERRORS = 99  # memcheck's exit status when it found something
_UNSUPPORTED = ("Device not supported", "not supported on this device", "Unable to find injection")


def run(context: Context) -> None:
    command = [sys.executable, "-m", "m4ov_bench.gpu.sanitizer", context.device.type, str(context.seed)]
    tool = shutil.which("compute-sanitizer")
    if context.device.type == "cuda" and tool is not None:
        # Libraries probe for features by calls that fail; memory is what this is about.
        options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(_ERRORS)]
        command = [tool, *options, *command]
    # PyTorch's allocator hands out parts of large blocks, inside of which memcheck sees nothing.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with context.part.check("compute-sanitizer memcheck"):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        output = done.stdout + done.stderr
        (context.work / "memcheck.txt").write_text(output, encoding="utf-8")
        if any(sign in output for sign in _UNSUPPORTED):
            raise NotRun("compute-sanitizer does not support this device")
        if done.returncode != 0:
            lines = [line for line in output.splitlines() if line.startswith("=========")] or output.splitlines()
            raise AssertionError(f"exit status {done.returncode}: " + " | ".join(lines[:12]))
        chip.require(context.device)
        if tool is None:
            raise NotRun("compute-sanitizer is not on the PATH")


def small_set(device: torch.device) -> int:
    """Forward and backward of the tiny examples of every operator; how many ran. Results are other stages' business."""
    count = 0
    left_out = ("fp16",) if device.type == "cuda" else ("fp16", "bf16")
    for name, cases in CASES.items():
        for dtype in (dtype for short, dtype in dtypes_of(operator_named(name)).items() if short not in left_out):
            for served, reason in backends(operator_named(name), device, dtype).items():
                if reason:
                    continue
                with backend(served):
                    for example in list(cases.examples(Maker(device, dtype), True))[:4]:
                        example.run()
                        chip.synchronize(device)
                        count += 1
    return count


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2]))
    print("calls:", small_set(torch.device(sys.argv[1])))
