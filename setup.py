"""Builds the compiled kernels (``m4ov_kernels._C``). PyTorch is not needed for it.

Environment:
    M4OV_BUILD=0: install pure Python; the operators then run through PyTorch and Triton.
    M4OV_CUDA=auto|0|1: CUDA kernels for the GPU of this machine if there is one (auto), never (0), or for every
        supported architecture (1; needs nvcc).
    M4OV_SANITIZE=1: with AddressSanitizer and UBSan (see CONTRIBUTING.md for how to run such a build).
    CXX, NVCC: the compilers; default g++ and nvcc.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_VARIANTS = {
    "baseline": ["-march=x86-64"],
    "avx2": ["-march=x86-64", *_AVX2],
    "avx512": ["-march=x86-64", *_AVX512],
    "avx512_bf16": ["-march=x86-64", *_AVX512, "-mavx512vnni", "-mavx512bf16"],
}
# One flag set for what may be linked together: no contraction, so that a row's tail rounds as its body does.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# GCC's own intrinsics headers use uninitialised variables on purpose.
KERNEL_FLAGS = ["-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Full debug information doubles the time of compiling. AddressSanitizer sees what "null" and "object-size" would.
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-omit-frame-pointer", "-O1"]
SANITIZE_FLAGS += ["-g1"]
WITHOUT_KERNELS = "M4OV_BUILD=0 installs without compiled kernels."
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--cudart=static"]
# Machine code for Ampere, Hopper and Blackwell, and PTX that any later driver can compile.
CUDA_RELEASE = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "sm_100f": "arch=compute_100f,code=sm_100f",
    "compute_80": "arch=compute_80,code=compute_80",
}


def variants(machine: str, system: str) -> dict[str, list[str]]:
    """Instruction sets to compile kernels for, with their compiler flags; none where there are no kernels."""
    return X86_VARIANTS if system == "Linux" and machine in ("x86_64", "amd64", "AMD64") else {}


def switch(name: str, allowed: str, default: str) -> str:
    value = os.environ.get(name) or default
    if value not in allowed.split("|"):
        raise SystemExit(f"{name} is {value!r}: expected {allowed}")
    return value


def target_machine() -> str:
    # "linux-x86_64": what is compiled for, which under cross compilation is not what compiles.
    return sysconfig.get_platform().rsplit("-", 1)[-1] if sys.platform == "linux" else platform.machine()


def run(command: list[str], remedy: str = "") -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        failed = f"failed with status {done.returncode}. {remedy}"
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}\nm4ov: this command {failed}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def find_cxx() -> list[str]:
    """The C++ compiler as a command, checked to be a GNU one (PyTorch's OpenMP runtime is GNU's too)."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    remedy = (
        "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or name it in CXX, "
        "or set M4OV_BUILD=0 to install without compiled kernels."
    )
    if shutil.which(command[0]) is None:
        raise SystemExit(f"m4ov: no C++ compiler: {command[0]!r} was not found. {remedy}")
    macros = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    names = {line.split()[1]: line.split()[-1] for line in macros.splitlines() if len(line.split()) > 1}
    if "__clang__" in names or int(names.get("__GNUC__", 0)) < 11:
        raise SystemExit(f"m4ov: the kernels need GCC 11 or newer; {shlex.join(command)} is another compiler. {remedy}")
    return command


def cuda_plan() -> tuple[str, dict[str, str]]:
    """``nvcc`` and the targets to compile for, with its ``-gencode`` arguments; no targets: no CUDA kernels."""
    mode = switch("M4OV_CUDA", "auto|0|1", "auto")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc") or ""
    targets = {"1": CUDA_RELEASE, "0": {}}.get(mode)
    if targets is None:
        targets = visible_gpus()
        if targets and not nvcc:
            print("m4ov: a GPU but no nvcc: CUDA kernels are left out, Triton serves the GPU", file=sys.stderr)
            targets = {}
    if targets and not nvcc:
        raise SystemExit("m4ov: M4OV_CUDA=1 needs nvcc: install the CUDA toolkit or name nvcc in NVCC")
    return (nvcc, targets) if targets else ("", {})


def visible_gpus() -> dict[str, str]:
    """Targets for the GPUs of this machine; "native" (nvcc looks for itself) where their kind cannot be asked for."""
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True).stdout.split()
        capabilities = sorted({line.replace(".", "") for line in found if line.replace(".", "").isdigit()})
        if capabilities:
            return {f"sm_{value}": f"arch=compute_{value},code=sm_{value}" for value in capabilities}
    return {"native": ""} if glob.glob("/dev/nvidia[0-9]*") else {}


class BuildExtension(build_ext):
    """Compiles kernel sources once per instruction set, in parallel, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cxx = find_cxx()
        nvcc, targets = cuda_plan()
        sanitize = switch("M4OV_SANITIZE", "0|1", "0") == "1"
        flags = [*CXX_FLAGS, *(SANITIZE_FLAGS if sanitize else [])]
        self.objects_folder = ROOT / "build" / ("objects-sanitize" if sanitize else "objects")
        self.objects_folder.mkdir(parents=True, exist_ok=True)

        version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        defines = [f'-DM4OV_COMPILER="{version}"']
        if targets:
            defines += ["-DM4OV_WITH_CUDA", f'-DM4OV_CUDA_TARGETS="{",".join(targets)}"']
        includes = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        jobs = [(ROOT / "csrc/bind.cpp", "bind", [*cxx, *flags, *defines, *includes])]
        jobs += [(ROOT / "csrc/common/isa.cpp", "isa", [*cxx, *flags])]
        for name, isa_flags in variants(target_machine(), platform.system()).items():
            for source in sorted(ROOT.glob("csrc/*/cpu_*.cpp")):
                command = [*cxx, *flags, *KERNEL_FLAGS, *isa_flags, f"-DM4OV_VARIANT={name}"]
                jobs.append((source, f"{source.stem}.{name}", command))
        for source in sorted(ROOT.glob("csrc/*/*.cu")) if targets else ():
            generate = [f"-gencode={target}" if target else "-arch=native" for target in targets.values()]
            jobs.append((source, f"{source.stem}.cuda", [nvcc, *CUDA_FLAGS, "-ccbin", cxx[0], *generate]))

        # Slowest first, on as many cores as this process may use.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(self.compile_object, *zip(*jobs, strict=True)))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        if targets:  # nvcc knows where its static runtime lies
            link = [nvcc, "-shared", "--cudart=static", "-ccbin", cxx[0], "-Xcompiler=-fopenmp"]
            link += ["-Xlinker=--exclude-libs", "-Xlinker=ALL"]
        else:
            link = [*cxx, "-shared", "-fopenmp", "-Wl,--exclude-libs,ALL", *(SANITIZE_FLAGS[:1] if sanitize else [])]
        link += [*map(str, objects), "-o", str(output)]
        run(link, WITHOUT_KERNELS)

    def compile_object(self, source: Path, name: str, command: list[str]) -> Path:
        """Compile one object, unless it is newer than all it was made from, by the same command."""
        output = self.objects_folder / f"{name}.o"
        depends, stamp = output.with_suffix(".d"), output.with_suffix(".command")
        command = [*command, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(output)]
        signature = hashlib.sha256(shlex.join(command).encode()).hexdigest()
        if output.exists() and depends.exists() and stamp.exists() and stamp.read_text() == signature:
            made_from = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
            newest = max((os.path.getmtime(path) if os.path.exists(path) else float("inf")) for path in made_from)
            if newest < output.stat().st_mtime:
                return output
        cuda = source.suffix == ".cu"
        run(command, "M4OV_CUDA=0 leaves the CUDA kernels out; Triton serves the GPU." if cuda else WITHOUT_KERNELS)
        stamp.write_text(signature)
        return output


def extensions() -> list[Extension]:
    if switch("M4OV_BUILD", "0|1", "1") == "0" or not variants(target_machine(), platform.system()):
        return []
    return [Extension("m4ov_kernels._C", sources=[])]


if __name__ == "__main__":  # also as setuptools runs it for pip; a test imports this file
    found = find_packages(include=["m4ov", "m4ov.*", "m4ov_kernels", "m4ov_kernels.*"])
    setup(
        packages=[*found, "m4ov_bench", *(f"m4ov_bench.{name}" for name in find_packages(str(ROOT / "bench")))],
        package_dir={"m4ov_bench": "bench"},
        package_data={"": ["*.yaml", "*.html", "*.j2", "*.json", "py.typed"]},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
    )
