"""Reads machine code: NVIDIA binaries with the disassembler that Triton's wheel carries, AMD's from its assembly."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

FP64_SASS = re.compile(r"\b(?:D(?:ADD|MUL|FMA|SETP|MNMX|MMA)\b|MUFU\.\w*64\w*|[FI]2[FI][.\w]*\.F64|HMMA[.\w]*\.F64)")
_FP64_AMD = re.compile(r"^\s*v_\w*f64\w*", re.MULTILINE)
# Ampere: HMMA, IMMA, ...; Hopper's wgmma: HGMMA, QGMMA, IGMMA, BGMMA; Blackwell's tcgen05.mma: UTCHMMA, UTCQMMA, ...
_MATRIX_SASS = re.compile(r"\b(UTC[A-Z]*MMA|[BHIQO]GMMA|[BHIQOD]MMA)\b")
_MATRIX_AMD = re.compile(r"^\s*(v_(?:mfma|smfmac)_\w+)", re.MULTILINE)
_LOCAL_SASS = re.compile(r"\b(?:LDL|STL)\b")
WGMMA = re.compile(r"[A-Z]GMMA")


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel: registers per thread; bytes of local memory per thread; spills (NVIDIA: instructions
    that access local memory; AMD: registers spilled, to memory or to lanes); bytes of static shared memory per block;
    float64 instructions; matrix instructions by their name; the most threads of a block, if the binary says so; bytes
    of instructions (a binary's own size depends on the paths of its sources)."""

    registers: int
    local: int
    spills: int
    shared: int
    fp64: int
    matrix: Mapping[str, int]
    threads: int
    size: int


def nvidia_tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read_cubin(cubin: bytes) -> dict[str, Code]:
    """Every kernel of an NVIDIA binary, by its mangled name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvidia_tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        command = [nvidia_tool("nvdisasm"), "-c", "-ndf", file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+).*$", sass, flags=re.MULTILINE)[1:]
    code = dict(zip(parts[::2], parts[1::2], strict=True))
    sections = _sections(cubin)
    found = {}
    for name, registers, stack, shared, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        found[name] = Code(
            registers=int(registers),
            local=int(stack) + int(local),
            spills=len(_LOCAL_SASS.findall(code[name])),
            shared=int(shared),
            fp64=len(FP64_SASS.findall(code[name])),
            matrix=_count(_MATRIX_SASS.findall(code[name])),
            threads=_most_threads(sections[f".nv.info.{name}"]),
            size=len(sections[f".text.{name}"]),
        )
    if not found:
        raise RuntimeError(f"no function found in an NVIDIA binary; cuobjdump said: {usage}")
    return found


def read_amdgcn(text: str, binary: bytes) -> Code:
    """The one kernel of an AMD assembly and of the binary that was made from it."""
    facts = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    return Code(
        registers=facts["vgpr_count"],  # accumulation registers are counted in
        local=facts["private_segment_fixed_size"],
        spills=facts["vgpr_spill_count"] + facts["sgpr_spill_count"],
        shared=facts["group_segment_fixed_size"],
        fp64=len(_FP64_AMD.findall(text)),
        matrix=_count(_MATRIX_AMD.findall(text)),
        threads=facts["max_flat_workgroup_size"],
        size=len(_sections(binary)[".text"]),
    )


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _sections(elf: bytes) -> dict[str, bytes]:
    """Contents of a 64-bit little-endian ELF file by section name."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("binary: expected a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)
    ]  # name, type, -, -, offset, size
    offset = headers[names][4]
    found = {}
    for name, kind, _, _, start, length in headers:
        title = elf[offset + name : elf.index(b"\0", offset + name)].decode()
        found[title] = b"" if kind == 8 else elf[start : start + length]  # 8: no bits in the file
    return found


def _most_threads(info: bytes) -> int:
    """Threads of a block by ``__launch_bounds__`` or as required, from a kernel's attributes; 0: not said.

    Records of a format byte, an attribute byte and two bytes; format 4 has that many bytes more.
    """
    place = 0
    while place + 4 <= len(info):
        kind, attribute, length = struct.unpack_from("<BBH", info, place)
        place += 4
        if kind == 4:
            if attribute in (0x05, 0x10):  # EIATTR_MAX_THREADS, EIATTR_REQNTID
                x, y, z = struct.unpack_from("<III", info, place)
                return int(x * y * z)
            place += length
    return 0
