"""The CUDA C++ source of pack_patches, run on the CPU thread by thread (``cuda_on_cpu.h``), against Pillow.

Stands in for a GPU where there is none: index arithmetic, integer sums, rounding. It says nothing about speed.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from m4ov_kernels import dispatch
from m4ov_kernels.vision import pixels_reference
from m4ov_kernels.vision.pixels import Clip, Layout
from m4ov_kernels.vision.pixels_images import frames_of

if not dispatch.native_extension()[0]:
    pytest.skip("the descriptions of images come from the compiled extension's module", allow_module_level=True)
from m4ov_kernels.vision import pixels_native

HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HARNESS = """
#include "cuda_on_cpu.h"
#include "vision/pack_patches.cu"
extern "C" {
const char* pack(const m4ov::PackPatches* a) { return m4ov::pack_patches_cuda(*a, nullptr); }
size_t size() { return sizeof(m4ov::PackPatches); }
size_t image_size() { return sizeof(m4ov::PackImage); }
}
"""


class PackPatches(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("output", "images")),
        *((name, ctypes.c_int64) for name in ("count", "patches", "strips", "strip_rows", "between_bytes")),
        *((name, ctypes.c_int64) for name in ("patch_size", "temporal_patch_size", "merge_size")),
        ("mean", ctypes.c_float * 3),
        ("std", ctypes.c_float * 3),
        ("dtype", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("scratch", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for name in ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h"):  # all that is used is in cuda_on_cpu.h
        (folder / name).touch()
    (folder / "harness.cpp").write_text(HARNESS)
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    flags += ["-I", str(folder), "-I", str(HERE), "-I", str(HERE.parents[1] / "csrc")]
    subprocess.run([*compiler, *flags, "-o", folder / "cuda.so", folder / "harness.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "cuda.so"))
    library.pack.restype = ctypes.c_char_p
    assert library.size() == ctypes.sizeof(PackPatches)
    assert library.image_size() == 8 * len(pixels_native._FIELDS)
    return library


def run(library: ctypes.CDLL, clips: list[Clip], layout: Layout) -> torch.Tensor:
    images, _, keep = pixels_native._images(clips, layout, 1)
    sizes = pixels_native.between_bytes(images)
    between = [np.full(int(size) + 64, 77, dtype=np.uint8) for size in sizes]
    images[:, pixels_native._FIELDS.index("between")] = [buffer.ctypes.data for buffer in between]
    patches = sum(t * h * w for t, h, w in map(layout.grid, clips))
    guard = 64
    buffer = torch.full((patches * layout.patch_elements + 2 * guard,), 7.0, dtype=layout.dtype)
    output = buffer[guard:-guard]
    output.fill_(torch.nan)
    arguments = PackPatches(
        output.data_ptr(), images.ctypes.data, len(images), patches, 0, 0, int(sizes.sum()), layout.patch_size
    )
    arguments.temporal_patch_size, arguments.merge_size = layout.temporal_patch_size, layout.merge_size
    arguments.mean, arguments.std = (ctypes.c_float * 3)(*layout.mean), (ctypes.c_float * 3)(*layout.std)
    arguments.dtype = DTYPES[layout.dtype]
    assert library.pack(ctypes.byref(arguments)) is None
    assert keep
    assert (buffer[:guard] == 7).all()
    assert (buffer[-guard:] == 7).all()
    for size, memory in zip(sizes, between, strict=True):
        assert (memory[int(size) :] == 77).all()
    return output.view(patches, layout.patch_elements)


# height, width → height, width: no resize, each direction alone, both, rows first, enlarged, tiny.
SIZES = [
    *((16, 24, 16, 24), (40, 24, 16, 24), (16, 50, 16, 24), (33, 47, 16, 24), (90, 25, 16, 24)),
    *((5, 7, 16, 24), (1, 1, 8, 8), (3, 100, 8, 48)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("patch", "temporal", "merge"), [(4, 2, 2), (8, 1, 1), (2, 3, 4)])
def test_pixels_equal_the_definition(library, patch, temporal, merge, dtype):
    random = np.random.default_rng(torch.initial_seed() % 2**63)
    layout = Layout(patch, temporal, merge, (0.48, 0.46, 0.41), (0.27, 0.5, 0.26), dtype)
    clips = []
    for number, (height, width, *resized) in enumerate(SIZES):
        channels = (3, 1)[number % 2]
        pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
        if number % 3 == 0:
            pixels = pixels.transpose(2, 0, 1)
        elif number % 3 == 1 and channels == 3:
            pixels = np.concatenate([pixels, pixels[..., :1]], axis=2)[..., :3]  # four bytes a pixel
        clips.append(
            Clip(frames_of(pixels, "x", "channels_first" if number % 3 == 0 else "channels_last")[0], *resized)
        )
    video = random.integers(0, 256, (2 * temporal - 1, 20, 30, 3), dtype=np.uint8)
    clips.append(Clip(frames_of(video, "x", None)[0], 16, 24))
    expected = pixels_reference.pack_patches_fwd(clips, layout, torch.device("cpu"))
    got = run(library, clips, layout)
    assert torch.equal(got, expected)


def test_many_images_share_the_grid(library):
    random = np.random.default_rng(torch.initial_seed() % 2**63)
    layout = Layout(2, 1, 1, (0.5,) * 3, (0.5,) * 3, torch.float32)
    clips = [
        Clip(frames_of(random.integers(0, 256, (*random.integers(1, 9, 2), 3), dtype=np.uint8), "x", None)[0], 4, 2)
        for _ in range(40)
    ]
    assert torch.equal(
        run(library, clips, layout), pixels_reference.pack_patches_fwd(clips, layout, torch.device("cpu"))
    )


def test_bad_arguments_are_refused(library):
    assert library.pack(ctypes.byref(PackPatches())) == b"pack_patches: the number of images must be from 1 to 2^30"
    arguments = PackPatches(count=1, dtype=3)
    assert library.pack(ctypes.byref(arguments)) == b"pack_patches: unknown dtype"
