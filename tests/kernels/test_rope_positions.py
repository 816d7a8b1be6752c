"""``mrope_positions`` against ``get_rope_index`` of transformers, to the bit, by every implementation."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import m4ov_kernels
from m4ov_kernels import configs, device_errors, mrope_positions
from m4ov_kernels.dispatch import OPERATORS
from m4ov_kernels.gpu import Config

from .conftest import SEED
from .draws import Seeded
from .rope_index import IMAGE, MODELS, VIDEO, Packed, arguments_of, draw_batch, draw_large, rope_index
from .strategies import drawn

KINDS = sorted(MODELS)
IMAGES = {"image_token_id": IMAGE, "video_token_id": VIDEO, "merge_size": 2}


def batches(kind: str, adjacent: bool = False) -> st.SearchStrategy[Packed]:
    return drawn(lambda draw: draw_batch(draw, kind, draw.choice((2, 1, 3)), adjacent))


def assert_equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype == torch.int64
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_packed_positions_equal_get_rope_index(isa, kind, data):
    packed = data.draw(batches(kind))
    arguments = packed.arguments | data.draw(
        st.sampled_from(({}, {"mm_token_type_ids": None}, {"cu_seqlens": packed.arguments["cu_seqlens"].int()}))
    )
    if arguments["mm_token_type_ids"] is not None and data.draw(st.booleans()):
        arguments["mm_token_type_ids"] = arguments["mm_token_type_ids"].int()
    expected = rope_index(packed)
    assert_equal(mrope_positions(**arguments), expected)
    with m4ov_kernels.backend("reference"):
        assert_equal(mrope_positions(**arguments), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_large_batches_and_any_number_of_threads(isa, kind):
    before = torch.get_num_threads()
    for index in range(4):
        packed = draw_large(Seeded(SEED, index), kind)
        expected = rope_index(packed)
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                assert_equal(mrope_positions(**packed.arguments), expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_images_without_text_between_them(isa, kind, data):
    """As if there were text of no length: what transformers would say, if its function could tell them apart."""
    packed = data.draw(batches(kind, adjacent=True))
    position_ids, deltas = mrope_positions(**packed.arguments)
    with m4ov_kernels.backend("reference"):
        assert_equal(mrope_positions(**packed.arguments), (position_ids, deltas))
    assert_equal((position_ids, deltas), slowly(packed))


def slowly(packed: Packed) -> tuple[Tensor, Tensor]:
    """Token by token, in plain Python."""
    kind, merge = packed.arguments["kind"], packed.arguments["merge_size"]
    columns: list[list[int]] = []
    deltas = []
    for types, images, videos, seconds in packed.samples:
        frames = [(t, h // merge, w // merge, 1.0) for t, h, w in images]
        clips = []
        for (t, h, w), second in zip(videos, seconds, strict=True):
            size = (h // merge, w // merge)
            clips += [(1, *size, 1.0)] * t if kind == "qwen3_vl" else [(t, *size, float(torch.tensor(second) * 2))]
        waiting = {1: iter(frames), 2: iter(clips)}
        here, place, mine = 0, 0, []
        while place < len(types):
            if types[place] == 0:
                mine.append([here] * 3)
                here, place = here + 1, place + 1
                continue
            t, h, w, interval = next(waiting[types[place]])
            for frame in range(t):
                time = int(torch.tensor(float(frame)) * torch.tensor(interval))
                mine += [[here + time, here + row, here + column] for row in range(h) for column in range(w)]
            here, place = here + max(h, w), place + t * h * w
        columns += mine
        deltas.append(max((max(column) for column in mine), default=-1) + 1 - len(types))
    return torch.tensor(columns, dtype=torch.int64).view(-1, 3).t(), torch.tensor(deltas, dtype=torch.int64)


def three(**changes: Any) -> dict[str, Any]:
    """Three samples: an image of 1 × 2 merged patches, text, and an image of 2 × 2 and a video of two frames."""
    samples = [
        ([0, 1, 1, 0], [[1, 2, 4]], [], []),
        ([0, 0, 0], [], [], []),
        ([0, 1, 1, 1, 1, 0, 2, 0, 2], [[1, 4, 4]], [[2, 2, 2]], [1.0]),
    ]
    return arguments_of(samples, "qwen3_vl", 2) | changes


TYPES = three()["mm_token_type_ids"]
WRONG = {  # the samples are named by their index
    "too few tokens": (
        {"image_grid_thw": torch.tensor([[1, 2, 4], [1, 4, 6]])},
        r"image_grid_thw must be of as many tokens as the image tokens of sample 2; got row 1, \[1, 4, 6\], for 6 "
        "tokens in a row, where there are 4",
    ),
    "the first sample has too many": (
        {"image_grid_thw": torch.tensor([[1, 2, 2], [1, 4, 4]])},
        r"image tokens of sample 0; got row 1, \[1, 4, 4\], for 4 tokens in a row, where there are 1",
    ),
    "an image too many": (
        {"image_grid_thw": torch.tensor([[1, 2, 4], [1, 4, 4], [1, 2, 2]])},
        "image_grid_thw must be of 2 images, which use up the image tokens of all samples; got 3",
    ),
    "an image too few": (
        {"image_grid_thw": torch.tensor([[1, 2, 4]])},
        "image_grid_thw must be of more than 1 images, to match the image tokens of sample 2; got 1",
    ),
    "no grids": ({"image_grid_thw": None}, "of more than 0 images, to match the image tokens of sample 0; got 0"),
    "no video grids": ({"video_grid_thw": None}, "video_grid_thw must be .* video tokens of sample 2; got 0"),
    "a frame too many": (
        {"video_grid_thw": torch.tensor([[3, 2, 2]])},
        r"video_grid_thw must be of as many tokens as the video tokens of sample 2; got row 0, \[3, 2, 2\], 1 frames",
    ),
    "a video whose frames are apart": (
        {"kind": "qwen2_5_vl", "tokens_per_second": 2},
        r"video tokens of sample 2; got row 0, \[2, 2, 2\], for 2 tokens in a row, where there are 1",
    ),
    "an image across samples": (
        {"cu_seqlens": torch.tensor([0, 2, 7, 16])},
        r"image tokens of sample 0; got row 0, \[1, 2, 4\], for 2 tokens in a row, where there are 1",
    ),
    "text in an image": (
        {"mm_token_type_ids": TYPES.index_fill(0, torch.tensor([9]), 0).index_fill(0, torch.tensor([12]), 1)},
        r"image tokens of sample 2; got row 1, \[1, 4, 4\], for 4 tokens in a row, where there are 1",
    ),
    "sides that are no multiples": (
        {"image_grid_thw": torch.tensor([[1, 2, 4], [1, 3, 4]])},
        r"image_grid_thw\[1\] is \[1, 3, 4\]: expected sizes from 1 to 1048576, both sides multiples of merge_size 2",
    ),
    "no frames": ({"image_grid_thw": torch.tensor([[0, 2, 4], [1, 4, 4]])}, r"image_grid_thw\[0\] is \[0, 2, 4\]"),
    "absurd": (
        {"video_grid_thw": torch.tensor([[2, 2**62, 2]])},
        r"video_grid_thw\[0\] is \[2, 4611686018427387904, 2\]",
    ),
    "a negative side": ({"video_grid_thw": torch.tensor([[2, -2, -2]])}, r"video_grid_thw\[0\] is \[2, -2, -2\]"),
    "an unknown type": (
        {"mm_token_type_ids": TYPES.index_fill(0, torch.tensor([5]), 3)},
        r"mm_token_type_ids\[5\] is 3: expected 0 \(text\), 1 \(image\) or 2 \(video\)",
    ),
    "bounds that fall": (
        {"cu_seqlens": torch.tensor([0, 7, 4, 16])},
        r"cu_seqlens\[2\] is 4: expected 7 or greater, as the bounds before it",
    ),
    "a negative bound": ({"cu_seqlens": torch.tensor([0, -4, 7, 16])}, r"cu_seqlens\[1\] is -4: expected 0 or greater"),
    "not from 0": ({"cu_seqlens": torch.tensor([1, 4, 7, 16])}, r"cu_seqlens\[0\] is 1: expected 0"),
    "another end": ({"cu_seqlens": torch.tensor([0, 4, 7, 15])}, r"cu_seqlens\[3\] is 15: expected 16, the number"),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("what", WRONG)
def test_values_that_do_not_fit_are_named_with_their_sample(what, backend):
    mrope_positions(**three())
    changes, message = WRONG[what]
    with m4ov_kernels.backend(backend), pytest.raises(ValueError, match=f"^mrope_positions: .*{message}"):
        mrope_positions(**three(**changes))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, 1e30])
def test_seconds_that_are_none_are_named(seconds, backend):
    samples = [([0, 2, 2, 0], [], [[2, 2, 2]], [seconds])]
    with (
        m4ov_kernels.backend(backend),
        pytest.raises(ValueError, match=r"second_per_grid_ts\[0\] is .*: expected a fin"),
    ):
        mrope_positions(**arguments_of(samples, "qwen2_5_vl", 2))


def test_batches_of_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    for backend in ("native", "reference"):
        with m4ov_kernels.backend(backend):
            for samples in (0, 1, 3):
                bounds = torch.zeros(samples + 1, dtype=torch.int64)
                position_ids, deltas = mrope_positions(nothing, cu_seqlens=bounds, **IMAGES)
                assert position_ids.shape == (3, 0)
                assert deltas.tolist() == [0] * samples
    grids = torch.tensor([[1, 2, 2]])
    with pytest.raises(ValueError, match=r"image_grid_thw must be \[0, 3\] or None, as there are no tokens; got"):
        mrope_positions(nothing, cu_seqlens=nothing.new_zeros(2), image_grid_thw=grids, **IMAGES)
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[N \+ 1\] with at least one sample for 2 tokens; got"):
        mrope_positions(torch.tensor([1, 2]), cu_seqlens=nothing.new_zeros(1), **IMAGES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compiled_whole_equals_eager(kind, backend):
    """Fixed and changing sizes, several grids in one graph; the reference is traced into it."""

    def function(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return mrope_positions(**arguments)

    torch.compiler.reset()
    traced = "aot_eager" if backend == "native" else "eager"
    compiled = torch.compile(function, fullgraph=True, backend=traced, dynamic=True)
    with m4ov_kernels.backend(backend):
        for index in range(40, 43 if backend == "native" else 41):
            packed = draw_large(Seeded(SEED, index), kind)
            assert_equal(compiled(packed.arguments), mrope_positions(**packed.arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    operator = OPERATORS["mrope_positions"]
    assert operator.registered_bwd is None
    arguments = next(
        packed.arguments
        for packed in (draw_batch(Seeded(i), kind, 2) for i in range(99))
        if packed.arguments["video_grid_thw"] is not None and packed.arguments["image_grid_thw"] is not None
    )
    names = ("input_ids", "cu_seqlens", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    inputs = (*(arguments[name] for name in names), IMAGE, VIDEO, 2)
    torch.library.opcheck(operator.registered_fwd, inputs)
    torch.library.opcheck(operator.registered_fwd, (*inputs[:2], None, *inputs[3:]))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = three()
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        position_ids, deltas = mrope_positions(**fake)
    assert (position_ids.shape, deltas.shape) == ((3, 16), (3,))
    assert position_ids.dtype == deltas.dtype == torch.int64


def test_nothing_is_differentiable():
    samples = [([0, 2, 2, 0], [], [[2, 2, 2]], [1.5])]
    arguments = arguments_of(samples, "qwen2_5_vl", 2)
    arguments["second_per_grid_ts"].requires_grad_()
    assert not mrope_positions(**arguments)[0].requires_grad


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there interpreted


@pytest.fixture
def small_blocks():
    """Blocks that small batches have several of."""
    rows = [configs.Row("mrope_positions", "any", None, Config({"BLOCK": 16}))]
    rows.append(configs.Row("mrope_table", "any", None, Config({"BLOCK": 2})))
    with configs.override(*rows):
        yield


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=12)
def test_triton_equals_get_rope_index(small_blocks, kind, data):
    packed = data.draw(batches(kind))
    arguments = packed.arguments | data.draw(st.sampled_from(({}, {"mm_token_type_ids": None})))
    if arguments["mm_token_type_ids"] is not None and data.draw(st.booleans()):
        arguments["mm_token_type_ids"] = arguments["mm_token_type_ids"].int()
    with m4ov_kernels.backend("triton"):
        got = mrope_positions(**on_device(arguments))
    m4ov_kernels.check()
    assert_equal(tuple(tensor.cpu() for tensor in got), rope_index(packed))


@pytest.mark.parametrize("kind", KINDS)
def test_triton_on_large_batches(kind):
    packed = draw_large(Seeded(SEED, 7), kind)
    with m4ov_kernels.backend("triton"):
        got = mrope_positions(**on_device(packed.arguments))
    m4ov_kernels.check()
    assert_equal(tuple(tensor.cpu() for tensor in got), rope_index(packed))


# What the device says of WRONG: argument and sample (or row, or token), without a look from the host.
FLAGGED = {
    "too few tokens": r"image_grid_thw: sample\[2\] has other image tokens than the grids say",
    "the first sample has too many": r"image_grid_thw: sample\[0\]",
    "an image too many": r"image_grid_thw: sample\[2\]",
    "an image too few": r"image_grid_thw: sample\[2\]",
    "no grids": r"image_grid_thw: sample\[0\]",
    "no video grids": r"video_grid_thw: sample\[2\]",
    "a frame too many": r"video_grid_thw: sample\[2\]",
    "a video whose frames are apart": r"video_grid_thw: sample\[2\]",
    "an image across samples": r"image_grid_thw: sample\[0\]",
    "text in an image": r"image_grid_thw: sample\[2\]",
    "sides that are no multiples": r"image_grid_thw\[1\] is not from 1 to 2\^20, height and width multiples",
    "no frames": r"image_grid_thw\[0\] is not",
    "absurd": r"video_grid_thw\[0\] is not",
    "a negative side": r"video_grid_thw\[0\] is not",
    "an unknown type": r"mm_token_type_ids\[5\] is not 0 \(text\), 1 \(image\) or 2",
    "bounds that fall": r"cu_seqlens\[2\] is not 0 at the start, below",
    "a negative bound": r"cu_seqlens\[1\] is not",
    "not from 0": r"cu_seqlens\[0\] is not",
    "another end": r"cu_seqlens\[3\] is not",
}


@pytest.mark.parametrize("what", WRONG)
def test_triton_flags_what_does_not_fit(small_blocks, what):
    assert FLAGGED.keys() == WRONG.keys()
    with m4ov_kernels.backend("triton"):
        position_ids, deltas = mrope_positions(**on_device(three(**WRONG[what][0])))
    assert position_ids.shape == (3, 16)
    assert deltas.shape == (3,)
    if "sample" in FLAGGED[what]:  # its positions, or those behind the fault, are none
        assert (position_ids == -1).any()
    with pytest.raises(ValueError, match=f"^mrope_positions: {FLAGGED[what]}"):
        m4ov_kernels.check()
    for _ in device_errors.SLOTS:  # one fault may show in several places
        with suppress(ValueError):
            m4ov_kernels.check()
    with m4ov_kernels.backend("triton"):
        mrope_positions(**on_device(three()))
    m4ov_kernels.check()


def test_triton_flags_seconds(small_blocks):
    arguments = arguments_of([([0, 2, 2, 0], [], [[2, 2, 2]], [math.nan])], "qwen2_5_vl", 2)
    with m4ov_kernels.backend("triton"):
        mrope_positions(**on_device(arguments))
    with pytest.raises(ValueError, match=r"mrope_positions: second_per_grid_ts\[0\] is not a finite number"):
        m4ov_kernels.check()
