"""The compiled extension: instruction sets kept apart, what it links, what all its kernels share, how it is built."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from m4ov_kernels import _C
from m4ov_kernels.activation import native as activation
from m4ov_kernels.head import state
from m4ov_kernels.norm import native as norm

ROOT = Path(__file__).parents[2]
NAMES = ["baseline", "avx2", "avx512", "avx512_bf16"]
HALVES = (torch.bfloat16, torch.float16)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, **environment)


def test_python_allots_what_the_kernels_fill():
    assert _C.HEAD_TOKENS == state.TOKENS


# ---- Instruction sets


def test_every_supported_instruction_set_can_be_selected(isa):
    assert _C.isa() == isa
    assert _C.isas() == NAMES[: len(_C.isas())]


def test_the_default_is_the_best():
    assert python("from m4ov_kernels import _C; print(_C.isa())", M4OV_ISA="").stdout.split() == [_C.isas()[-1]]


def test_the_environment_lowers_it():
    assert python("from m4ov_kernels import _C; print(_C.isa())", M4OV_ISA="baseline").stdout.split() == ["baseline"]


def test_a_wrong_name_is_refused_with_the_right_ones():
    before = _C.isa()
    with pytest.raises(ValueError, match=r"set_isa: unknown instruction set 'neon'; expected one of baseline"):
        _C.set_isa("neon")
    assert _C.isa() == before
    for name in set(NAMES) - set(_C.isas()):
        with pytest.raises(ValueError, match=f"this processor does not support {name}"):
            _C.set_isa(name)


def test_a_wrong_environment_is_an_error_of_the_call_and_no_silent_fallback():
    code = "import torch, m4ov_kernels as m\nm.swiglu(torch.ones(3), torch.ones(3))"
    done = python(code, M4OV_ISA="sse9")
    assert done.returncode != 0
    assert "ValueError: M4OV_ISA: unknown instruction set 'sse9'" in done.stderr


def functions(binary: Path) -> dict[str, str]:
    """Disassembly of each function by demangled name; clones (``[clone .cold]``) are functions of their own."""
    text = run("objdump", "-d", "-C", "--no-show-raw-insn", str(binary)).stdout
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.MULTILINE)
    return {f"{index}: {name}": body for index, (name, body) in enumerate(zip(parts[1::2], parts[2::2], strict=True))}


def test_no_function_uses_more_than_its_variant_may():
    wide = {"baseline": r"%[yz]mm|\tv\w+ ", "avx2": r"%zmm|%k[0-7]\b|\{%k"}
    seen = dict.fromkeys([*NAMES, "shared"], 0)
    for name, body in functions(Path(_C.__file__)).items():
        # objdump leaves the longest names as they are in the binary.
        variant = next((v for v in reversed(NAMES) if f"m4ov::{v}::" in name or f"4m4ov{len(v)}{v}" in name), "shared")
        seen[variant] += 1
        forbidden = wide.get("baseline" if variant == "shared" else variant)
        found = forbidden and re.search(rf".*({forbidden}).*", body)
        assert not found, f"{name} of variant {variant}: {found.group(0)}"
    assert all(seen.values()), seen


def test_variants_share_no_symbols():
    objects = sorted((ROOT / "build" / "objects").glob("cpu_*.*.o"))
    assert {path.name.split(".")[1] for path in objects} == set(NAMES), "pip install -e . leaves the objects here"
    for path in objects:
        variant = path.name.split(".")[1]
        table = run("nm", "-C", "--defined-only", str(path)).stdout.splitlines()
        visible = [line.split(" ", 2)[1:] for line in table if line.split(" ", 2)[1] not in "trdbn"]
        assert visible, path
        for kind, symbol in visible:
            assert kind == "T", f"{path.name}: {kind} {symbol}: a symbol that the linker may share"
            assert symbol.startswith(f"m4ov::{variant}::"), f"{path.name}: {symbol}"


# ---- Linking


def test_links_one_openmp_runtime_by_its_plain_name_and_no_torch():
    dynamic = run("readelf", "-d", _C.__file__).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libgomp.so.1" in needed
    assert not [name for name in needed if re.search(r"torch|c10|cudart|python|omp(?!\.so\.1)", name)], needed
    assert not re.search(r"R(UN)?PATH", dynamic)


def test_one_openmp_runtime_is_mapped_after_kernels_of_both_have_run():
    code = """
import torch
from m4ov_kernels.activation.native import swiglu_fwd
torch.set_num_threads(2)
x = torch.randn(1 << 20)
swiglu_fwd(x, torch.sin(x), "hf")
print(open("/proc/self/maps").read())
"""
    mapped = set(re.findall(r"/\S*/lib[a-z]*omp[-.\d]\S*", python(code).stdout))
    assert len(mapped) == 1, mapped


def test_only_the_module_entry_is_exported():
    exported = run("nm", "-D", "--defined-only", _C.__file__).stdout.split()
    assert [name for name in exported if name.startswith("PyInit")] == ["PyInit__C"]
    assert not [name for name in exported if "m4ov" in name]


# ---- What all kernels share


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_is_widened_and_every_sum_rounded_as_pytorch_does(isa, dtype):
    """Random bit patterns: subnormals, ties, overflow, inf and NaN among them."""
    x, y = torch.randint(-(2**15), 2**15, (2, 1 << 16), dtype=torch.int16).view(dtype)
    x[: 1 << 16 : 2] = torch.arange(-(2**15), 2**15, 2, dtype=torch.int16).view(dtype)
    y[::3] = x[::3] * torch.randn(len(x[::3])).to(dtype)  # of the same size, so that sums round
    y[1::5] = 0
    total = norm.rms_norm_fwd(x[:, None], torch.ones(1, dtype=dtype), y[:, None], 1.0, "hf")[1][:, 0]
    expected = (x.float() + y.float()).to(dtype)
    assert torch.equal(total.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(total[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [(257, 515), (64, 4096)])
def test_bits_do_not_depend_on_the_number_of_threads(isa, dtype, shape):
    x, y, z = torch.randn(3, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)

    def results(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        fwd = norm.rms_norm_fwd(x, weight, y, 1e-6, "hf")
        bwd = norm.rms_norm_bwd(z, y, x, weight, fwd[2], "hf", True)
        return [*fwd, *bwd, activation.swiglu_fwd(x, y, "hf"), *activation.swiglu_bwd(z, x, y, "hf")]

    before = torch.get_num_threads()
    try:
        first, *others = (results(threads) for threads in (1, 2, 3, 7))
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_bits_do_not_depend_on_size_where_large_outputs_bypass_the_caches(isa):
    rows, columns = 4200, 2048  # 16.4 MiB in bf16
    x, y, z = torch.randn(3, rows, columns).bfloat16()
    weight = torch.randn(columns).bfloat16()
    few = slice(rows - 40, rows)

    def results(x, y, z):
        normed, total, rstd = norm.rms_norm_fwd(x, weight, y, 1e-6, "hf")
        grad_x, _ = norm.rms_norm_bwd(z, None, x, weight, rstd, "hf", True)
        return normed, total, rstd, grad_x, activation.swiglu_fwd(x, y, "hf"), *activation.swiglu_bwd(z, x, y, "hf")

    for large, small in zip(results(x, y, z), results(x[few], y[few], z[few]), strict=True):
        assert torch.equal(large[few], small)


@pytest.mark.parametrize("dtype", HALVES)
def test_offsets_past_two_to_the_31(isa, dtype):
    distance = 2**31 + 8
    memory = torch.empty(distance + 128, dtype=dtype)  # 4 GiB of addresses; only the touched pages exist
    far = memory.as_strided((2, 100), (distance, 1))
    far.normal_()
    near, weight = far.clone(), torch.randn(100).to(dtype)

    def results(x):
        normed, _, rstd = norm.rms_norm_fwd(x, weight, None, 1e-6, "hf")
        return normed, *norm.rms_norm_bwd(x, x, x, weight, rstd, "hf", True), activation.swiglu_fwd(x, x, "hf")

    for a, b in zip(results(far), results(near), strict=True):
        assert torch.equal(a, b)


# ---- Building


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("m4ov_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_are_for_x86_linux_only(setup_script):
    assert list(setup_script.variants("x86_64", "Linux")) == NAMES
    for machine, system in (("aarch64", "Linux"), ("arm64", "Darwin"), ("x86_64", "Darwin"), ("AMD64", "Windows")):
        assert setup_script.variants(machine, system) == {}


def test_never_compiles_for_the_building_machine(setup_script):
    flags = [flag for flags in setup_script.X86_VARIANTS.values() for flag in flags]
    assert "-march=native" not in flags + setup_script.CXX_FLAGS
    assert platform.machine() != "x86_64" or setup_script.target_machine() == "x86_64"


def test_a_missing_or_foreign_compiler_is_named_with_the_remedies(setup_script, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler++")
    with pytest.raises(SystemExit, match=r"'no-such-compiler\+\+' was not found.*apt-get install g\+\+.*M4OV_BUILD=0"):
        setup_script.find_cxx()


@pytest.mark.parametrize("switch", ["M4OV_CUDA", "M4OV_BUILD", "M4OV_SANITIZE"])
def test_a_wrong_switch_is_refused(setup_script, monkeypatch, switch):
    monkeypatch.setenv(switch, "maybe")
    with pytest.raises(SystemExit, match=rf"{switch} is 'maybe': expected (auto\|)?0\|1"):
        setup_script.switch(switch, "auto|0|1" if switch == "M4OV_CUDA" else "0|1", "1")


def test_cuda_is_built_for_what_is_there_or_for_everything_or_not_at_all(setup_script, monkeypatch):
    monkeypatch.setenv("NVCC", "nvcc")
    plans = {}
    for mode in ("0", "auto", "1"):
        monkeypatch.setenv("M4OV_CUDA", mode)
        plans[mode] = list(setup_script.cuda_plan()[1])
    assert plans == {
        "0": [],
        "auto": list(setup_script.visible_gpus()),
        "1": ["sm_80", "sm_90a", "sm_100f", "compute_80"],
    }


def install(target: Path, **environment: str) -> None:
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    done = run(sys.executable, "-m", "pip", "install", *options, str(ROOT), M4OV_CUDA="0", **environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "environment",
    [{"M4OV_BUILD": "0"}, {"_PYTHON_HOST_PLATFORM": "linux-aarch64"}],
    ids=["M4OV_BUILD=0", "arm64"],
)
def test_installs_without_kernels_and_works(tmp_path, environment):
    install(tmp_path, **environment)
    assert not list(tmp_path.rglob("*.so"))
    code = f"""
import sys
# An editable install would lend its compiled extension to the package under test.
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
sys.path.insert(0, {str(tmp_path)!r})
import torch, m4ov_kernels
assert m4ov_kernels.__file__.startswith({str(tmp_path)!r})
x = torch.randn(3, 8, requires_grad=True)
m4ov_kernels.rms_norm(x, torch.ones(8), eps=1e-6).sum().backward()
try:
    with m4ov_kernels.backend("native"):
        m4ov_kernels.swiglu(x, x)
except RuntimeError as error:
    print(error)
import m4ov, m4ov_bench
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "not installed (built with M4OV_BUILD=0, or on a machine without x86)" in done.stdout
