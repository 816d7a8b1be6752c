"""The vision operators: what is their own; what they share with all operators is in ``test_operators.py``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import m4ov_kernels
from m4ov_kernels import (
    deepstack_add,
    interpolate_position_embeddings,
    patch_embed,
    scatter_vision,
    vision_positions,
)
from m4ov_kernels.nn import PatchEmbed

from . import strategies
from .numerics import assert_accurate, gradients, leaves

GRIDS = torch.tensor([[1, 4, 6], [2, 8, 2], [1, 2, 2], [1, 64, 50], [1, 2, 100]])


def hugging_face(table, grid_thw, hidden_states, merge_size):
    """What the vision tower of transformers' Qwen3-VL computes, whichever version is installed."""
    utilities = pytest.importorskip("transformers.vision_utils")
    side = int(table.shape[0] ** 0.5)
    if hasattr(utilities, "get_vision_interpolation_indices_and_weights"):  # 5.17 and newer
        indices, weights = utilities.get_vision_interpolation_indices_and_weights(
            grid_thw, side, mode="bilinear", align_corners=True, spatial_merge_size=merge_size
        )
        embedded = (F.embedding(indices, table) * weights[:, :, None]).sum(1)
    else:
        indices, weights = utilities.get_vision_bilinear_indices_and_weights(grid_thw, side, merge_size)
        embedded = (F.embedding(indices, table) * weights[:, :, None]).sum(0)
    return hidden_states + embedded.to(hidden_states.dtype)


def by_linspace(table, grid_thw, merge_size):
    """``fast_pos_embed_interpolate`` of transformers before 5.17: coordinates from ``torch.linspace``."""
    side, parts = int(table.shape[0] ** 0.5), []
    for t, h, w in grid_thw.tolist():
        y, x = (torch.linspace(0, side - 1, n) for n in (h, w))
        rows, columns = y.int(), x.int()
        dy, dx = (y - rows)[:, None, None], (x - columns)[None, :, None]
        square = table.view(side, side, -1).float()
        below, right = (rows + 1).clamp(max=side - 1), (columns + 1).clamp(max=side - 1)
        top = square[rows][:, columns] * (1 - dx) + square[rows][:, right] * dx
        bottom = square[below][:, columns] * (1 - dx) + square[below][:, right] * dx
        image = top * (1 - dy) + bottom * dy  # [h, w, D]
        blocks = image.view(h // merge_size, merge_size, w // merge_size, merge_size, -1).transpose(1, 2)
        parts.append(blocks.reshape(h * w, -1).repeat(t, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
@pytest.mark.parametrize("side", [48, 3])
def test_interpolation_has_the_bits_of_hugging_face(isa, dtype, side):
    table = torch.randn(side * side, 70, dtype=dtype)
    hidden = torch.randn(int(GRIDS.prod(1).sum()), 70, dtype=dtype)
    got = interpolate_position_embeddings(table, GRIDS, merge_size=2, hidden_states=hidden)
    expected = hugging_face(table, GRIDS, hidden, 2)
    with m4ov_kernels.backend("reference"):
        reference = interpolate_position_embeddings(table, GRIDS, merge_size=2, hidden_states=hidden)
    assert torch.equal(got, reference)
    from transformers import vision_utils

    if hasattr(vision_utils, "get_vision_interpolation_indices_and_weights"):
        assert torch.equal(got, expected)
    else:  # linspace rounds a coordinate otherwise, by a unit in the last place of the table's side
        assert (got.float() - expected.float()).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_interpolation_equals_linspace_but_for_its_rounding(isa):
    table = torch.randn(48 * 48, 20)
    got = interpolate_position_embeddings(table, GRIDS, merge_size=2)
    error = (got - by_linspace(table, GRIDS, 2)).abs().max()
    assert error < 2 * 48 * 2.0**-23 * table.abs().max()  # two coordinates, each of up to 47


def test_rounding_contract_of_interpolation(isa):
    table, hidden = torch.randn(49, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    grid_thw = torch.tensor([[1, 8, 12]])
    got = {
        name: interpolate_position_embeddings(table, grid_thw, merge_size=2, hidden_states=hidden, numerics=name)
        for name in ("hf", "vllm", "fp32")
    }
    alone = interpolate_position_embeddings(table.float(), grid_thw, merge_size=2)
    assert torch.equal(got["fp32"], got["vllm"])
    assert torch.equal(got["fp32"], (hidden.float() + alone).bfloat16())
    assert torch.equal(got["hf"], hidden + alone.bfloat16())
    assert (got["hf"] == got["fp32"]).float().mean() < 0.99, "the contracts are not told apart"


def test_a_table_of_the_images_size_is_itself_in_merge_order(isa):
    table = torch.randn(36, 8)
    got = interpolate_position_embeddings(table, torch.tensor([[2, 6, 6]]), merge_size=3)
    blocks = table.view(2, 3, 2, 3, 8).transpose(1, 2).reshape(36, 8)
    assert torch.equal(got, blocks.repeat(2, 1))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bits_of_the_tables_gradient_do_not_depend_on_threads(isa, threads):
    grad = torch.randn(int(GRIDS.prod(1).sum()), 1100)
    table = torch.randn(49, 1100, requires_grad=True)

    def gradient():
        embedded = interpolate_position_embeddings(table, GRIDS, merge_size=2)
        return torch.autograd.grad(embedded, table, grad)[0]

    before, expected = torch.get_num_threads(), gradient()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(gradient(), expected)
    finally:
        torch.set_num_threads(before)


def test_long_videos_and_one_place_for_all(isa):
    """More lines of patches than are summed at once."""
    for side, grid in ((1, [3, 40, 2]), (2, [90, 2, 2]), (5, [1, 2, 600])):
        grid_thw = torch.tensor([grid, [1, 2, 2]])
        patches = int(grid_thw.prod(1).sum())
        table, grad = torch.randn(side * side, 33), torch.randn(patches, 33)

        def run(dtype, table=table, grid_thw=grid_thw, grad=grad):
            (leaf,) = leaves(dtype, table)
            out = interpolate_position_embeddings(leaf, grid_thw, merge_size=2)
            return [out, *gradients(out, [leaf], [grad.to(dtype)])]

        ours = run(torch.float32)
        with m4ov_kernels.backend("reference"):
            plain, exact = run(torch.float32), run(torch.float64)
        magnitude = grad.double().abs().sum(0).expand(side * side, 33)
        for name, *tensors in zip(("out", "grad_table"), ours, plain, exact, strict=True):
            assert_accurate(name, *tensors, magnitude if name == "grad_table" else None)


def test_gradients_that_are_passed_on_are_not_copied():
    table, hidden = torch.randn(9, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    grad = torch.randn(8, 8)
    embedded = interpolate_position_embeddings(table, torch.tensor([[2, 2, 2]]), merge_size=2, hidden_states=hidden)
    assert torch.autograd.grad(embedded, hidden, grad)[0].data_ptr() == grad.data_ptr()
    added = deepstack_add(hidden, torch.randn(2, 8), torch.tensor([1, 2]))
    assert torch.autograd.grad(added, hidden, grad)[0].data_ptr() == grad.data_ptr()


def test_scattered_bits_are_those_of_the_features(isa):
    """NaN with a payload, infinities and both zeros, at a width that leaves a tail."""
    bits = torch.randint(-(2**15), 2**15, (50, 77), dtype=torch.int16)
    embeds, features = bits[:30].view(torch.bfloat16), bits[30:].view(torch.bfloat16)
    positions = torch.randperm(30)[:20]
    got = scatter_vision(embeds, features, positions).view(torch.int16)
    expected = bits[:30].clone()
    expected[positions] = bits[30:]
    assert torch.equal(got, expected)
    added = deepstack_add(embeds, features, positions).view(torch.int16)
    untouched = torch.ones(30, dtype=torch.bool).index_fill(0, positions, False)
    assert torch.equal(added[untouched], bits[:30][untouched])


@pytest.mark.parametrize("dtype", strategies.HALF_AND_SINGLE)
def test_scatter_and_deepstack_equal_hugging_face(isa, dtype):
    """``masked_scatter`` and ``_deepstack_process``, with batch dimension, forward and backward."""
    mask = torch.rand(2, 30) < 0.6
    embeds, features = torch.randn(2, 30, 40, dtype=dtype), torch.randn(int(mask.sum()), 40, dtype=dtype)
    positions, grad = mask.flatten().nonzero()[:, 0], torch.randn(2, 30, 40, dtype=dtype)

    def scattered(embeds, features):
        return embeds.masked_scatter(mask[..., None].expand_as(embeds), features)

    def added(hidden_states, features):
        hidden_states = hidden_states.clone()
        hidden_states[mask, :] = hidden_states[mask, :] + features
        return hidden_states

    for ours, theirs in ((scatter_vision, scattered), (deepstack_add, added)):
        inputs = leaves(dtype, embeds, features)
        got, expected = ours(*inputs, positions), theirs(*inputs)
        assert torch.equal(got, expected)
        for a, b in zip(gradients(got, inputs, [grad]), gradients(expected, inputs, [grad]), strict=True):
            assert torch.equal(a, b)


def test_gradcheck_of_the_references():
    positions = torch.tensor([4, 1])
    embeds, features = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 2))
    table, hidden = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (9, 12))
    grid_thw = torch.tensor([[1, 2, 4], [1, 2, 2]])
    with m4ov_kernels.backend("reference"):
        for operator in (scatter_vision, deepstack_add):
            assert torch.autograd.gradcheck(lambda x, y, f=operator: f(x, y, positions), (embeds, features))
            assert torch.autograd.gradgradcheck(lambda x, y, f=operator: f(x, y, positions), (embeds, features))

        def interpolate(table, hidden):
            return interpolate_position_embeddings(table, grid_thw, merge_size=2, hidden_states=hidden)

        assert torch.autograd.gradcheck(interpolate, (table, hidden))
        assert torch.autograd.gradgradcheck(interpolate, (table, hidden))


class TestPatchEmbed:
    def test_equals_the_convolution_with_gradients(self):
        conv = torch.nn.Conv3d(3, 10, (2, 4, 4), (2, 4, 4)).double()
        pixels = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        inputs = [pixels, conv.weight, conv.bias]
        grad = torch.randn(7, 10, dtype=torch.float64)
        for given in (pixels, pixels.flatten(1)):
            got, expected = patch_embed(given, conv.weight, conv.bias), conv(pixels).view(7, 10)
            torch.testing.assert_close(got, expected)
            for a, b in zip(gradients(got, inputs, [grad]), gradients(expected, inputs, [grad]), strict=True):
                torch.testing.assert_close(a, b)
        torch.testing.assert_close(patch_embed(pixels, conv.weight.flatten(1)), conv(pixels).view(7, 10) - conv.bias)

    def test_module_runs_it_and_converts_pixels(self):
        module = PatchEmbed(3, 2, 4, 10).bfloat16()
        pixels = torch.randn(5, 96)
        expected = F.linear(pixels.bfloat16(), module.proj.weight.flatten(1), module.proj.bias)
        assert torch.equal(module(pixels), expected)
        assert torch.equal(module(pixels.view(5, 3, 2, 4, 4)), expected)
        assert module(pixels[:0]).shape == (0, 10)

    @pytest.mark.parametrize(
        ("change", "error", "said"),
        [
            ({"pixel_values": torch.randn(5, 95)}, ValueError, r"pixel_values must be \[N, 96\].*\[5, 95\]"),
            (
                {"pixel_values": torch.zeros(5, 96, dtype=torch.uint8)},
                TypeError,
                "pixel_values must be a bfloat16.*uint8",
            ),
            ({"weight": torch.randn(10, 3, 32)}, ValueError, r"weight must be \[D, K\] or.*\[10, 3, 32\]"),
            ({"weight": [1.0]}, TypeError, "weight must be a tensor; got list"),
            ({"bias": torch.randn(9)}, ValueError, r"bias must be \[10\].*\[9\]"),
            ({"bias": torch.randn(10).half()}, TypeError, "bias must be torch.float32.*float16"),
            ({"pixel_values": torch.randn(5, 96, device="meta")}, ValueError, "pixel_values must be .* on cpu.*meta"),
        ],
    )
    def test_faults_are_refused_by_name(self, change, error, said):
        arguments = {"pixel_values": torch.randn(5, 96), "weight": torch.randn(10, 96), "bias": torch.randn(10)}
        with pytest.raises(error, match=f"^patch_embed: {said}"):
            patch_embed(**(arguments | change))


class TestVisionPositions:
    TYPES = torch.tensor([0, 1, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 0])  # samples of 6, 0, 6 and 2 tokens
    BOUNDS = torch.tensor([0, 6, 6, 12, 14])
    IMAGES = torch.tensor([[1, 2, 2], [1, 2, 6], [1, 4, 2]])  # 1, 3 and 2 features
    VIDEOS = torch.tensor([[2, 2, 2]])

    def call(self, **changes):
        arguments = {
            "mm_token_type_ids": self.TYPES,
            "cu_seqlens": self.BOUNDS,
            "merge_size": 2,
            "image_grid_thw": self.IMAGES,
            "video_grid_thw": self.VIDEOS,
        }
        return vision_positions(**(arguments | changes))

    def test_positions(self):
        for counts in ({}, {"images_per_sample": [2, 0, 1, 0], "videos_per_sample": torch.tensor([0, 0, 1, 0])}):
            found = self.call(**counts)
            assert found.image.tolist() == [1, 2, 3, 4, 10, 11]
            assert found.video.tolist() == [7, 9]
        found = self.call(mm_token_type_ids=self.TYPES.int()[None], cu_seqlens=self.BOUNDS.int())
        assert found.image.tolist() == [1, 2, 3, 4, 10, 11]

    def test_without_images_and_without_tokens(self):
        found = vision_positions(torch.zeros(5, dtype=torch.int64), torch.tensor([0, 2, 5]), merge_size=2)
        assert found.image.tolist() == found.video.tolist() == []
        found = vision_positions(torch.zeros(0, dtype=torch.int64), torch.tensor([0]), merge_size=2)
        assert found.image.dtype == torch.int64

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 2]])}, "sample 0 has 4 image tokens"),
            ({"image_grid_thw": torch.tensor([[1, 2, 8], [1, 2, 2]])}, "sample 2 has 2 image tokens.*from image 1"),
            ({"image_grid_thw": torch.tensor([[1, 2, 8], [1, 2, 2], [1, 2, 4]])}, "sample 2 has 2 image tokens"),
            ({"image_grid_thw": None}, "sample 0 has 4 image tokens"),
            (
                {"image_grid_thw": torch.tensor([[1, 2, 8], [1, 2, 4], [1, 2, 2]])},
                "sample 3 has 0 image .* 1 more are left",
            ),
            ({"video_grid_thw": torch.tensor([[3, 2, 2]])}, "sample 2 has 2 video tokens"),
            ({"images_per_sample": [1, 1, 1, 0]}, "sample 0 has 4 image tokens, but its images 1 have 1 features"),
            ({"mm_token_type_ids": torch.zeros(14, dtype=torch.int64)}, "sample 3 has 0 image .* 3 more are left"),
        ],
    )
    def test_a_mismatch_names_the_sample(self, change, said):
        with pytest.raises(ValueError, match=f"^vision_positions: {said}"):
            self.call(**change)

    @pytest.mark.parametrize(
        ("change", "error", "said"),
        [
            ({"cu_seqlens": torch.tensor([0, 6, 13])}, ValueError, r"cu_seqlens must be \[S \+ 1\], from 0 to 14"),
            (
                {"cu_seqlens": torch.tensor([0, 8, 6, 14])},
                ValueError,
                "cu_seqlens must be in ascending .*6 after 8.*sample 1",
            ),
            ({"cu_seqlens": torch.tensor([])}, TypeError, "cu_seqlens must be a tensor of integers"),
            ({"cu_seqlens": [0, 14]}, TypeError, "cu_seqlens must be a tensor of integers"),
            ({"mm_token_type_ids": torch.zeros(2, 7, dtype=torch.int64)}, ValueError, "mm_token_type_ids must be"),
            (
                {"mm_token_type_ids": torch.zeros(14, dtype=torch.int64, device="meta")},
                ValueError,
                "mm_token.* on the CPU",
            ),
            ({"image_grid_thw": torch.tensor([[1, 2]])}, ValueError, r"image_grid_thw must be \[n, 3\]"),
            ({"merge_size": 0}, ValueError, "merge_size must be at least 1"),
            ({"merge_size": 2.0}, TypeError, "merge_size must be an int"),
            ({"images_per_sample": [2, 0, 1]}, ValueError, "images_per_sample must be a count for each of 4 samples"),
            ({"images_per_sample": [3, 0, 1, -1]}, ValueError, "images_per_sample must be a count for each"),
        ],
    )
    def test_faults_are_refused_by_name(self, change, error, said):
        with pytest.raises(error, match=f"^vision_positions: {said}"):
            self.call(**change)

    def test_no_grid(self):
        with pytest.raises(
            ValueError, match=r"^vision_positions: video_grid_thw\[0\] is \[2, 3, 2\]: expected positive"
        ):
            self.call(video_grid_thw=torch.tensor([[2, 3, 2]]))
