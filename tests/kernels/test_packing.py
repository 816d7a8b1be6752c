"""``pack_sequences`` against its definition and the fewest bins possible; ``PackedBatch``: nothing is ever lost."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m4ov_kernels.packing import Bins, PackedBatch, Patches, Sample, pack_sequences, reference, sequences

from .draws import Draw, Seeded
from .rope_index import IMAGE, TOKENS_PER_SECOND, VIDEO, Packed, draw_batch, rope_index
from .strategies import drawn

MERGE, WIDTH = 2, 6


def listed(bins: Bins) -> list[list[int]]:
    return [group.tolist() for group in bins]


@settings(max_examples=200)
@given(data=st.data(), capacity=st.integers(1, 5000))
def test_the_kernel_packs_as_the_definition_does(isa, data, capacity):
    lengths = data.draw(st.lists(st.integers(0, min(capacity, data.draw(st.integers(0, capacity)))), max_size=60))
    bins = pack_sequences(lengths, capacity)
    assert listed(bins) == reference.pack_sequences(lengths, capacity)
    assert sorted(bins.order.tolist()) == list(range(len(lengths)))
    for group in bins:
        assert len(group)
        assert sum(lengths[sequence] for sequence in group) <= capacity


def test_without_the_kernel_the_bins_are_the_same(monkeypatch):
    lengths = torch.randint(0, 300, (500,))
    made = pack_sequences(lengths, 1000)
    monkeypatch.setattr(sequences, "native_extension", lambda: (None, ""))
    plain = pack_sequences(lengths, 1000)
    assert torch.equal(plain.order, made.order)
    assert torch.equal(plain.offsets, made.offsets)
    assert listed(plain)[3] == plain[3].tolist() == plain[3 - len(plain)].tolist()
    with pytest.raises(IndexError, match="there are"):
        plain[len(plain)]


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 4095, 4096, 4097, 262_143, 262_145, 1 << 24, (1 << 24) + 1])
def test_capacities_around_the_steps_of_the_bitmap(capacity, isa):
    lengths = [capacity, 0, capacity // 2, capacity - capacity // 2, 1, max(0, capacity - 1), 0, capacity // 3]
    assert listed(pack_sequences(lengths, capacity)) == reference.pack_sequences(lengths, capacity)


def realistic(mix: str, count: int, capacity: int) -> torch.Tensor:
    """Lengths of training data: chats, long documents among them, and image conversations (steps of image sizes)."""
    if mix == "chat":
        lengths = torch.distributions.LogNormal(5.5, 1.0).sample((count,))
    elif mix == "documents":
        short, long = torch.distributions.LogNormal(6.0, 1.0).sample((count,)), torch.rand(count) * capacity
        lengths = torch.where(torch.rand(count) < 0.2, long, short)
    else:
        lengths = torch.randint(1, 9, (count,)) * 256 + torch.distributions.LogNormal(4.0, 1.0).sample((count,))
    return lengths.long().clamp(1, capacity)


@pytest.mark.parametrize("mix", ["chat", "documents", "images"])
def test_bins_are_at_least_99_percent_full(mix):
    capacity = 8192
    lengths = realistic(mix, 20_000, capacity)
    bins = pack_sequences(lengths, capacity)
    assert int(lengths.sum()) / (len(bins) * capacity) >= 0.99


@given(data=st.data(), capacity=st.integers(2, 1000))
def test_no_more_bins_than_is_proven_of_best_fit_decreasing(data, capacity):
    """Full bins cut into pieces: as many bins are enough, and best-fit decreasing takes at most 11/9 of them + 6/9."""
    full = data.draw(st.integers(1, 20))
    pieces: list[int] = []
    for _ in range(full):
        cuts = sorted(data.draw(st.lists(st.integers(1, capacity - 1), max_size=6)))
        pieces += [end - begin for begin, end in zip([0, *cuts], [*cuts, capacity], strict=True)]
    assert full <= len(pack_sequences(pieces, capacity)) <= (11 * full + 6) / 9


def test_nothing_is_packed_into_no_bin():
    assert len(pack_sequences([], 5)) == 0
    assert list(pack_sequences(torch.zeros(0, dtype=torch.int64), 5)) == []


@pytest.mark.parametrize(
    ("lengths", "capacity", "error", "message"),
    [
        ([1, 9, 2], 8, ValueError, r"lengths\[1\] is 9: expected 0 to 8, the capacity"),
        ([1, 2, -1], 8, ValueError, r"lengths\[2\] is -1: expected 0 to 8"),
        ([1.5], 8, TypeError, "lengths must be whole numbers; got float32"),
        (["a"], 8, TypeError, "lengths must be whole numbers; got list"),
        (7, 8, ValueError, r"lengths must be \[N\], on the CPU; got int64 tensor \[\]"),
        ([[1]], 8, ValueError, r"lengths must be \[N\]"),
        (torch.empty(2, dtype=torch.int64, device="meta"), 8, ValueError, ".*on the CPU; got int64 tensor"),
        ([1], 0, ValueError, "capacity must be 1 or greater; got 0"),
        ([1], 8.0, TypeError, "capacity must be an int; got float 8.0"),
        ([1], True, TypeError, "capacity must be an int"),
        ([1 << 70], 8, TypeError, "lengths must be whole numbers"),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths, capacity, error, message):
    with pytest.raises(error, match=f"pack_sequences: {message}"):
        pack_sequences(lengths, capacity)


def samples_of(packed: Packed, draw: Draw) -> list[Sample]:
    """Samples with patches that tell which image they are, and with labels that tell which token."""
    made, number = [], 0.0
    begin = 0
    for types, images, videos, seconds in packed.samples:
        patches: list[list[Patches]] = [[], []]
        timed = seconds if packed.arguments["kind"] == "qwen2_5_vl" else [None] * len(videos)
        for kind, grids, spans in ((0, images, [None] * len(images)), (1, videos, timed)):
            for grid, span in zip(grids, spans, strict=True):
                values = torch.arange(math.prod(grid) * WIDTH).view(-1, WIDTH) + 1000 * number
                patches[kind].append(Patches(values.float(), tuple(grid), span))
                number += 1
        ids = packed.arguments["input_ids"][begin : begin + len(types)]
        begin += len(types)
        labels = torch.where(torch.rand(len(types)) < 0.5, ids, -100)
        made.append(Sample(ids, labels if draw.boolean() else None, patches[0], patches[1]))
    return made


def build(packed: Packed, samples: list[Sample]) -> PackedBatch:
    kind = packed.arguments["kind"]
    return PackedBatch.from_samples(
        samples,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        merge_size=MERGE,
        kind=kind,
        tokens_per_second=TOKENS_PER_SECOND if kind == "qwen2_5_vl" else None,
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Packed, list[Sample], PackedBatch]:
    kind = draw(st.sampled_from(("qwen3_vl", "qwen2_5_vl")))

    def make(source: Draw) -> tuple[Packed, list[Sample]]:
        packed = draw_batch(source, kind, MERGE)
        if not packed.samples:
            packed = draw_batch(Seeded(1), kind, MERGE)
        return packed, samples_of(packed, source)

    packed, samples = draw(drawn(make))
    return packed, samples, build(packed, samples)


def assert_equal(one: PackedBatch, other: PackedBatch) -> None:
    """The same, tensor by tensor and number by number."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            assert_equal(a, b)
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


@given(made=batches())
def test_a_batch_holds_what_its_samples_hold(made):
    packed, samples, batch = made
    positions, deltas = rope_index(packed)
    assert torch.equal(batch.position_ids, positions)
    assert torch.equal(batch.rope_deltas, deltas)
    assert len(batch) == len(samples)
    assert batch.num_labels == int((batch.labels != -100).sum())
    for index, (begin, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        sample, span = samples[index], slice(begin, end)
        assert torch.equal(batch.input_ids[span], sample.input_ids)
        assert torch.equal(batch.text_position_ids[span], torch.arange(len(sample.input_ids)))
        wanted = torch.full_like(sample.input_ids, -100) if sample.labels is None else sample.labels
        assert torch.equal(batch.labels[span][1:], wanted[1:])
        assert (batch.labels[span][:1] == -100).all()
    for inputs, kind, name in ((batch.images, 1, "images"), (batch.videos, 2, "videos")):
        given_patches = [item for sample in samples for item in getattr(sample, name)]
        if not given_patches:
            assert inputs is None
            continue
        assert torch.equal(inputs.pixel_values, torch.cat([item.pixel_values for item in given_patches]))
        assert inputs.grid_thw.tolist() == [list(item.grid_thw) for item in given_patches]
        assert torch.equal(inputs.positions, (batch.mm_token_type_ids == kind).nonzero()[:, 0])
        assert torch.equal(inputs.features, torch.arange(len(inputs.positions)))
        assert not inputs.shared


@given(made=batches(), data=st.data())
def test_some_samples_of_a_batch_are_the_batch_of_some_samples(made, data):
    packed, samples, batch = made
    chosen = data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=4, unique=True))
    parts = Packed({**packed.arguments}, [packed.samples[i] for i in chosen])
    assert_equal(batch[chosen], build(parts, [samples[i] for i in chosen]))
    assert_equal(batch[chosen[0]], build(parts, [samples[chosen[0]]]))
    middle = data.draw(st.integers(0, len(samples) - 1))
    assert_equal(batch[middle:], build(parts, samples[middle:]))
    assert_equal(batch[-1], build(parts, samples[-1:]))


@given(made=batches(), other=batches())
def test_batches_are_joined_without_losing_anything(made, other):
    packed, samples, batch = made
    if other[0].arguments["kind"] != packed.arguments["kind"]:
        return
    assert_equal(PackedBatch.concatenate([batch, other[2]]), build(packed, samples + other[1]))
    assert_equal(PackedBatch.concatenate([batch[i] for i in range(len(batch))]), batch)


@given(made=batches())
def test_a_moved_batch_keeps_everything(made):
    *_, batch = made
    assert_equal(pickle.loads(pickle.dumps(batch)), batch)
    meta = batch.to("meta", torch.bfloat16)
    for one, other in ((meta, batch), (meta.images, batch.images), (meta.videos, batch.videos)):
        assert (one is None) == (other is None)
        for field in dataclasses.fields(other) if other is not None else ():
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(b, torch.Tensor):
                dtype = torch.bfloat16 if field.name == "pixel_values" else b.dtype
                assert (a.device.type, a.dtype, a.shape) == ("meta", dtype, b.shape), field.name
    assert_equal(
        batch.to("cpu", torch.bfloat16).to(dtype=torch.float64).to(torch.device("cpu")),
        batch.to(dtype=torch.bfloat16).to(dtype=torch.float64),
    )


def conversation(*images: Patches, text: int = 3) -> Sample:
    tokens = [torch.full((text,), 7)]
    for image in images:
        tokens += [torch.full((math.prod(image.grid_thw) // MERGE**2,), IMAGE), torch.full((text,), 8)]
    ids = torch.cat(tokens)
    return Sample(ids, ids.clone(), images)


def picture(rows: int, columns: int, fill: float) -> Patches:
    return Patches(torch.full((4 * rows * columns, WIDTH), fill), (1, 2 * rows, 2 * columns))


def pack(*samples: Sample) -> PackedBatch:
    return PackedBatch.from_samples(samples, image_token_id=IMAGE, video_token_id=VIDEO, merge_size=MERGE)


def test_a_shared_image_is_held_once_and_serves_all_its_samples():
    a, b, c = picture(1, 2, 1.0), picture(2, 2, 2.0), picture(1, 1, 3.0)
    samples = [conversation(b, a), conversation(a), conversation(text=2), conversation(c, b)]
    batch = pack(*samples)
    assert batch.images.shared
    assert batch.images.grids == (b.grid_thw, a.grid_thw, c.grid_thw)
    assert batch.images.shown == ((0, 1), (1,), (), (2, 0))
    assert batch.images.pixel_values.shape[0] == 4 * (2 + 4 + 1)
    features = batch.images.pixel_values[::4, 0]  # one value a feature: which image it is of
    assert features[batch.images.features].tolist() == [2.0] * 4 + [1.0] * 4 + [3.0] + [2.0] * 4
    assert_equal(batch[[3, 1]], pack(samples[3], samples[1]))
    assert batch[2].images is None
    assert batch[1].images.features.tolist() == [0, 1]
    assert not batch[1].images.shared
    joined = PackedBatch.concatenate([batch[:2], batch[2:]])
    assert (
        features[batch.images.features].tolist() == joined.images.pixel_values[::4, 0][joined.images.features].tolist()
    )


def test_patches_of_a_processor_are_split_by_image():
    pixels = torch.randn(4 + 8, WIDTH)
    first, second = Patches.split(pixels, torch.tensor([[1, 2, 2], [1, 2, 4]]))
    assert torch.equal(torch.cat([first.pixel_values, second.pixel_values]), pixels)
    assert (first.grid_thw, second.grid_thw) == ((1, 2, 2), (1, 2, 4))
    with pytest.raises(ValueError, match="Patches: grid_thw must be of 12 patches; got 8"):
        Patches.split(pixels, [(1, 2, 4)])


def test_a_wrong_sample_is_named():
    good, image = conversation(picture(1, 2, 0.0)), picture(2, 2, 1.0)
    ids = good.input_ids
    wrong = [
        (
            dataclasses.replace(good, images=[]),
            ValueError,
            "as many image tokens as its 0 images have features, 0; got 2",
        ),
        (dataclasses.replace(good, images=[image]), ValueError, "as its 1 images have features, 4; got 2"),
        (dataclasses.replace(good, videos=[image]), ValueError, "video tokens as its 1 videos have features, 4; got 0"),
        (Sample(ids[:-4], images=good.images), ValueError, "features, 2; got 1"),  # truncated inside an image
        (Sample(ids, ids[1:], good.images), ValueError, None),
        (Sample(ids.int(), images=good.images), TypeError, None),
        (Sample(ids[None], images=good.images), ValueError, None),
        (Sample(ids.tolist(), images=good.images), TypeError, None),
    ]
    for sample, error, message in wrong:
        expected = r"PackedBatch: samples\[1\]" + (f" must have .*{message}" if message else r"\.\w+ must be ")
        with pytest.raises(error, match=expected):
            pack(good, sample, good)
    apart = torch.cat([ids[:4], torch.tensor([7]), ids[4:]])
    with pytest.raises(ValueError, match="image_grid_thw must be of as many tokens as the image tokens of sample 1"):
        pack(good, Sample(apart, images=good.images))
    patches = Patches(torch.zeros(8, WIDTH), (1, 2, 2))
    with pytest.raises(ValueError, match=r"samples\[1\]\.images\[0\]\.pixel_values must be \[4, .*; got \[8, 6\]"):
        pack(good, dataclasses.replace(good, images=[patches]))
    with pytest.raises(
        ValueError, match=r"samples\[0\]\.images\[0\]\.grid_thw must be .* multiples of 2; got \(1, 3, 2\)"
    ):
        pack(dataclasses.replace(good, images=[Patches(torch.zeros(6, WIDTH), (1, 3, 2))]))
    with pytest.raises(ValueError, match="samples must be at least one"):
        pack()
    with pytest.raises(ValueError, match="batches must be at least one"):
        PackedBatch.concatenate([])
    for which in (3, [], [0, 3], slice(2, 2), -4):
        with pytest.raises(IndexError, match="samples must be some of 0 to 2"):
            pack(good, good, good)[which]
