"""``pack_patches`` against transformers' PIL image processor and the installed Pillow, to the bit; what it refuses."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_image_size
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as hf_video_size

from m4ov_kernels import backend, dispatch, pack_patches
from m4ov_kernels.vision import PackedPatches
from m4ov_kernels.vision.pixels import image_size, video_size

OPTIONS: dict[str, Any] = {"patch_size": 4, "image_mean": 0.5, "image_std": 0.5, "min_pixels": 64, "max_pixels": 4096}
needs_native = pytest.mark.skipif(not dispatch.native_extension()[0], reason="no compiled kernels")


def random_numpy() -> np.random.Generator:
    return np.random.default_rng(torch.randint(2**60, ()).item())


def picture(random: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """Noise, or hard edges, where the bicubic filter overshoots what eight bits hold."""
    pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return (pixels // 128 * 255).astype(np.uint8) if random.random() < 0.3 else pixels


def hugging_face(images: list[Any], options: dict[str, Any], input_data_format: str | None = None) -> PackedPatches:
    options = dict(options)
    size = {"shortest_edge": options.pop("min_pixels"), "longest_edge": options.pop("max_pixels")}
    for name in ("image_mean", "image_std"):
        options[name] = [options[name]] * 3 if isinstance(options[name], float) else list(options[name])
    processor = Qwen2VLImageProcessorPil(size=size, **{"temporal_patch_size": 2, "merge_size": 2, **options})
    made = processor(images, return_tensors="pt", input_data_format=input_data_format)
    lengths = made["image_grid_thw"].prod(1).tolist()
    return PackedPatches(made["pixel_values"], made["image_grid_thw"], torch.tensor([0, *np.cumsum(lengths)]))


def assert_equal(got: PackedPatches, expected: PackedPatches) -> None:
    assert torch.equal(got.grid_thw, expected.grid_thw)
    assert got.grid_thw.dtype == torch.int64
    assert got.cu_seqlens.dtype == torch.int32
    assert got.cu_seqlens.tolist() == expected.cu_seqlens.tolist()
    assert got.pixel_values.dtype == expected.pixel_values.dtype
    assert torch.equal(got.pixel_values, expected.pixel_values)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Sizes of images, from a pixel to larger than any buffer, and options."""
    patch, merge = draw(st.sampled_from([1, 4, 8, 14, 16, 20, 33])), draw(st.integers(1, 3))
    side = st.integers(1, 12) | st.integers(1, 400)
    sizes = draw(st.lists(st.tuples(side, side).filter(lambda s: max(s) <= 200 * min(s)), min_size=1, max_size=3))
    least = (patch * merge) ** 2
    low = draw(st.integers(1, 8)) * least
    numbers = st.tuples(*[st.floats(0.01, 1.0)] * 3) | st.just((0.5, 0.5, 0.5))
    return sizes, {
        "patch_size": patch,
        "merge_size": merge,
        "temporal_patch_size": draw(st.integers(1, 3)),
        "min_pixels": low,
        "max_pixels": low + draw(st.integers(0, 20)) * max(least, 2000),
        "image_mean": draw(numbers),
        "image_std": draw(numbers),
    }


@given(call=calls(), kind=st.sampled_from(["hwc", "chw", "rows", "planes", "pil", "tensor"]), threads=st.integers(1, 3))
def test_pixels_equal_hugging_face(isa, call, kind, threads):
    sizes, options = call
    random = random_numpy()
    pictures = [picture(random, *size, int(random.choice([1, 3, 3, 4]))) for size in sizes]
    images: list[Any] = pictures
    if kind in ("chw", "planes"):
        images = [np.ascontiguousarray(pixels.transpose(2, 0, 1)) for pixels in pictures]
    if kind == "rows":  # views of larger images, one of them upside down
        images = [np.pad(pixels, ((2, 1), (1, 3), (0, 0)))[2:-1, 1:-3] for pixels in pictures]
        images[0] = np.ascontiguousarray(images[0][::-1])[::-1]
    elif kind == "planes":
        images = [torch.from_numpy(np.pad(pixels, ((0, 0), (2, 1), (1, 3))))[:, 2:-1, 1:-3] for pixels in images]
    elif kind == "pil":
        images = [Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels) for pixels in pictures]
    elif kind == "tensor":
        images = [torch.from_numpy(pixels) for pixels in pictures]
    layout = "channels_first" if kind in ("chw", "planes") else "channels_last"
    expected = hugging_face(images, options, layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(pack_patches(images, input_data_format=layout, **options), expected)
    finally:
        torch.set_num_threads(before)
    with backend("reference"):
        assert_equal(pack_patches(images, input_data_format=layout, **options), expected)


@pytest.mark.parametrize("patch", [14, 16])
def test_large_images_equal_hugging_face(isa, patch):
    """Large enough for several strips and tiles, for streaming stores, and for rows to be resized first."""
    random = random_numpy()
    sizes = [(1080, 1920), (1500, 400), (700, 900), (448, 448), (64, 2000)]
    pictures = [picture(random, *size, 3) for size in sizes]
    options = {**OPTIONS, "patch_size": patch, "min_pixels": 200_000, "max_pixels": 700_000}
    expected = hugging_face(pictures, options)
    assert_equal(pack_patches(pictures, **options), expected)
    assert_equal(pack_patches([Image.fromarray(pixels) for pixels in pictures], **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patch", [4, 7, 16])
def test_short_dtypes_are_the_float32_values_rounded(isa, dtype, patch):
    images = [picture(random_numpy(), 90, 130, 3), picture(random_numpy(), 64, 64, 1)]
    options = {**OPTIONS, "patch_size": patch, "image_mean": (0.48, 0.46, 0.41), "image_std": (0.27, 0.26, 0.28)}
    exact = pack_patches(images, **options).pixel_values
    assert torch.equal(pack_patches(images, dtype=dtype, **options).pixel_values, exact.to(dtype))


@given(mean=st.floats(-3, 3), std=st.floats(1e-3, 1e3), dtype=st.sampled_from(dispatch.KERNEL_DTYPES))
def test_every_byte_is_normalised_as_numpy_does(isa, mean, std, dtype):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    options = {**OPTIONS, "patch_size": 16, "merge_size": 1, "image_mean": mean, "image_std": std, "dtype": dtype}
    with backend("reference"):
        expected = pack_patches([pixels], **options).pixel_values
    assert torch.equal(pack_patches([pixels], **options).pixel_values, expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_of_pillow(isa, mode):
    image = Image.fromarray(picture(random_numpy(), 40, 60, 4)).convert(
        "RGBA" if mode in ("LA", "PA", "RGBA") else "RGB"
    )
    image = image.convert("P").convert(mode) if mode == "PA" else image.convert(mode)
    assert_equal(pack_patches([image], **OPTIONS), hugging_face([image], OPTIONS))
    if mode in ("P", "RGB", "L"):
        image.info["transparency"] = {"P": 0, "RGB": (1, 2, 3), "L": 7}[mode]
        assert_equal(pack_patches([image], **OPTIONS), hugging_face([image], OPTIONS))


def test_files_are_read_as_pillow_reads_them(tmp_path):
    for name in ("a.jpg", "a.png", "a.webp"):
        Image.fromarray(picture(random_numpy(), 60, 90, 3)).save(tmp_path / name)
        with Image.open(tmp_path / name) as image, Image.open(tmp_path / name) as same:
            assert_equal(pack_patches([image], **OPTIONS), hugging_face([same], OPTIONS))


@needs_native
def test_pillows_memory_is_not_copied_and_outlives_the_image():
    from m4ov_kernels.vision.pixels_images import frames_of

    image = Image.fromarray(picture(random_numpy(), 50, 70, 3))
    if not hasattr(image, "__arrow_c_array__"):
        pytest.skip("this Pillow does not hand its memory out")
    expected = np.asarray(image).transpose(2, 0, 1)
    (pixels,), _ = frames_of(image, "x", None)
    assert pixels.strides == (1, 280, 4)
    assert not pixels.flags.writeable
    del image
    Image.fromarray(picture(random_numpy(), 50, 70, 3)).resize((70, 51))  # whoever has freed the memory would see this
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("temporal", [1, 2, 3])
def test_frames_of_a_video_equal_images(isa, frames, temporal):
    """Each frame has an image's pixels; the last one is repeated; ``t`` counts whole patches."""
    video = np.stack([picture(random_numpy(), 30, 50, 3) for _ in range(frames)])
    options = {**OPTIONS, "temporal_patch_size": temporal, "video_budget": "frame"}
    got = pack_patches([video], **options)
    times = -(-frames // temporal)
    single = [hugging_face([frame], {**OPTIONS, "temporal_patch_size": 1}) for frame in video]
    rows = len(single[0].pixel_values)
    assert got.grid_thw.tolist() == [[times, *single[0].grid_thw[0, 1:].tolist()]]
    assert got.cu_seqlens.tolist() == [rows * i for i in range(times + 1)]
    values = got.pixel_values.view(times, rows, 3, temporal, -1)
    for place in range(times * temporal):
        expected = single[min(place, frames - 1)].pixel_values.view(rows, 3, -1)
        assert torch.equal(values[place // temporal, :, :, place % temporal], expected)
    with backend("reference"):
        assert_equal(pack_patches([video], **options), got)
    tensors = pack_patches([torch.from_numpy(video.transpose(0, 3, 1, 2).copy())], **options)
    assert_equal(tensors, got)
    assert_equal(pack_patches([[Image.fromarray(frame) for frame in video]], **options), got)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 64), st.integers(0, 10**6), st.integers(1, 10**6))
def test_sizes_equal_hugging_face(height, width, factor, low, more):
    if max(height, width) > 200 * min(height, width):
        return
    assert image_size(height, width, factor, low, low + more) == hf_image_size(height, width, factor, low, low + more)


@given(
    *(st.integers(2, 50), st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 2), st.integers(1, 64)),
    *(st.integers(0, 10**7), st.integers(1, 10**7)),
)
def test_video_sizes_equal_hugging_face(frames, height, width, temporal, factor, low, more):
    try:
        expected = hf_video_size(frames, height, width, temporal, factor, low, low + more)
    except ValueError:  # the aspect ratio
        return
    assert video_size(frames, height, width, temporal, factor, low, low + more) == expected


def test_nothing_is_something(isa):
    empty = pack_patches([], **OPTIONS)
    assert empty.pixel_values.shape == (0, 96)
    assert empty.grid_thw.shape == (0, 3)
    assert empty.cu_seqlens.tolist() == [0]


@needs_native
def test_every_element_is_written_and_none_beyond(isa):
    from m4ov_kernels.vision import pixels_native
    from m4ov_kernels.vision.pixels import Clip, Layout
    from m4ov_kernels.vision.pixels_images import frames_of

    for dtype in dispatch.KERNEL_DTYPES:
        for patch, offset in ((14, 1), (16, 0), (3, 5)):
            layout = Layout(patch, 2, 1, (0.5,) * 3, (0.5,) * 3, dtype)
            frames, _ = frames_of(picture(random_numpy(), 37, 61, 3), "x", None)
            clip = Clip(frames, 5 * patch, 7 * patch)
            buffer = torch.full((35 * layout.patch_elements + 128 + offset,), 7.0, dtype=dtype)
            out = buffer[64 + offset :][: 35 * layout.patch_elements].view(35, -1).fill_(torch.nan)
            pixels_native.pack_patches_fwd([clip], layout, torch.device("cpu"), out=out)
            assert not out.isnan().any()
            assert (buffer[: 64 + offset] == 7).all()
            assert (buffer[64 + offset + out.numel() :] == 7).all()


# ---- What is refused


GOOD = np.zeros((20, 30, 3), dtype=np.uint8)
TRUNCATED = io.BytesIO()
Image.fromarray(picture(np.random.default_rng(0), 64, 64, 3)).save(TRUNCATED, format="PNG")


def truncated() -> Image.Image:
    return Image.open(io.BytesIO(TRUNCATED.getvalue()[: len(TRUNCATED.getvalue()) // 2]))


class Bomb(Image.Image):
    """Claims to be large; decoding it is a failure of the test."""

    size = (20_000, 10_000)
    mode = "RGB"

    def load(self) -> Any:
        raise AssertionError("was decoded")


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (GOOD.astype(np.float32), TypeError, r"uint8 image .*; got float32 array \[20, 30, 3\]"),
        (torch.zeros(3, 20, 30), TypeError, r"uint8 image .*; got float32 tensor \[3, 20, 30\]"),
        (torch.zeros(3, 20, 30, dtype=torch.uint8).to_sparse(), TypeError, "a dense"),
        ("image.png", TypeError, "a uint8 tensor, a uint8 NumPy array or a PIL image; got str 'image.png'"),
        (None, TypeError, "got NoneType None"),
        (np.zeros((20, 30, 2), dtype=np.uint8), ValueError, r"1, 3 or 4 channels; got uint8 array \[20, 30, 2\]"),
        (np.zeros(20, dtype=np.uint8), ValueError, "1, 3 or 4 channels"),
        (np.zeros((0, 30, 3), dtype=np.uint8), ValueError, "at least one pixel; got 0 x 30"),
        (np.zeros((2, 0, 3), dtype=np.uint8), ValueError, "at least one pixel"),
        (np.zeros((2, 402, 3), dtype=np.uint8), ValueError, "aspect ratio of at most 200; got 2 x 402"),
        (np.broadcast_to(np.uint8(0), (20_000, 10_000, 3)), ValueError, "at most 178956970 pixels"),
        (np.zeros((0, 20, 30, 3), dtype=np.uint8), ValueError, "at least one frame"),
        (np.zeros((1, 20, 30, 3), dtype=np.uint8), ValueError, "at least temporal_patch_size = 2 frames; got 1"),
        ([], ValueError, "an empty list"),
        (Bomb(), ValueError, "at most 178956970 pixels; got 10000 x 20000"),
    ],
)
def test_bad_images_are_named(bad, kind, message):
    for implementation in ("reference", None):
        with backend(implementation), pytest.raises(kind, match=r"^pack_patches: images\[1\] must be .*" + message):
            pack_patches([GOOD, bad, GOOD], **OPTIONS)


def test_bad_frames_are_named():
    with pytest.raises(ValueError, match=r"images\[0\]\[1\] must be 20 x 30 like the video's first frame; got 20 x 31"):
        pack_patches([[GOOD, np.zeros((20, 31, 3), dtype=np.uint8)]], **OPTIONS)


def test_images_that_cannot_be_decoded_are_named():
    with pytest.raises(ValueError, match=r"^pack_patches: images\[1\] cannot be decoded \(OSError: .*truncated"):
        pack_patches([GOOD, truncated()], **OPTIONS)


def test_an_image_that_is_smaller_than_a_merged_patch():
    """It is enlarged if ``min_pixels`` says so, as Hugging Face does; else refused."""
    small = GOOD[:3, :3]
    assert_equal(pack_patches([small], **OPTIONS), hugging_face([small], OPTIONS))
    with pytest.raises(
        ValueError, match=r"images\[0\] must be an image that is resized to at least 8 x 8.*; got 3 x 3"
    ):
        pack_patches([small], **{**OPTIONS, "min_pixels": 0})


@pytest.mark.parametrize(
    ("option", "value", "kind", "expected"),
    [
        ("patch_size", 0, ValueError, "from 1 to 256; got 0"),
        ("patch_size", 14.0, TypeError, "an integer; got float 14.0"),
        ("temporal_patch_size", True, TypeError, "an integer"),
        ("merge_size", -1, ValueError, "from 1 to 256"),
        ("min_pixels", 5000, ValueError, "at most max_pixels = 4096; got 5000"),
        ("max_pixels", 2**40, ValueError, "from 1 to 2147483648"),
        ("image_mean", (0.5, 0.5), ValueError, "three numbers, or one"),
        ("image_mean", "half", ValueError, "three numbers, or one"),
        ("image_mean", float("nan"), ValueError, "finite"),
        ("image_std", 0.0, ValueError, "greater than 0"),
        ("image_std", 1e-40, ValueError, "greater than 0"),
        ("dtype", torch.float64, ValueError, "torch.float32, torch.bfloat16 or torch.float16; got torch.float64"),
        ("input_data_format", "nhwc", ValueError, "'channels_first', 'channels_last'"),
        ("video_budget", "total", ValueError, "'video', 'frame'"),
    ],
)
def test_bad_options_are_named(option, value, kind, expected):
    with pytest.raises(kind, match=rf"^pack_patches: {option} must be .*{expected}"):
        pack_patches([GOOD], **{**OPTIONS, option: value})


def test_one_image_is_not_a_list():
    with pytest.raises(TypeError, match="images must be a list of images"):
        pack_patches(GOOD, **OPTIONS)


def test_the_backend_is_the_callers_choice():
    with backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' was asked for, but it has no triton"):
        pack_patches([GOOD], **OPTIONS)
