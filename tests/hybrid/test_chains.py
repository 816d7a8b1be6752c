"""Chains against what the sources say themselves: what stands in a grid is looked up, by its pixels, in their files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4ov.data import DataError
from m4ov.data.chains import KINDS, PLACES, STYLES, Chains, chains
from tests.hybrid.small import write_figures

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SIDE = 16  # of a place
SEED = int(os.environ["M4OV_TEST_SEED"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_figures(tmp_path_factory.mktemp("easy") / "data", train=60, test=60)


def made(folder: Path, part: str = "train", **changed) -> Chains:
    options = {"grids": 60, "questions": 3, "held_out_digits": 90, "split_seed": 1, "seed": SEED, **changed}
    return chains(part, 2 * SIDE, easy_vqa_folder=str(folder), **options)


def agrees(question: str, answer: str, colour: str, shape: str) -> bool:
    """Whether an answer of easy-vqa holds for a figure."""
    words = re.findall("[a-z]+", question)
    named = [word for word in words if word in COLOURS + SHAPES]
    if answer in ("yes", "no"):
        (word,) = named
        negated = "not" in words or words[:2] == ["is", "no"]
        return ((word in (colour, shape)) != negated) == (answer == "yes")
    return answer in (colour, shape) and set(named) <= {colour, shape}


def figures(folder: Path, part: str) -> dict[bytes, tuple[str, str]]:
    """Pixels → (colour, shape), of images where all that easy-vqa says of them leaves one."""
    told: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((folder / part / "questions.json").read_text()):
        told.setdefault(image, []).append((question, answer))
    known = {}
    for image, pairs in told.items():
        left = [(c, s) for c in COLOURS for s in SHAPES if all(agrees(*pair, c, s) for pair in pairs)]
        assert left, f"image {image}: no figure agrees with {pairs}"
        if len(left) == 1:
            with Image.open(folder / part / "images" / f"{image}.png") as picture:
                small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            assert known.setdefault(np.asarray(small).tobytes(), left[0]) == left[0]
    return known


def scans() -> dict[bytes, int]:
    """Pixels → digit."""
    from sklearn.datasets import load_digits

    known = {}
    for scan, label in zip(*load_digits(return_X_y=True), strict=True):
        ink = np.rint(255 - scan.reshape(8, 8) * (255 / 16)).astype(np.uint8)
        large = Image.fromarray(ink).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        assert known.setdefault(np.asarray(large).tobytes(), int(label)) == label
    return known


def places(grid: np.ndarray) -> dict[str, bytes]:
    """What stands where, as pixels; white places are left out."""
    cells = [grid[y : y + SIDE, x : x + SIDE] for y in (0, SIDE) for x in (0, SIDE)]
    return {place: cell.tobytes() for place, cell in zip(PLACES, cells, strict=True) if (cell < 255).any()}


def truth(question: str, stands: dict[str, tuple[str, str]] | dict[str, int]) -> str:
    """The answer, from what stands where."""
    if question == "What is the sum of the digits?":
        return str(sum(stands.values()))
    if question == "What is the largest digit minus the smallest?":
        return str(max(stands.values()) - min(stands.values()))
    if question == "Where is the largest digit?":
        (place,) = [place for place, digit in stands.items() if digit == max(stands.values())]
        return place
    shapes = Counter(shape for _, shape in stands.values())
    if found := re.fullmatch(r"How many shapes are (\w+) or a (\w+)\?", question):
        assert found[1] in COLOURS
        assert found[2] in SHAPES
        return str(sum(bool({found[1], found[2]} & set(figure)) for figure in stands.values()))
    if found := re.fullmatch(r"Which are there more of, (\w+)s or (\w+)s\?", question):
        one, other = shapes[found[1]], shapes[found[2]]
        return "neither" if one == other else f"{found[1 if one > other else 2]}s"
    found = re.fullmatch(r"Where is the only (\w+)\?", question)
    (place,) = [place for place, (_, shape) in stands.items() if shape == found[1]]
    return place


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_truth_is_that_of_the_sources(folder, part):
    known = {"figures": figures(folder, part), "scans": scans()}
    found = made(folder, part)
    asked: Counter[int] = Counter()
    for problem in found.problems:
        cells = places(found.images[problem.image])
        of = known["scans"] if problem.kind in ("sum", "difference", "largest") else known["figures"]
        stands = {place: of[pixels] for place, pixels in cells.items()}
        assert 2 <= len(stands) <= 4
        assert problem.truth == truth(problem.question, stands), problem
        check_spelled(problem, stands)
        asked[problem.image] += 1
    assert {problem.kind for problem in found.problems} == set(KINDS)
    assert set(asked) == set(range(60))
    assert max(asked.values()) == 3
    images = [problem.image for problem in found.problems]
    assert images == sorted(images)
    assert len({(problem.image, problem.question) for problem in found.problems}) == len(found.problems)


def check_spelled(problem, stands) -> None:
    """Every style ends in the truth; the steps of the long one are true, and begin with what stands where."""
    for spelled in problem.spelled:
        assert spelled.endswith(f"Answer: {problem.truth}")
    long, short, direct = problem.spelled
    assert direct == f"Answer: {problem.truth}"
    assert len(long) > len(short) > len(direct)
    read = ", ".join(f"{place} {what if isinstance(what, int) else ' '.join(what)}" for place, what in stands.items())
    assert long.startswith(f"{read}. ")
    steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", long)
    for left, sign, right, result in steps:
        assert int(left) + (int(right) if sign == "+" else -int(right)) == int(result)
    if problem.kind in ("sum", "difference"):
        assert steps[-1][-1] == problem.truth
        assert len(steps) == (len(stands) - 1 if problem.kind == "sum" else 1)
    if problem.kind == "count":
        hits = re.search(r"\. ([^.]*): \d+\. Answer", long)[1].split(", ")
        assert len(hits) == int(problem.truth)
        assert set(hits) <= set(stands)
    if problem.kind == "compare":
        counts = re.findall(r"(\w+)s (\d)[,.]", long)
        assert len(counts) == 2
        assert all(sum(shape == figure[1] for figure in stands.values()) == int(count) for shape, count in counts)


def test_no_scan_and_no_figure_is_in_both_parts(folder):
    digit = scans()
    seen = {}
    for part in ("train", "test"):
        images = made(folder, part, grids=200).images
        seen[part] = {pixels for grid in images for pixels in places(grid).values()}
        own = figures(folder, part)
        assert {pixels for pixels in seen[part] if pixels not in digit} <= own.keys()
    both = seen["train"] & seen["test"]
    assert not both & digit.keys()
    assert len(both) <= 2  # two images of easy-vqa may be equal, but not as many as if they were the same ones
    assert len(seen["train"] & digit.keys()) > 90
    assert 45 < len(seen["test"] & digit.keys()) <= 90


def test_chains_are_a_function_of_their_arguments(folder):
    one, again = made(folder, grids=20), made(folder, grids=20)
    assert one.problems == again.problems
    assert np.array_equal(one.images, again.images)
    other = made(folder, grids=20, seed=SEED + 1)
    assert other.problems != one.problems
    assert not np.array_equal(other.images, one.images)
    assert max(Counter(problem.image for problem in made(folder, grids=20, questions=1).problems).values()) == 1


def test_styles_are_drawn_with_their_shares(folder):
    found = made(folder)
    for place, style in enumerate(STYLES):
        split = found.split("chains", {style: 2.0}, seed=0)
        assert [sample.answer for sample in split.samples] == [problem.spelled[place] for problem in found.problems]
    split = found.split("chains", {"long": 1.0, "direct": 3.0}, seed=SEED)
    assert split == found.split("chains", {"long": 1.0, "direct": 3.0}, seed=SEED)
    styles = Counter(
        problem.spelled.index(sample.answer) for problem, sample in zip(found.problems, split.samples, strict=True)
    )
    assert set(styles) == {0, 2}
    assert 0.5 < styles[2] / len(found.problems) < 0.95
    assert [(s.image, s.question, s.kind) for s in split.samples] == [
        (p.image, p.question, p.kind) for p in found.problems
    ]


@pytest.mark.parametrize("shares", [{}, {"long": 0.0}, {"long": -1.0, "short": 2.0}, {"brief": 1.0}])
def test_styles_that_cannot_be_drawn_are_named(folder, shares):
    with pytest.raises(ValueError, match=r"styles: expected shares of long, short, direct, .*; got"):
        made(folder, grids=4).split("chains", shares, seed=0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"part": "dev"}, ValueError, "part: expected train or test, got 'dev'"),
        ({"grids": 0}, ValueError, "grids: expected at least 1, got 0"),
        ({"questions": 0}, ValueError, "questions: expected at least 1, got 0"),
        ({"part": "test", "held_out_digits": 3}, DataError, "digits: expected at least 4 test scans, got 3"),
    ],
)
def test_bad_arguments_are_named(folder, changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        made(folder, **changed)


@pytest.mark.parametrize("size", [0, 31])
def test_an_odd_size_is_refused(size):
    with pytest.raises(ValueError, match=f"size: expected an even number, at least 2, got {size}"):
        chains("train", size, grids=1, questions=1, held_out_digits=30)


def test_too_few_figures_are_named(tmp_path):
    folder = write_figures(tmp_path / "easy", train=3, test=3)
    with pytest.raises(DataError, match="easy-vqa: expected at least 4 train images whose colour and shape are told"):
        made(folder)
    (folder / "train" / "questions.json").unlink()
    with pytest.raises(DataError, match=r"questions\.json: No such file"):
        made(folder)
