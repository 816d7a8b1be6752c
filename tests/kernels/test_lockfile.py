"""The lock, its budgets and the check that holds kernels to both, which must be able to fail.

Compiling needs Triton's compiler, not its interpreter: each check runs in a process of its own. That the shipped
kernels are as locked is a step of `make test` (`m4ov kernels check`), so that they are compiled once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m4ov_kernels.lockfile import locked
from m4ov_kernels.lockfile.families import families
from m4ov_kernels.lockfile.read import _MATRIX_SASS, FP64_SASS, WGMMA
from m4ov_kernels.lockfile.targets import TARGETS

IMPORTS = """
import triton
import triton.language as tl
from m4ov_kernels.gpu import Build, Config, Work

WORK = Work("one block", 1024, 1024)
"""
BAD_KERNELS = (
    IMPORTS
    + '''

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
    Build(_float64_kernel, "fp32", "*T/16 fp64", {"BLOCK": 128}, num_warps=4, work=WORK),
    Build(_spilling_kernel, "fp32", "*T/16 *T/16", {"BLOCK": 8192}, num_warps=1, work=WORK),
    Build(_spilling_kernel, "fp32", "*T/16 *T/16", {"BLOCK": 8192}, num_warps=1, work=WORK, hot=False, note="cold"),
    Build(_spilling_kernel, "fp32", "*T/16 *T/16", {"BLOCK": 32}, num_warps=1, note="twice"),
    Build(_spilling_kernel, "fp32", "*T/16 *T/16", {"BLOCK": 64}, num_warps=1, work=WORK, note="twice"),
]
'''
)
GOOD_KERNELS = (
    IMPORTS
    + """

@triton.jit
def _helper(x, scale):
    return x * tl.cast(scale, tl.float32)


@triton.jit
def _scale_kernel(x_ptr, scale, BLOCK: tl.constexpr):
    place = x_ptr + tl.arange(0, BLOCK)
    tl.store(place, _helper(tl.load(place), scale))


KERNELS = [Build(_scale_kernel, "fp32", "*T/16 fp32", {"BLOCK": 128}, num_warps=4, work=WORK)]
"""
)
MATRIX_KERNELS = (
    IMPORTS
    + """

@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b).to(tl.bfloat16))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place))


def product(M, matrix, note):
    sizes = {"M": M, "N": 128, "K": 64}
    return Build(_product_kernel, "bf16", "*T/16 *T/16 *T/16", sizes, 4, work=WORK, matrix=matrix, note=note)


KERNELS = [
    product(128, True, "wgmma"),
    product(16, True, "too few rows for wgmma"),
    product(128, False, "not declared"),
    Build(_copy_kernel, "bf16", "*T/16 *T/16", {"BLOCK": 128}, 4, work=WORK, matrix=True),
]
"""
)
CUDA_SOURCE = """
__global__ void __launch_bounds__(256) sum_kernel(float* x, int n) {
  __shared__ float held[64];
  held[threadIdx.x % 64] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = held[(threadIdx.x + n) % 64];
}
__global__ void double_kernel(float* x, double scale) { x[threadIdx.x] = x[threadIdx.x] * scale; }
__global__ void local_kernel(float* x, const int* index) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[index[i]] = x[i];
  x[threadIdx.x] = values[threadIdx.x % 64];
}
template <bool kFew>
__global__ void product_kernel(float* c, const unsigned* a) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%4}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]));
}
template __global__ void product_kernel<false>(float*, const unsigned*);
template __global__ void product_kernel<true>(float*, const unsigned*);
__global__ void forgotten_kernel(float* x) { x[0] = 1.0f; }
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


def run(command: list[str], cache: Path, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CI")}
    environment |= {"XDG_CACHE_HOME": str(cache), "TRITON_CACHE_DIR": str(cache / "triton"), **variables}
    if path:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def kernels(*arguments: str, cache: Path, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    return run(["-m", "m4ov", "kernels", *arguments], cache, path, **variables)


def test_the_lock_holds_what_is_declared(caches):
    """Kernels, targets and cost models; the machine code is `m4ov kernels check`'s part."""
    code = (
        "import json\n"
        "from m4ov_kernels.lockfile import families, locked, targets\n"
        "found = families.declared()\n"
        "floor = lambda b: float(f'{targets.h200_floor(b) * 1e6:.3g}')\n"
        "print(json.dumps({'errors': found.errors,\n"
        "  'triton': [[b.name, t, b.work.bytes, b.work.flops, floor(b)]\n"
        "             for _, _, b in found.builds for t in b.targets],\n"
        "  'nvcc': [[b.name, t, b.work.bytes, b.work.flops, floor(b)]\n"
        "           for bs in found.cuda.values() for b in bs for t in targets.CUDA_TARGETS]}))"
    )
    done = run(["-c", code], caches)
    assert done.returncode == 0, done.stderr
    declared = json.loads(done.stdout)
    assert declared["errors"] == []
    assert len(families()) >= 3
    for compiler in ("triton", "nvcc"):
        assert declared[compiler]
        versions = locked.versions(compiler)
        assert versions, f"no lock of {compiler} is committed"
        for version in versions:
            held = locked.read(locked.path_of(compiler, version))
            for name, _, moved, flops, floor in declared[compiler]:
                model = held[name, locked.MODEL]
                assert (model["bytes"], model["flops"], model["h200_us"]) == (moved, flops, floor), name
            if compiler == "triton":
                assert {key for key in held if key[1] != locked.MODEL} == {(d[0], d[1]) for d in declared["triton"]}
            for key, entry in held.items():
                assert entry.get("fp64", 0) == 0, key
    for target in TARGETS:
        for kernel in (
            f"{name}_{kind}"
            for name in ("rms_norm", "layer_norm", "gated", "gelu", "linear_logprob")
            for kind in ("fwd", "bwd")
        ):
            assert any(d[0].startswith(f"{kernel}_kernel[bf16") and d[1] == target for d in declared["triton"])


def test_the_check_can_fail(tmp_path, caches):
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    (tmp_path / "good_kernels.py").write_text(GOOD_KERNELS)
    (tmp_path / "no_kernels.py").write_text("")
    done = kernels("check", "bad_kernels", "good_kernels", "no_kernels", cache=caches, path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    failures = done.stderr
    for target in TARGETS:
        assert f"float64_kernel[fp32] on {target}: " in failures
        assert (f"spilling_kernel[fp32] on {target}: " in failures) == (target != "gfx942")  # 512 registers there
        assert f"bad_kernels: spilling_kernel[fp32, twice] is declared twice for {target}" in failures
    assert "float64 instructions" in failures
    assert "bytes of local memory a thread (spills) in a hot kernel" in failures
    assert "bad_kernels: _forgotten_kernel is not in KERNELS" in failures
    assert "bad_kernels: spilling_kernel[fp32, twice] has no cost model" in failures
    assert "no_kernels declares no kernels" in failures
    assert "cold" not in failures
    assert "good_kernels" not in failures
    assert "scale_kernel" not in failures


def test_matrix_kernels_use_each_targets_matrix_instructions(tmp_path, caches):
    (tmp_path / "matrix_kernels.py").write_text(MATRIX_KERNELS)
    done = kernels("check", "matrix_kernels", cache=caches, path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    for target in TARGETS:
        assert f"product_kernel[bf16, wgmma] on {target}" not in done.stderr
        assert f"copy_kernel[bf16] on {target}: no matrix instruction in a matrix kernel" in done.stderr
        assert f"product_kernel[bf16, not declared] on {target}: matrix instructions (" in done.stderr
    few = [line for line in done.stderr.splitlines() if "too few rows" in line]
    assert few == [
        "  ✗ product_kernel[bf16, too few rows for wgmma] on sm_90: no wgmma in a matrix kernel (its matrix "
        "instructions: HMMA)"
    ]
    kept = [json.loads(path.read_text()) for path in (caches / "m4ov" / "lockfile").glob("*.json")]
    kinds = {
        e["target"]: e["matrix"] for report in kept for e in report if e["kernel"] == "product_kernel[bf16, wgmma]"
    }
    assert list(kinds["sm_80"]) == ["HMMA"]
    assert list(kinds["sm_90"]) == ["HGMMA"]
    assert list(kinds["sm_100"]) == ["UTCHMMA"]
    assert all(re.fullmatch(r"v_mfma_f32_\w+_bf16\w*", name) for name in kinds["gfx942"])
    assert all(count > 0 for counts in kinds.values() for count in counts.values())


def test_lock_then_check_then_a_change(tmp_path, caches):
    source, locks = tmp_path / "changing_kernels.py", tmp_path / "locks"
    locks.mkdir()
    source.write_text(GOOD_KERNELS)
    arguments = ("changing_kernels", "--locks", str(locks))
    done = kernels("lock", *arguments, cache=caches, path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = locks.iterdir()
    held = path.read_text()
    assert len(held.splitlines()) == 2 + len(TARGETS) + 1  # a line each, and the model's
    done = kernels("check", *arguments, "--exact", cache=caches, path=tmp_path)
    assert (done.returncode, "as locked" in done.stdout) == (0, True), done.stdout + done.stderr
    cached = kernels("check", *arguments, "--exact", cache=caches, path=tmp_path)
    assert cached.stdout == done.stdout

    source.write_text(
        GOOD_KERNELS.replace("* tl.cast(scale, tl.float32)", "/ tl.exp(x)").replace('"one block"', '"two"')
    )
    done = kernels("check", *arguments, "--target", "sm_90", cache=caches, path=tmp_path)
    assert done.returncode == 1
    table = [line.split() for line in done.stdout.splitlines()]
    assert ["kernel", "target", "field", "locked", "now"] in table
    sizes = [row for row in table if row[:3] == ["scale_kernel[fp32]", "sm_90", "size"]]
    assert len(sizes) == 1
    assert int(sizes[0][3]) < int(sizes[0][4])
    assert not any("sm_80" in row for row in table)
    assert any(row[1:3] == ["model", "problem"] for row in table if len(row) > 2)
    done = kernels("lock", *arguments, cache=caches, path=tmp_path)
    assert done.returncode == 0
    assert "differences from what was locked" in done.stdout
    assert path.read_text() != held
    assert kernels("check", *arguments, cache=caches, path=tmp_path).returncode == 0

    held = path.read_text()
    source.write_text(
        GOOD_KERNELS.replace('"*T/16 fp32"', '"*T/16 fp64"').replace("tl.cast(scale, tl.float32)", "scale")
    )
    done = kernels("lock", *arguments, cache=caches, path=tmp_path)
    assert (done.returncode, "not locked" in done.stderr) == (1, True)
    assert path.read_text() == held
    assert list(locks.iterdir()) == [path]

    source.write_text(GOOD_KERNELS.replace("_scale_kernel", "_other_kernel"))
    done = kernels("check", *arguments, cache=caches, path=tmp_path)
    assert done.returncode == 1
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["scale_kernel[fp32]", "sm_80", "kernel", "here", "—"] in rows
    assert ["other_kernel[fp32]", "sm_80", "kernel", "—", "here"] in rows


def test_a_version_without_a_lock_is_said(tmp_path, caches):
    (tmp_path / "good_kernels.py").write_text(GOOD_KERNELS)
    (tmp_path / "triton-0.1.json").write_text('{"kernels": []}')
    arguments = ("check", "good_kernels", "--target", "sm_80", "--locks", str(tmp_path))
    done = kernels(*arguments, cache=caches, path=tmp_path)
    assert done.returncode == 0
    assert "budgets only, no comparison: this version has no lock (locked: 0.1)" in done.stderr
    assert kernels(*arguments, "--exact", cache=caches, path=tmp_path).returncode == 1


def test_it_refuses_to_interpret_unknown_targets_and_half_a_lock(caches):
    done = kernels("check", cache=caches, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr
    done = kernels("check", "--target", "sm_70", cache=caches)
    assert done.returncode == 2
    assert "--target: unknown target sm_70; known: sm_80, sm_90, sm_100, gfx942" in done.stderr
    done = kernels("lock", "m4ov_kernels.head.triton", cache=caches)
    assert done.returncode == 2
    assert "--locks: expected a folder" in done.stderr


def cuda_check(folder: Path, cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """`m4ov kernels check` where there is one Triton kernel, and ``folder/*.cu`` for CUDA sources."""
    (folder / "good_kernels.py").write_text(GOOD_KERNELS)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from m4ov.cli import main\n"
        "from m4ov_kernels.gpu import CudaBuild, Work\n"
        "from m4ov_kernels.lockfile import families\n"
        "real, work = families.declared, Work('one block', 1, 1)\n"
        "builds = [CudaBuild(f'{name}_kernel(*', 'fp32', work=work) for name in ('sum', 'double', 'local', 'absent')]\n"
        "for name, wgmma in (('false', True), ('true', False)):\n"
        "    matrix = {'work': work, 'matrix': True, 'wgmma': wgmma}\n"
        "    builds.append(CudaBuild(f'product_kernel<{name}>', 'bf16', **matrix))\n"
        "def declared(modules):\n"
        "    found = real(modules)\n"
        f"    found.cuda[Path({str(folder)!r})] = builds\n"
        "    return found\n"
        "if __name__ == '__main__':\n"
        "    families.declared = declared\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    script = folder / "script.py"
    script.write_text(code)
    command = [str(script), "kernels", "check", "good_kernels", "--target", "sm_90", *arguments]
    return run(command, cache, folder, **variables)


@pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("c++filt")), reason="no nvcc, or no c++filt")
def test_cuda_sources_keep_the_budgets_too(tmp_path, caches):
    (tmp_path / "some.cu").write_text(CUDA_SOURCE)
    done = cuda_check(tmp_path, caches)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "double_kernel(float*, double) on sm_90a: " in done.stderr
    assert "float64 instructions" in done.stderr
    assert re.search(r"local_kernel\(.*\) on sm_90a: \d+ bytes of local memory a thread", done.stderr)
    assert "product_kernel<false> on sm_90a: no wgmma in a matrix kernel (its matrix instructions: HMMA)" in done.stderr
    assert "product_kernel<true>" not in done.stderr
    assert "forgotten_kernel(float*) is in no CudaBuild of KERNELS" in done.stderr
    assert "no kernel is named absent_kernel(*" in done.stderr
    assert "sum_kernel" not in done.stderr
    kept = [json.loads(path.read_text()) for path in (caches / "m4ov" / "lockfile").glob("*.json")]
    (found,) = [e for report in kept for e in report if e["kernel"].startswith("sum_kernel")]
    assert (found["threads"], found["shared"], found["local"], found["occupancy"]) == (256, 256, 0, 1.0)


def test_without_nvcc_it_says_that_nothing_was_compiled(tmp_path, caches):
    for arguments, status in (((), 0), (("--exact", "--locks", str(tmp_path)), 1)):
        done = cuda_check(tmp_path, caches, *arguments, PATH=str(tmp_path))
        assert done.returncode == status, done.stdout + done.stderr
        assert "nvcc is not on the PATH: the CUDA C++ kernels were not compiled" in done.stderr


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
    assert len(FP64_SASS.findall(text)) == count


def test_matrix_instructions_are_recognised():
    text = "HMMA.16816.F32.BF16 R4 ; IMMA.16832.S8.S8 R0 ; QGMMA.64x64x32.F32 R24 ; UTCQMMA gdesc[UR4] ; HFMA2.MMA R1 ;"
    assert _MATRIX_SASS.findall(text) == ["HMMA", "IMMA", "QGMMA", "UTCQMMA"]
    assert [name for name in _MATRIX_SASS.findall(text) if WGMMA.fullmatch(name)] == ["QGMMA"]


OCCUPANCY = """
#include <cstddef>
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int capability, threads, registers;
  unsigned long shared, per_sm, per_block;
  while (scanf("%d %d %d %lu %lu %lu", &capability, &threads, &registers, &shared, &per_sm, &per_block) == 6) {
    cudaOccDeviceProp p;
    p.computeMajor = capability / 10, p.computeMinor = capability % 10;
    p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = 2048;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.warpSize = 32, p.numSms = 1;
    p.sharedMemPerBlock = 48 << 10, p.sharedMemPerMultiprocessor = per_sm;
    p.sharedMemPerBlockOptin = per_block, p.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024, a.numRegs = registers, a.sharedSizeBytes = 0;
    a.partitionedGCConfig = PARTITIONED_GC_OFF;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, a.maxDynamicSharedSizeBytes = per_block, a.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &a, &state, threads, shared) != CUDA_OCC_SUCCESS) return 1;
    printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_occupancy_is_what_nvidias_own_calculator_says(tmp_path):
    """cuda_occupancy.h, plain C++, which Triton's wheel carries."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    program = tmp_path / "occupancy"
    subprocess.run(["g++", "-w", "-I", include, "-o", program, tmp_path / "occupancy.cpp"], check=True)
    cases = [
        (name, threads, registers, shared)
        for name in ("sm_80", "sm_90", "sm_100")
        for threads in (32, 64, 96, 128, 256, 512, 1024)
        for registers in (16, 32, 33, 40, 64, 79, 96, 128, 168, 255)
        for shared in (0, 32, 1000, 8192, 40000, 100000, 160 << 10)
        if registers * threads <= 65536
    ]
    lines = []
    for name, threads, registers, shared in cases:
        chip = TARGETS[name]
        sizes = f"{shared} {chip.shared_multiprocessor} {chip.shared_block}"
        lines.append(f"{chip.triton[1]} {threads} {registers} {sizes}")
    done = subprocess.run([program], input="\n".join(lines), check=True, capture_output=True, text=True)
    blocks = [int(line) for line in done.stdout.split()]
    assert len(blocks) == len(cases)
    for (name, threads, registers, shared), count in zip(cases, blocks, strict=True):
        ours = TARGETS[name].occupancy(threads, registers, shared)
        assert ours == count * threads / 2048, (name, threads, registers, shared)


def test_occupancy_on_amd_by_hand():
    """LLVM prints 4 of 8 waves for the first (124 registers, 16 KiB, 256 threads)."""
    occupancy = TARGETS["gfx942"].occupancy
    assert occupancy(256, 124, 16384) == 0.5
    assert occupancy(256, 64, 0) == 1.0
    assert occupancy(256, 65, 0) == 7 / 8  # 72 registers, 7 waves of a part
    assert occupancy(64, 24, 0) == 1.0  # no barrier, so not only 16 workgroups
    assert occupancy(1024, 512, 0) == 0.0
