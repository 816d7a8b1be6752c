"""Compiles what was declared: with Triton or nvcc, for a target, without a GPU."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from m4ov_kernels.gpu import FP_FUSION, Build
from m4ov_kernels.lockfile.families import CSRC
from m4ov_kernels.lockfile.read import read_amdgcn, read_cubin
from m4ov_kernels.lockfile.report import Report
from m4ov_kernels.lockfile.targets import CUDA_TARGETS, TARGETS, chip

NVCC_FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings"]  # setup.py's, and no warnings
_MOST_THREADS = 1024  # of a block, where a kernel has no launch bounds


def triton_version() -> str:
    import triton

    return str(triton.__version__)


def nvcc_version() -> str | None:
    """``None``: there is no nvcc on the PATH."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\bV(\d[\d.]*)", text)
    if found is None:
        raise RuntimeError(f"nvcc --version: expected a version such as V13.0.88, got: {text}")
    return found[1]


def source(build: Build) -> Any:
    """What Triton compiles: the kernel with the types, constants and divisibility of one declared configuration."""
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    free = [name for name in names if name not in build.constexprs]
    tokens = build.signature.split()
    if len(tokens) != len(free):
        raise ValueError(f"{build.name}: {len(tokens)} types are declared for the arguments {', '.join(free)}")
    signature = dict.fromkeys(names, "constexpr")
    attrs = {}
    for name, token in zip(free, tokens, strict=True):
        kind, _, divisor = token.partition("/")
        signature[name] = kind.replace("T", build.dtype)
        if divisor:
            attrs[(names.index(name),)] = [["tt.divisibility", int(divisor)]]
    return ASTSource(build.kernel, signature, dict(build.constexprs), attrs)


def compile_triton(module: str, index: int, target: str) -> list[Report]:
    """Compile one entry of a module's ``KERNELS`` for one target and read its machine code."""
    return [compile_build(importlib.import_module(module).KERNELS[index], target)]


def compile_build(build: Build, target: str) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": FP_FUSION}
    compiled = triton.compile(source(build), target=GPUTarget(*TARGETS[target].triton), options=options)
    if "cubin" in compiled.asm:
        (code,) = read_cubin(compiled.asm["cubin"]).values()
    else:
        code = read_amdgcn(compiled.asm["amdgcn"], compiled.asm["hsaco"])
    threads = compiled.metadata.num_warps * TARGETS[target].warp
    # Triton allocates shared memory itself and asks for it at the launch.
    return Report.of(build.name, target, code, threads, compiled.metadata.shared)


def compile_cuda(file: Path, target: str) -> list[Report]:
    """Compile one ``.cu`` file for one target; one report per kernel, by its demangled name."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        command = [nvcc, *NVCC_FLAGS, "-I", str(CSRC), "-cubin", "-o", str(out)]
        command += [f"-gencode=arch={CUDA_TARGETS[target]},code={target}", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{file.name} for {target}: nvcc failed\n{done.stdout}{done.stderr}")
        cubin = out.read_bytes()
    found = read_cubin(cubin)
    names = _demangled(list(found))
    chip_reserves = (
        chip(target).shared_reserved if chip(target).triton[1] != 80 else 0
    )  # from sm_90 on it is counted in
    return [
        Report.of(names[name], target, code, code.threads or _MOST_THREADS, max(0, code.shared - chip_reserves))
        for name, code in found.items()
    ]


def _demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    if tool is None:
        raise RuntimeError("c++filt (of GNU binutils) is not on the PATH: the CUDA kernels' names cannot be read")
    text = subprocess.run([tool, *names], check=True, capture_output=True, text=True).stdout
    return {
        name: re.sub(r"\(anonymous namespace\)::|m4ov::|^void |(?<=>)\(.*", "", line)
        for name, line in zip(names, text.splitlines(), strict=True)
    }
