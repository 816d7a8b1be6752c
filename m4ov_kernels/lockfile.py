"""Compiles every GPU kernel for every target, without a GPU, and holds the machine code to budgets.

    python -m m4ov_kernels.lockfile            every kernel that a family's triton.py declares in KERNELS
    python -m m4ov_kernels.lockfile --cuda     every csrc/**/*.cu, with nvcc

Prints registers, local memory (spills), shared memory and float64 instructions per kernel and target; the exit status
is 1 when a budget is exceeded or a kernel is not declared, 2 when it cannot look. Budgets: no float64 instruction
anywhere (a Python float that reaches a kernel as float64 halves its speed), no local memory in a hot kernel, shared
memory within the chip's. Triton must not be interpreting in this process.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from m4ov_kernels.gpu import FP_FUSION, Build

# Name -> Triton's (backend, architecture, warp size) and the shared memory that one block may use, in bytes.
TARGETS = {
    "sm_80": (("cuda", 80, 32), 163 << 10),
    "sm_90": (("cuda", 90, 32), 227 << 10),
    "sm_100": (("cuda", 100, 32), 227 << 10),
    "gfx942": (("hip", "gfx942", 64), 64 << 10),
}
# What nvcc builds into a wheel, and what a block may use there without asking for more (static shared memory).
CUDA_TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100f": "compute_100f"}
_STATIC_SHARED = 48 << 10
_CSRC = Path(__file__).resolve().parents[1] / "csrc"
_FP64_SASS = re.compile(r"\b(?:D(?:ADD|MUL|FMA|SETP|MNMX|MMA)\b|MUFU\.\w*64\w*|[FI]2[FI][.\w]*\.F64|HMMA[.\w]*\.F64)")
_FP64_AMD = re.compile(r"^\s*v_\w*f64\w*", re.MULTILINE)


@dataclass(frozen=True)
class Report:
    """What one compilation of one kernel uses: registers per thread, bytes of local memory per thread (spills), bytes
    of shared memory per block, float64 instructions, bytes of machine code."""

    kernel: str
    target: str
    registers: int
    local: int
    shared: int
    fp64: int
    size: int

    def violations(self, hot: bool, shared_limit: int) -> list[str]:
        found = []
        if self.fp64:
            found.append(f"{self.fp64} float64 instructions")
        if self.local and hot:
            found.append(f"{self.local} bytes of local memory a thread (spills) in a hot kernel")
        if self.shared > shared_limit:
            found.append(f"{self.shared} bytes of shared memory of {shared_limit}")
        return found


def family_modules() -> list[str]:
    """The ``triton.py`` of every operator family."""
    root = Path(__file__).resolve().parent
    return [f"m4ov_kernels.{path.parent.name}.triton" for path in sorted(root.glob("*/triton.py"))]


def undeclared(module: ModuleType) -> list[str]:
    """Names of the jitted functions of ``module`` that are in no ``KERNELS`` entry and are called by no such kernel."""
    from triton.runtime.jit import JITFunction

    jitted = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }
    reached: set[str] = set()
    waiting = [build.kernel for build in getattr(module, "KERNELS", ())]
    while waiting:
        kernel = waiting.pop()
        if kernel.__name__ not in reached:
            reached.add(kernel.__name__)
            waiting += [jitted[name] for name in kernel.fn.__code__.co_names if name in jitted]
    return sorted(value.__name__ for value in jitted.values() if value.__name__ not in reached)


def _source(build: Build) -> Any:
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


def _nvidia_tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read_cubin(cubin: bytes) -> dict[str, tuple[int, int, int, int]]:
    """Registers, local bytes, static shared bytes and float64 instructions of each function of an NVIDIA binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_nvidia_tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        command = [_nvidia_tool("nvdisasm"), "-c", "-ndf", file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.([^,\s]+).*$", sass, flags=re.MULTILINE)[1:]
    code = dict(zip(sections[::2], sections[1::2], strict=True))
    found = {}
    for name, registers, stack, shared, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        fp64 = len(_FP64_SASS.findall(code[name]))
        found[name] = (int(registers), int(stack) + int(local), int(shared), fp64)
    if not found:
        raise RuntimeError(f"no function found in an NVIDIA binary; cuobjdump said: {usage}")
    return found


def compile_build(build: Build, target: str) -> Report:
    """Compile one declared configuration for one target and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": FP_FUSION}
    compiled = triton.compile(_source(build), target=GPUTarget(*TARGETS[target][0]), options=options)
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        cubin = compiled.asm["cubin"]
        ((registers, local, _, fp64),) = read_cubin(cubin).values()
        return Report(build.name, target, registers, local, shared, fp64, len(cubin))
    text = compiled.asm["amdgcn"]
    facts = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    local = facts["private_segment_fixed_size"] + 4 * facts["vgpr_spill_count"] + 4 * facts["sgpr_spill_count"]
    fp64 = len(_FP64_AMD.findall(text))
    return Report(build.name, target, facts["vgpr_count"], local, shared, fp64, len(compiled.asm["hsaco"]))


def _cache_key(build: Build, target: str) -> str:
    import triton

    this_file = Path(__file__).read_text()  # reads the machine code: a change here makes old reports void
    facts = (build.name, _source(build).hash(), target, build.num_warps, build.num_stages, FP_FUSION)
    return hashlib.sha256(repr((*facts, triton.__version__, this_file)).encode()).hexdigest()


def _compile_job(module: str, index: int, target: str) -> Report:
    return compile_build(importlib.import_module(module).KERNELS[index], target)


def check_triton(
    modules: Sequence[str], targets: Iterable[str], cache: Path | None
) -> tuple[list[tuple[Report, list[str]]], list[str]]:
    """Every report with its violations, and errors that are no compilation's (a kernel that nobody declared)."""
    jobs: list[tuple[str, int, str]] = []
    errors = []
    for name in modules:
        module = importlib.import_module(name)
        errors += [f"{name}: {kernel} is not in KERNELS" for kernel in undeclared(module)]
        jobs += [(name, i, target) for i in range(len(getattr(module, "KERNELS", ()))) for target in targets]
    builds = [importlib.import_module(name).KERNELS[i] for name, i, _ in jobs]
    paths = [
        cache / f"{_cache_key(build, job[2])}.json" if cache else None for job, build in zip(jobs, builds, strict=True)
    ]
    reports = [Report(**json.loads(path.read_text())) if path and path.exists() else None for path in paths]
    missing = [i for i, report in enumerate(reports) if report is None]
    if missing:
        workers = min(len(missing), len(os.sched_getaffinity(0)))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {i: pool.submit(_compile_job, *jobs[i]) for i in missing}
            for i, future in futures.items():
                reports[i] = future.result()
                _write(paths[i], future.result())
    results = []
    for (_, _, target), build, report in zip(jobs, builds, reports, strict=True):
        assert report is not None
        results.append((report, report.violations(build.hot, TARGETS[target][1])))
    return results, errors


def _write(path: Path | None, report: Report) -> None:
    """Store a report, whole or not at all."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(asdict(report), file)
        os.replace(file.name, path)


def compile_cuda(source: Path, target: str, nvcc: str) -> list[tuple[Report, list[str]]]:
    """Compile one ``.cu`` file for one target; one report per kernel. All of ours are hot."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        command = [nvcc, "-std=c++17", "-O3", "-I", str(_CSRC), "-Werror", "all-warnings", "-cubin", "-o", str(out)]
        command += [f"-gencode=arch={CUDA_TARGETS[target]},code={target}", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} for {target}: nvcc failed\n{done.stdout}{done.stderr}")
        cubin = out.read_bytes()
    functions = read_cubin(cubin)
    names = _demangled(list(functions))
    reports = [Report(names[name], target, *facts, len(cubin)) for name, facts in functions.items()]
    return [(report, report.violations(True, _STATIC_SHARED)) for report in reports]


def _demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return {name: name for name in names}
    text = subprocess.run([tool, *names], check=True, capture_output=True, text=True).stdout
    return {
        name: re.sub(r"\(anonymous namespace\)::|m4ov::|^void |(?<=>)\(.*", "", line)
        for name, line in zip(names, text.splitlines(), strict=True)
    }


def _table(results: list[tuple[Report, list[str]]]) -> str:
    width = max(len(report.kernel) for report, _ in results)
    lines = [f"{'kernel':{width}}  target   registers  local  shared  fp64    code"]
    for report, violations in results:
        row = f"{report.kernel:{width}}  {report.target:8} {report.registers:9} {report.local:6} {report.shared:7}"
        lines.append(f"{row} {report.fp64:5} {report.size:7}" + "".join(f"  ✗ {text}" for text in violations))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m m4ov_kernels.lockfile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="*", help="modules with a KERNELS table (default: every family's triton.py)")
    parser.add_argument("--cuda", action="store_true", help="compile csrc/**/*.cu with nvcc instead")
    parser.add_argument("--target", action="append", help="only this target; may be repeated")
    parser.add_argument("--no-cache", action="store_true", help="compile again what was compiled before")
    args = parser.parse_args(argv)
    known = CUDA_TARGETS if args.cuda else TARGETS
    for target in args.target or ():
        if target not in known:
            parser.error(f"unknown target {target}; known: {', '.join(known)}")
    targets = args.target or list(known)
    errors: list[str] = []
    if args.cuda:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            print("nvcc is not on the PATH: the CUDA sources were not compiled", file=sys.stderr)
            return 2
        sources = sorted(_CSRC.rglob("*.cu"))
        results = [row for source in sources for target in targets for row in compile_cuda(source, target, nvcc)]
    else:
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            print("TRITON_INTERPRET=1 is set: Triton would interpret, not compile; unset it", file=sys.stderr)
            return 2
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = None if args.no_cache else Path(home) / "m4ov" / "lockfile"
        results, errors = check_triton(args.modules or family_modules(), targets, cache)
    if results:
        print(_table(results))
    failures = errors + [f"{r.kernel} on {r.target}: {text}" for r, violations in results for text in violations]
    print(f"\n{len(results)} compilations, {len(failures)} violations")
    for failure in failures:
        print(f"  {failure}", file=sys.stderr)
    return 1 if failures or not results else 0


if __name__ == "__main__":
    sys.exit(main())
