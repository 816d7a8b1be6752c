"""What ``m4ov kernels check`` compiles of ``csrc/vision/pack_patches.cu``: entries for the family's ``KERNELS``."""

from __future__ import annotations

from m4ov_kernels.gpu import SIZES, CudaBuild, Work

# 1920 x 1080 to 1344 x 768: six taps in each direction, 16-pixel patches, two frames of each.
_SOURCE, _BETWEEN, _RESIZED, _TAPS = 3 * 1080 * 1920, 3 * 1080 * 1344, 3 * 768 * 1344, 6


def _builds() -> list[CudaBuild]:
    problem = "1920 x 1080 to 1344 x 768"
    # A tap is a product and a sum, with each of the two parts of a weight.
    work = Work(problem, _SOURCE + _BETWEEN, 4 * _TAPS * _BETWEEN)
    builds = [CudaBuild("resize_between_kernel(*", "fp32", work=work)]
    for dtype, name in (("bf16", "__nv_bfloat16"), ("fp16", "__half"), ("fp32", "float")):
        work = Work(problem, _BETWEEN + 2 * _RESIZED * SIZES[dtype], (4 * _TAPS + 3) * _RESIZED)
        builds.append(CudaBuild(f"pack_patches_kernel<{name}>", dtype, work=work))
    return builds


CUDA_KERNELS = _builds()
