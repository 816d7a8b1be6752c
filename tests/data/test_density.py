"""Information density: what the axes count on constructed and real images, and what must make no difference."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from m4ov.data.density import (
    AXES,
    Density,
    DensityError,
    TextLine,
    Unscored,
    allot,
    audit,
    combine,
    rapidocr,
    score,
    score_by_teacher,
    write_audits,
)
from m4ov.data.density.structure import find_relations, find_subjects
from m4ov.data.teacher import Reply, TeacherError
from tests.data.teachers import Scripted

RANDOM = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
PHOTOS = Path(skimage.__file__).parent / "data"
FIGURES = Path(easy_vqa.__file__).parent / "data" / "train" / "images"
COLOURS = ["red", "blue", "green", "black", "yellow", "magenta", "cyan", "gray", "orange"]
LINES = [
    "The quick brown fox jumps over",
    "the lazy dog and runs away",
    "into the forest 1234567890",
    "where it is dark",
]


def canvas(side: int = 320, colour: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (side, side), colour)
    return image, ImageDraw.Draw(image)


def figures(count: int, side: int = 320) -> Image.Image:
    """``count`` figures in a 3 x 3 arrangement, with room between them."""
    image, draw = canvas(side)
    cell = side // 3
    for place in range(count):
        x, y = cell * (place % 3), cell * (place // 3)
        box = (x + cell // 5, y + cell // 5, x + 4 * cell // 5, y + 4 * cell // 5)
        (draw.ellipse, draw.rectangle)[place % 2](box, fill=COLOURS[place])
    return image


def written(lines: int, side: int = 320, size: int = 16, ink: str = "black", ground: str = "white") -> Image.Image:
    image, draw = canvas(side, ground)
    font = ImageFont.load_default(size)
    for place in range(lines):
        draw.text((10, 10 + 2 * size * place), LINES[place % len(LINES)], fill=ink, font=font)
    return image


def photo(name: str) -> Image.Image:
    with Image.open(PHOTOS / name) as image:
        return image.convert("RGB")


def differences(one: Density, other: Density) -> dict[str, float]:
    return {axis: abs(one.axes[axis] - other.axes[axis]) for axis in AXES}


# --- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", ["white", "black", "#7f3f9f"])
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 400), (640, 480)])
def test_a_blank_image_scores_nothing(colour, shape):
    found = score(Image.new("RGB", shape, colour))
    assert found.axes == dict.fromkeys(AXES, 0.0)
    assert found.combined == 0
    assert found.evidence["size"] == list(shape)


def test_a_gradient_is_one_ground():
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    found = score(np.broadcast_to(ramp[None, :, None], (512, 512, 3)).copy())
    assert (found.subjects, found.text) == (0, 0)


def test_every_figure_is_counted_and_adds():
    found = [score(figures(count)) for count in range(10)]
    assert [density.evidence["subjects"]["count"] for density in found] == list(range(10))
    for axis in ("subjects", "spatial", "combined"):
        values = [getattr(density, axis) for density in found]
        assert all(before < after for before, after in pairwise(values)), (axis, values)
    kinds = [density.evidence["subjects"]["kinds"] for density in found]
    assert kinds == sorted(kinds)
    assert kinds[-1] >= 7


def test_subjects_stand_where_they_were_drawn():
    image, draw = canvas()
    draw.rectangle((20, 40, 119, 199), fill="red")
    draw.rectangle((220, 240, 279, 279), fill="blue")
    colour = np.asarray(image.resize((160, 160), Image.Resampling.BILINEAR))
    found = find_subjects(colour)
    assert np.abs(found.boxes * 320 - [[20, 40, 120, 200], [220, 240, 280, 280]]).max() <= 4  # the edges' two pixels
    mirrored = find_subjects(colour[:, ::-1])
    assert np.allclose(mirrored.boxes[:, [2, 1, 0, 3]], (1, 0, 1, 0) + found.boxes * (-1, 1, -1, 1))
    assert found.kinds == mirrored.kinds == 2


@pytest.mark.parametrize(
    ("boxes", "pairs", "cells"),
    [
        ([], 0, 0),
        ([[0.4, 0.4, 0.6, 0.6]], 0, 1),
        ([[0.0, 0.0, 0.2, 0.2], [0.7, 0.0, 0.9, 0.2]], 1, 2),  # beside
        ([[0.0, 0.0, 0.2, 0.2], [0.0, 0.7, 0.2, 0.9]], 1, 2),  # above
        ([[0.0, 0.0, 0.2, 0.2], [0.7, 0.7, 0.9, 0.9]], 2, 2),  # both
        ([[0.0, 0.0, 0.2, 0.2], [0.25, 0.0, 0.3, 0.2]], 2, 1),  # beside and near
        ([[0.0, 0.0, 0.6, 0.6], [0.4, 0.4, 0.9, 0.9]], 1, 2),  # overlapping: near
        ([[0.0, 0.0, 0.6, 0.6], [0.1, 0.1, 0.2, 0.2]], 1, 1),  # within
        ([[0.0, 0.0, 0.0, 0.3]], 0, 1),  # without width
    ],
)
def test_relations_are_those_of_the_boxes(boxes, pairs, cells):
    assert find_relations(np.array(boxes, dtype=np.float64).reshape(-1, 4)) == (pairs, cells)


def test_different_figures_are_worth_more_than_equal_ones():
    image, draw = canvas()
    for place in range(9):
        x, y = 106 * (place % 3), 106 * (place // 3)
        draw.ellipse((x + 21, y + 21, x + 84, y + 84), fill="red")
    equal, different = score(image), score(figures(9))
    assert equal.evidence["subjects"] == {"from": "pixels", "count": 9, "kinds": 1}
    assert different.subjects > equal.subjects + 0.2


@pytest.mark.parametrize("ink", [("black", "white"), ("white", "black"), ("darkblue", "khaki")])
def test_every_line_of_text_adds(ink):
    found = [score(written(lines, ink=ink[0], ground=ink[1])) for lines in range(9)]
    texts = [density.text for density in found]
    assert texts[0] == 0
    assert all(before < after for before, after in pairwise(texts)), texts
    assert texts[-1] > 0.7
    assert found[-1].evidence["text"]["from"] == "strokes"


def test_text_on_a_picture_adds():
    image = photo("coffee.png")
    before = score(image)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, image.width, 150), fill="white")
    for place in range(4):
        draw.text((10, 10 + 34 * place), LINES[place], fill="black", font=ImageFont.load_default(22))
    assert score(image).text > before.text + 0.3


def test_figures_and_textures_are_not_text():
    for number in range(40):
        assert score(Image.open(FIGURES / f"{number}.png")).text < 0.1, number
    for count in range(10):
        assert score(figures(count)).text < 0.05


def test_pages_have_more_text_than_pictures():
    page = score(photo("page.png"))
    assert page.text > 0.8
    assert page.evidence["text"]["glyphs"] > 100
    pictures = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "horse.png", "moon.png", "coins.png"]
    textures = ["grass.png", "gravel.png", "brick.png"]
    others = {name: score(photo(name)).text for name in pictures + textures}
    assert max(others.values()) < 0.1, others


def test_pictures_are_denser_than_figures_and_textures_are_not():
    photos = [score(photo(name)) for name in ("astronaut.png", "coffee.png")]
    photos += [score(image) for image in load_sample_images().images[:1]]
    single = [score(Image.open(FIGURES / f"{number}.png")) for number in range(10)]
    assert all(0 < density.subjects < 0.35 for density in single), [density.axes for density in single]
    assert min(density.subjects for density in photos) > max(density.subjects for density in single) + 0.2
    noise = score(RANDOM.integers(0, 256, (512, 512, 3), dtype=np.uint8))
    assert noise.subjects < 0.3
    assert noise.text < 0.3


# --- what makes no difference ----------------------------------------------------------------------------------------

SEEN = ["astronaut.png", "coffee.png", "page.png", "coins.png", "rocket.jpg"]


@pytest.mark.parametrize("name", SEEN)
def test_mirrored_and_slightly_resized_images_score_alike(name):
    image = photo(name)
    whole = score(image)
    assert score(image) == whole
    mirrored = score(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert max(differences(whole, mirrored).values()) < 0.05, (whole, mirrored)
    for factor in (0.9, 1.1):
        size = round(image.width * factor), round(image.height * factor)
        resized = score(image.resize(size, Image.Resampling.BICUBIC))
        assert max(differences(whole, resized).values()) < 0.15, (factor, whole, resized)


def test_constructed_images_are_the_same_mirrored():
    for image in (figures(5), figures(9, side=512)):
        whole, mirrored = score(image), score(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        assert whole == mirrored


def test_an_array_and_an_image_in_other_modes_score_alike():
    image = figures(4)
    whole = score(image)
    assert score(np.asarray(image)) == whole
    assert score(image.convert("RGBA")) == whole
    assert score(np.asarray(image.convert("RGBA"))) == whole
    grey = image.convert("L")
    assert score(grey) == score(np.asarray(grey)) == score(np.asarray(grey)[:, :, None]) == score(grey.convert("RGB"))
    assert score(image.convert("P", palette=Image.Palette.ADAPTIVE)).evidence["subjects"]["count"] == 4
    strided = np.asarray(figures(4, side=640))[::2, ::2]
    assert score(strided) == score(strided.copy())


def test_what_is_transparent_shows_white():
    clear = np.asarray(figures(3).convert("RGBA")).copy()
    clear[:, :, 3] = 0
    assert score(clear).combined == 0
    ink = np.zeros((100, 100, 4), dtype=np.uint8)
    ink[30:70, 30:70, 3] = 255
    assert score(ink).evidence["subjects"]["count"] == 1


# --- any input -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(), (1,), (3,), (4,)])).flatmap(
        lambda shape: arrays.arrays(np.uint8, (shape[0], shape[1], *shape[2]))
    )
)
def test_any_image_has_scores_in_range(image):
    before = image.copy()
    found = score(image)
    assert all(0 <= getattr(found, axis) <= 1 for axis in (*AXES, "combined"))
    assert found == score(image)
    assert np.array_equal(image, before)
    assert Density.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), r"got float32 \[4, 4, 3\]"),
        (np.zeros((4, 4), dtype=bool), r"got bool \[4, 4\]"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"got uint8 \[4, 4, 2\]"),
        (np.zeros((3, 4, 4, 3), dtype=np.uint8), r"got uint8 \[3, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "1 to 268435456 pixels, got 4 x 0"),
        (np.broadcast_to(np.uint8(0), (2**15, 2**15)), "1 to 268435456 pixels, got 32768 x 32768"),
        ("a.png", "expected an array or a PIL image, got str"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image, message):
    with pytest.raises(DensityError, match=f"photo 7: .*{message}"):
        score(image, name="photo 7")


def test_a_truncated_file_is_refused_by_name(tmp_path):
    file = tmp_path / "half.png"
    file.write_bytes((PHOTOS / "coffee.png").read_bytes()[:20000])
    with Image.open(file) as image, pytest.raises(DensityError, match=r"half\.png: cannot be read \(.*truncated"):
        score(image, name=str(file))


# --- metadata --------------------------------------------------------------------------------------------------------


def test_knowledge_is_what_metadata_tells():
    image = figures(1)
    assert score(image).knowledge == 0
    assert score(image).evidence["knowledge"]["from"] == "nothing"
    steps = [
        {},
        {"categories": ["flag"]},
        {"categories": ["flag"], "names": ["France"]},
        {"categories": ["flag"], "names": ["France", "france "], "facts": {"capital": "Paris"}},
        {
            "categories": ["flag"],
            "names": ["France"],
            "facts": {"capital": "Paris", "code": "FR", "none": None, "e": ""},
        },
    ]
    found = [score(image, metadata) for metadata in steps]
    values = [density.knowledge for density in found]
    assert values[0] == 0
    assert all(before < after for before, after in pairwise(values))
    assert found[-1].evidence["knowledge"] == {"from": "metadata", "facts": 2, "names": 1, "categories": 1}
    assert all(density.subjects == found[0].subjects for density in found)


def test_known_objects_and_text_count_where_they_say_more():
    blank = Image.new("RGB", (100, 50), "white")
    objects = [{"label": "cat", "box": [0, 0, 20, 20]}, {"label": "dog", "box": [60, 10, 100, 50]}]
    found = score(blank, {"objects": objects, "text": ["Beware of the dog"]})
    assert found.evidence["subjects"] == {"from": "metadata", "count": 2, "kinds": 2}
    assert found.evidence["spatial"] == {"from": "metadata", "pairs": 1, "cells": 2}
    assert found.evidence["text"]["from"] == "metadata"
    assert found.evidence["text"]["characters"] == 14
    rich = figures(9)
    assert score(rich, {"objects": objects[:1], "text": []}).axes == score(rich).axes


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([], r"metadata: expected an object, got \[\]"),
        ({"facts": ["Paris"]}, r"metadata\.facts: expected names with values"),
        ({"facts": {1: "x"}}, r"metadata\.facts"),
        ({"names": "France"}, r"metadata\.names: expected a list of texts, got 'France'"),
        ({"text": [1]}, r"metadata\.text"),
        ({"objects": {}}, r"metadata\.objects: expected a list"),
        ({"objects": [{"label": "x"}]}, r"metadata\.objects\[0\]"),
        ({"objects": [{"label": "", "box": [0, 0, 1, 1]}]}, r"metadata\.objects\[0\]"),
        ({"objects": [{"label": "x", "box": [0, 0, float("nan"), 1]}]}, r"metadata\.objects\[0\]"),
        ({"objects": [{"label": "x", "box": [5, 0, 1, 1]}]}, r"metadata\.objects\[0\]"),
        ({"objects": [{"label": "x", "box": "0011"}]}, r"metadata\.objects\[0\]"),
    ],
)
def test_wrong_metadata_is_refused_by_name(metadata, message):
    with pytest.raises(DensityError, match=message):
        score(figures(1), metadata)


# --- readers ---------------------------------------------------------------------------------------------------------


def test_a_reader_takes_the_place_of_the_estimate():
    shown = []

    def read(image: np.ndarray) -> list[TextLine]:
        shown.append(image)
        return [TextLine("Hello world", 0.5, 0.1), TextLine("Hello 2", 1.0, 0.05), TextLine("--", 1.0, 0.01)]

    found = score(figures(1), ocr=read)
    assert shown[0].dtype == np.uint8
    assert shown[0].shape == (320, 320, 3)
    expected = {"from": "read", "lines": 3, "characters": 11.0, "words": 2.5, "area": 0.11}
    assert found.evidence["text"] == expected
    expected_score = 0.6 * -np.expm1(-11 / 80) + 0.2 * -np.expm1(-2.5 / 20) + 0.2 * -np.expm1(-1.1)
    assert found.text == pytest.approx(expected_score, abs=1e-6)
    with pytest.raises(DensityError, match="a confidence in"):
        score(figures(1), ocr=lambda image: [TextLine("x", float("nan"), 0.1)])


def test_the_packaged_models_read_text():
    pytest.importorskip("rapidocr_onnxruntime")
    reader = rapidocr()
    found = [score(written(lines, side=480, size=28), ocr=reader) for lines in (0, 1, 3)]
    texts = [density.text for density in found]
    assert texts[0] == 0
    assert texts[0] < texts[1] < texts[2]
    assert found[2].evidence["text"]["from"] == "rapidocr"
    assert found[1].evidence["text"]["characters"] == pytest.approx(25, abs=4)
    assert score(figures(4), ocr=reader).text < 0.1
    assert score(written(1, side=480, size=28), ocr=reader) == found[1]


# --- teachers --------------------------------------------------------------------------------------------------------


def told(**scores: object) -> str:
    return json.dumps({axis: {"score": scores.get(axis, 3), "evidence": f"some {axis}"} for axis in AXES})


def test_a_teacher_tells_scores():
    teacher = Scripted([told(text=10), f"```json\n{told(subjects=0)}\n```"])
    images = [figures(2), written(3, side=1600)]
    found = score_by_teacher(images, teacher, [{"facts": {"capital": "Paris"}}, None])
    assert [type(density) for density in found] == [Density, Density]
    assert found[0].axes == {"subjects": 0.3, "spatial": 0.3, "text": 1.0, "knowledge": 0.3}
    assert found[0].evidence["text"] == {"from": "teacher", "said": "some text"}
    assert found[1].evidence["scorer"] == "scripted"
    assert found[1].evidence["size"] == [1600, 1600]
    block, words = teacher.asked[0][1]["content"]
    head, _, data = block["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert np.array_equal(np.asarray(sent), np.asarray(images[0]))
    assert "Paris" in words["text"]
    assert "Known of the image" not in teacher.asked[1][1]["content"][1]["text"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("a lovely picture", "not JSON"),
        (told(text=11), r"\$.text.score: 11 is greater than the maximum of 10"),
        (told(text=-1), "less than the minimum"),
        (told(text=2.5), "not of type 'integer'"),
        (told(text="7"), "not of type 'integer'"),
        (told(text=True), "not of type 'integer'"),
        ('{"text": {"score": 1, "evidence": "x"}}', "required property"),
        (TeacherError("timed out after 60 s"), "no answer: timed out after 60 s"),
    ],
)
def test_a_teachers_garbage_leaves_an_image_unscored(answer, reason):
    found = score_by_teacher([figures(1), figures(2)], Scripted([answer, told()]), names=["a.png", "b.png"])
    assert isinstance(found[0], Unscored)
    assert found[0].name == "a.png"
    assert re.search(reason, found[0].reason), found[0].reason
    assert found[0].answer == (answer if isinstance(answer, str) else "")
    assert isinstance(found[1], Density)


def test_a_bad_image_is_not_sent_to_a_teacher():
    teacher = Scripted([told()])
    circular: dict[str, object] = {}
    circular["self"] = circular
    images = [np.zeros((2, 2), dtype=np.int32), figures(1), figures(2)]
    found = score_by_teacher(images, teacher, [None, None, circular], names=["a", "b", "c"])
    assert [type(density) for density in found] == [Unscored, Density, Unscored]
    assert len(teacher.asked) == 1
    with pytest.raises(ValueError, match="got 1 images, 2 names, 1 metadata"):
        score_by_teacher(images[:1], teacher, names=["a", "b"])
    with pytest.raises(RuntimeError, match="gave 0 answers to 1 requests"):
        score_by_teacher(images[1:2], Scripted([Reply("x")][:0]))


# --- densities, audits -----------------------------------------------------------------------------------------------


def test_the_combination_is_a_mean_that_grows_with_each_axis():
    axes = dict(zip(AXES, RANDOM.random(4), strict=True))
    whole = combine(axes)
    assert np.mean(list(axes.values())) <= whole <= max(axes.values())
    for axis in AXES:
        assert combine({**axes, axis: (axes[axis] + 1) / 2}) > whole
    assert combine(dict.fromkeys(AXES, 1.0)) == 1
    assert combine({**dict.fromkeys(AXES, 0.0), "text": 1.0}) == 0.5


def test_densities_out_of_range_are_refused():
    for value in (-0.1, 1.1, float("nan"), True, "0.5"):
        with pytest.raises(DensityError, match="text: expected a number in"):
            Density(0.1, 0.2, value, 0.3, 0.4)  # type: ignore[arg-type]
    for row in ({}, {"scores": {"text": 1}}, [], {"scores": None}):
        with pytest.raises(DensityError, match="scores: expected subjects"):
            Density.from_json(row)


def test_an_audit_says_what_was_counted_and_allotted(tmp_path):
    found = [score(figures(count)) for count in (0, 4, 9)]
    shares = allot(found, 20)
    rows = [audit(f"image {n}", density, share) for n, (density, share) in enumerate(zip(found, shares, strict=True))]
    write_audits(tmp_path / "audit.jsonl", rows)
    read = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [Density.from_json(row) for row in read] == found
    assert sum(row["allotted"]["questions"] for row in read) == 20
    assert read[2]["evidence"]["subjects"]["count"] == 9
    assert [file.name for file in tmp_path.iterdir()] == ["audit.jsonl"]
