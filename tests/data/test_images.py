"""Images as Hugging Face's processor makes patches of them, and images that cannot be read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
from PIL import Image

from m4ov.data import DataError, ImageError, ImageGeometry, image_processor, patchify
from m4ov.data import easy_vqa as load
from m4ov.data.images import mirror, read_image, shift, to_square

PACKAGE = Path(easy_vqa.__file__).parent / "data"


@pytest.mark.parametrize(("size", "patch", "merge"), [(64, 8, 2), (32, 16, 1), (48, 4, 3)])
@pytest.mark.parametrize("shape", [(64, 64), (8, 8), (100, 100)])
def test_patches_equal_the_hugging_face_processor(size, patch, merge, shape):
    geometry = ImageGeometry(size, patch, merge)
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
    pictures = [Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)) for _ in range(3)]
    expected = image_processor(geometry)(pictures, return_tensors="np")
    got = patchify(np.stack([to_square(picture, size) for picture in pictures]), geometry)
    assert got.dtype == np.float32
    assert np.array_equal(got, expected["pixel_values"])
    assert expected["image_grid_thw"].tolist() == [list(geometry.grid_thw)] * 3


def test_patchify_refuses_other_images():
    geometry = ImageGeometry(64, 8, 2)
    with pytest.raises(ValueError, match=r"uint8 \[N, 64, 64, 3\]; got float32"):
        patchify(np.zeros((1, 64, 64, 3), dtype=np.float32), geometry)
    with pytest.raises(ValueError, match=r"got uint8 \[1, 32, 64, 3\]"):
        patchify(np.zeros((1, 32, 64, 3), dtype=np.uint8), geometry)
    with pytest.raises(ValueError, match="not a multiple"):
        ImageGeometry(60, 8, 2)


def test_shift_and_mirror_move_pixels():
    image = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    image[0, 3, 2] = 200
    moved = shift(image, np.array([[2, -1]]))
    assert moved[0, 5, 1].tolist() == [200] * 3
    assert moved.sum() == image.sum()
    assert mirror(image, np.array([True]))[0, 3, 5].tolist() == [200] * 3
    assert np.array_equal(mirror(image, np.array([False])), image)


@pytest.fixture
def folder(tmp_path):
    """Six images of easy-vqa with their questions, in the package's layout."""
    for split in ("train", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
        rows = [row for row in json.loads((PACKAGE / split / "questions.json").read_text()) if row[2] < 6]
        (tmp_path / split / "questions.json").write_text(json.dumps(rows))
        for number in range(6):
            shutil.copy(PACKAGE / split / "images" / f"{number}.png", tmp_path / split / "images")
    return tmp_path


def break_image(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("this is not an image")
    else:  # a flipped byte in the compressed pixels
        path.write_bytes(data[:-40] + bytes([data[-40] ^ 0xFF]) + data[-39:])


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "text", "corrupt"])
def test_a_bad_image_is_named_and_refused_or_skipped(folder, how):
    whole = load("train", 64, folder=str(folder))
    broken = folder / "train" / "images" / "3.png"
    break_image(broken, how)
    with pytest.raises(ImageError, match=r"3\.png"):
        read_image(broken)
    with pytest.raises(DataError, match=r"3\.png.*on_bad_image=skip"):
        load("train", 64, folder=str(folder))
    kept = load("train", 64, folder=str(folder), on_bad_image="skip")
    assert len(kept.images) == 5
    assert len(kept.left_out) == 1
    assert "3.png" in kept.left_out[0]
    expected = [sample for sample in whole.samples if sample.image != 3]
    assert [sample[1:] for sample in kept.samples] == [sample[1:] for sample in expected]
    for ours, theirs in zip(kept.samples, expected, strict=True):
        assert np.array_equal(kept.images[ours.image], whole.images[theirs.image])


def test_broken_questions_are_named(folder):
    questions = folder / "train" / "questions.json"
    questions.write_text("[[1, 2]")
    with pytest.raises(DataError, match=r"questions\.json.*not a list"):
        load("train", 64, folder=str(folder))
    questions.unlink()
    with pytest.raises(DataError, match=r"questions\.json: No such file"):
        load("train", 64, folder=str(folder))
    questions.write_text("[]")
    with pytest.raises(DataError, match="no question is left"):
        load("train", 64, folder=str(folder))
