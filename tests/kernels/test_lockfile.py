"""Every Triton kernel compiles for every target within its budgets, and the check that says so can fail.

Compiling needs Triton's compiler, not its interpreter: each check runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m4ov_kernels.lockfile import _FP64_SASS

BAD_KERNELS = '''
import triton
import triton.language as tl
from m4ov_kernels.gpu import Build


@triton.jit
def _float64_kernel(x_ptr, scale, BLOCK: tl.constexpr):
    place = x_ptr + tl.arange(0, BLOCK)
    tl.store(place, tl.load(place) * scale)


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """256 values alive in each thread of one warp, which has 255 registers."""
    place = tl.arange(0, BLOCK)
    values = tl.load(x_ptr + place)
    tl.store(y_ptr + place, values * tl.sum(values))


@triton.jit
def _helper(x):
    return x + 1


@triton.jit
def _forgotten_kernel(x_ptr):
    tl.store(x_ptr, _helper(tl.load(x_ptr)))


KERNELS = [
    Build(_float64_kernel, "fp32", "*T/16 fp64", {"BLOCK": 128}, num_warps=4),
    Build(_spilling_kernel, "fp32", "*T/16 *T/16", {"BLOCK": 8192}, num_warps=1),
    Build(_spilling_kernel, "fp32", "*T/16 *T/16", {"BLOCK": 8192}, num_warps=1, hot=False, note="cold"),
]
'''

GOOD_KERNELS = """
import triton
import triton.language as tl
from m4ov_kernels.gpu import Build


@triton.jit
def _helper(x, scale):
    return x * tl.cast(scale, tl.float32)


@triton.jit
def _scale_kernel(x_ptr, scale, BLOCK: tl.constexpr):
    place = x_ptr + tl.arange(0, BLOCK)
    tl.store(place, _helper(tl.load(place), scale))


KERNELS = [Build(_scale_kernel, "fp32", "*T/16 fp32", {"BLOCK": 128}, num_warps=4)]
"""


def lockfile(*arguments: str, cache: Path, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"XDG_CACHE_HOME": str(cache), "TRITON_CACHE_DIR": str(cache / "triton"), **variables}
    if path:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", "m4ov_kernels.lockfile", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_kernel_keeps_its_budgets_on_every_target(tmp_path):
    done = lockfile(cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in (f"{name}_{kind}" for name in ("rms_norm", "swiglu", "cross_entropy") for kind in ("fwd", "bwd")):
        rows = [line for line in done.stdout.splitlines() if line.startswith(f"{kernel}_kernel[bf16")]
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            assert any(f" {target} " in row for row in rows), f"{kernel} was not compiled for {target}"
    again = lockfile(cache=tmp_path)  # from the cache
    assert again.stdout == done.stdout


def test_the_check_can_fail(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    (tmp_path / "good_kernels.py").write_text(GOOD_KERNELS)
    done = lockfile("bad_kernels", "good_kernels", cache=tmp_path, path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    failures = done.stderr
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert f"float64_kernel[fp32] on {target}: " in failures
        assert (f"spilling_kernel[fp32] on {target}: " in failures) == (target != "gfx942")  # 512 registers there
    assert "float64 instructions" in failures
    assert "bytes of local memory a thread (spills) in a hot kernel" in failures
    assert "bad_kernels: _forgotten_kernel is not in KERNELS" in failures
    assert "cold" not in failures
    assert "good_kernels" not in failures
    assert "scale_kernel" not in failures


def test_it_refuses_to_interpret_and_unknown_targets(tmp_path):
    done = lockfile(cache=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr
    done = lockfile("--target", "sm_70", cache=tmp_path)
    assert done.returncode == 2
    assert "unknown target sm_70; known: sm_80, sm_90, sm_100, gfx942" in done.stderr


def test_without_nvcc_it_says_that_nothing_was_compiled(tmp_path):
    done = lockfile("--cuda", cache=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2
    assert "nvcc is not on the PATH" in done.stderr


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("DADD R2, R4, R6 ; DFMA R2, R4, R6, R8 ; DSETP.GT.AND P0, PT, R2, R4, PT ;", 3),
        ("F2F.F64.F32 R4, R2 ; I2F.F64 R2, R3 ; MUFU.RCP64H R5, R7 ; DMMA.884 R2, R4, R6, R8 ;", 4),
        ("F2F.F32.F64 R4, R2 ; F2I.F64.TRUNC R0, R2 ; I2F.F64.S64 R2, R4 ;", 3),
        ("FADD R2, R4, R6 ; I2F.S64 R2, R4 ; LDG.E.64 R2, [R4.64] ; MUFU.RSQ R5, R7 ; ISETP.GE.U32 P0 ; DEPBAR ;", 0),
    ],
)
def test_float64_instructions_are_recognised(text, count):
    assert len(_FP64_SASS.findall(text)) == count
