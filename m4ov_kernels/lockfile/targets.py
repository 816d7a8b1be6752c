"""What kernels are compiled for, what a multiprocessor of each target holds, and the limits of an H200."""

from __future__ import annotations

from dataclasses import dataclass

from m4ov_kernels.gpu import Build, CudaBuild


@dataclass(frozen=True)
class Target:
    """``triton``: Triton's (backend, architecture, warp size).

    A multiprocessor (NVIDIA: SM; AMD: compute unit) has ``schedulers`` parts; each holds ``warps`` warps at most and
    ``registers`` registers, given to a warp in units of ``register_unit`` (NVIDIA: 32-bit registers of the whole warp;
    AMD: registers per lane, a part having 512). ``blocks``: at most, on the multiprocessor. Shared memory in bytes: of
    the multiprocessor, the most that a block may ask for, what the system adds to each block, and the unit.

    NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and cuda_occupancy.h of CUDA
    13.0, against which a test holds the result. AMD: CDNA 3 ISA reference and LLVM's AMDGPU target.
    """

    triton: tuple[str, int | str, int]
    shared_block: int
    shared_multiprocessor: int
    shared_reserved: int
    shared_unit: int
    registers: int
    register_unit: int
    warps: int
    blocks: int
    schedulers: int = 4

    @property
    def warp(self) -> int:
        return self.triton[2]

    def occupancy(self, threads: int, registers: int, shared: int) -> float:
        """Resident warps over the most that the multiprocessor holds, if the grid is large: how many blocks fit by
        warps, by registers, by shared memory and by their own number. ``threads`` and ``shared`` (bytes) per block,
        ``registers`` per thread."""
        warps = -(-threads // self.warp)
        per_warp = registers * (self.warp if self.triton[0] == "cuda" else 1)
        per_warp = max(1, -(-per_warp // self.register_unit)) * self.register_unit
        by_registers = self.schedulers * min(self.warps, self.registers // per_warp) // warps
        by_warps = self.schedulers * self.warps // warps
        block_shared = -(-(shared + self.shared_reserved) // self.shared_unit) * self.shared_unit
        # A workgroup of one wave needs no barrier on AMD, and is not limited by their number.
        most = self.blocks if self.triton[0] == "cuda" or warps > 1 else self.schedulers * self.warps
        by_shared = self.shared_multiprocessor // block_shared if block_shared else most
        return min(most, by_warps, by_registers, by_shared) * warps / (self.schedulers * self.warps)


def _nvidia(capability: int, shared_kib: int) -> Target:
    return Target(
        triton=("cuda", capability, 32),
        shared_block=(shared_kib - 1) << 10,
        shared_multiprocessor=shared_kib << 10,
        shared_reserved=1 << 10,
        shared_unit=128,
        registers=65536 // 4,
        register_unit=256,
        warps=64 // 4,
        blocks=32,
    )


TARGETS = {
    "sm_80": _nvidia(80, 164),
    "sm_90": _nvidia(90, 228),
    "sm_100": _nvidia(100, 228),
    "gfx942": Target(("hip", "gfx942", 64), 64 << 10, 64 << 10, 0, 512, 512, 8, 8, 16),
}
# What nvcc builds into a wheel (setup.py) → the virtual architecture; the chip is that of TARGETS without the suffix.
CUDA_TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100f": "compute_100f"}
STATIC_SHARED = 48 << 10  # what a CUDA C++ kernel has without asking for more

# H200 SXM, NVIDIA's data sheet: 4.8 TB/s; dense tensor-core rates (half of those with sparsity), and float32 without
# tensor cores, in FLOP/s.
H200_BANDWIDTH = 4.8e12
H200_MATRIX = {"bf16": 989.5e12, "fp16": 989.5e12, "fp32": 494.5e12, "fp8": 1979e12}
H200_VECTOR = 67e12


def chip(target: str) -> Target:
    """The chip of a Triton or nvcc target."""
    return TARGETS[target.rstrip("af")]


def h200_floor(build: Build | CudaBuild) -> float:
    """Seconds that no implementation on an H200 can beat: the model's bytes over the memory's rate, or its operations
    over the arithmetic's, whichever is longer."""
    assert build.work is not None, build.name
    rate = H200_MATRIX[build.dtype] if build.matrix else H200_VECTOR
    return max(build.work.bytes / H200_BANDWIDTH, build.work.flops / rate)
