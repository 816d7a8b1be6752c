"""The benchmarks' files as questions, and what is made of verdicts: circles, categories, gain, leakage, intervals."""

from __future__ import annotations

from pathlib import Path

import pytest

from m4ov.data.pictures import image_bytes, load_image
from m4ov.data.records import RecordError
from m4ov.evaluate.asking import Asking, Said
from m4ov.evaluate.benchmarks import BENCHMARKS, find, mmstar
from m4ov.evaluate.benchmarks.base import Question
from m4ov.evaluate.intervals import Share, macro, micro
from m4ov.evaluate.scoring import outcome, score
from tests.evaluate import published


def test_mmbench_is_read_with_its_rotations(tmp_path):
    found = BENCHMARKS["mmbench"].read([published.write_mmbench(tmp_path / "MMBench_DEV_EN.tsv", 6)])
    assert len(found) == 2 * (2 + 3 + 4)
    by_id = {question.id: question for question in found}
    for place in range(6):
        data, digit = published.scans()[place]
        group = [question for question in found if question.group == str(place)]
        assert len(group) == 2 + place % 3
        for question in group:  # an index stands for the image of that row
            assert image_bytes(question.images[0], Path()) == data
            assert question.options[question.answer] == published.WORDS[digit]
            assert question.category == ("even" if digit % 2 == 0 else "odd")
        assert len({question.answer for question in group}) == len(group)
    assert by_id["1"].text == (
        'Hint: It is\tscanned,\nby "hand".\nQuestion: Which digit is it?\nOptions:\nA. one\nB. two\nC. three\n'
        "Please select the correct answer from the options above. \n"
    )
    assert load_image(by_id["1000001"].images[0], Path()).size == (64, 64)


def test_rotations_that_are_missing_are_made(tmp_path):
    """As the published ones: the same questions, up to the order of rows."""
    made = BENCHMARKS["mmbench"].read([published.write_mmbench(tmp_path / "a.tsv", 6, rotated=False)])
    there = BENCHMARKS["mmbench"].read([published.write_mmbench(tmp_path / "b.tsv", 6)])

    def plain(questions):
        return {(one.id, one.group, one.text, one.answer, tuple(one.options.items()), one.images) for one in questions}

    assert plain(made) == plain(there)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"image": {1_000_001: "77"}},
            "image: expected an image in base64 or the index of a row that has one, got '77'",
        ),
        ({"image": {1_000_001: "2000001"}}, "got '2000001'"),  # a reference to a reference
        ({"answer": {2: "D\tE"}}, "answer: expected one of A, B, C, D, got"),
        ({"answer": {1: ""}}, "answer: expected the truth; this split has none"),
        ({"A": {1: ""}}, "A: expected options A, B, … without a gap, got B, C"),
        ({"index": {1_000_001: 1}}, "index: '1' was there before"),
        ({"index": {2: "x"}}, "index: expected a number, got 'x'"),
        ({"question": {2: "nan"}}, "question: expected a text, got None"),
    ],
)
def test_a_row_of_mmbench_that_is_none(tmp_path, changed, message):
    path = published.write_mmbench(tmp_path / "dev.tsv", 3, **changed)
    with pytest.raises(RecordError, match=r"dev\.tsv, line \d+: ") as caught:
        BENCHMARKS["mmbench"].read([path])
    assert message in str(caught.value)


def test_a_tsv_that_is_torn(tmp_path):
    path = published.write_mmbench(tmp_path / "dev.tsv", 3)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(RecordError, match=r"expected 13 fields, got another number"):
        BENCHMARKS["mmbench"].read([path])


def test_mmstar_is_the_same_from_both_layouts(tmp_path):
    parquet = BENCHMARKS["mmstar"].read([published.write_mmstar(tmp_path / "mmstar.parquet", 8)])
    tsv = BENCHMARKS["mmstar"].read([published.write_mmstar_tsv(tmp_path / "MMStar.tsv", 8)])
    for one, other in zip(parquet, tsv, strict=True):
        assert (one.id, one.answer, one.options, one.category) == (
            other.id,
            other.answer,
            other.options,
            other.category,
        )
        assert image_bytes(one.images[0], Path()) == image_bytes(other.images[0], Path())
    assert parquet[0].text == "Which digit is it?\nOptions: A: zero, B: one, C: two, D: three"
    assert "Options:\nA. zero\nB. one\n" in tsv[0].text


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What?\nOptions: A: a, b, B: c: d, C: ratio B: C, D: none", ["a, b", "c: d", "ratio B: C", "none"]),
        ("Options?\nOptions:\nA: one\nB: two", ["one", "two"]),
        ("no options", []),
    ],
)
def test_options_inside_of_a_question(question, expected):
    assert list(mmstar.options_in(question).values()) == expected


def test_mathvista_is_read(tmp_path):
    found = BENCHMARKS["mathvista"].read([published.write_mathvista(tmp_path / "testmini.parquet", 4)])
    assert [question.kind for question in found] == ["option", "integer", "float", "list"]
    assert [question.answer for question in found] == ["zero", "1", "2.5", "[3, 3]"]
    assert found[0].options == {"A": "zero", "B": "one", "C": "two", "D": "three"}
    assert [question.precision for question in found] == [None, None, 1, None]
    assert type(found[2].precision) is int  # 1.0 in the file
    assert found[1].text.endswith("Question: Which digit is it? (integer)")
    assert image_bytes(found[3].images[0], Path()) == published.scans()[3][0]


def test_mathvision_is_the_same_from_both_layouts(tmp_path):
    parquet = BENCHMARKS["mathvision"].read([published.write_mathvision(tmp_path / "test.parquet", 4)])
    jsonl = BENCHMARKS["mathvision"].read([published.write_mathvision_jsonl(tmp_path / "repository", 4)])
    for one, other in zip(parquet, jsonl, strict=True):
        assert (one.id, one.text, one.answer, one.options) == (other.id, other.text, other.answer, other.options)
        assert image_bytes(one.images[0], one.folder) == image_bytes(other.images[0], other.folder)
    assert [question.kind for question in parquet] == ["option", "free"] * 2
    assert "\\boxed{}" in parquet[0].text
    assert "<image" not in parquet[0].text


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("mathvista", "answer", None, "answer: expected the truth; this split has none"),
        ("mathvista", "decoded_image", None, "decoded_image: expected the bytes of an image, got None"),
        ("mathvista", "answer_type", "colour", "answer_type: expected one of integer, float, list, got 'colour'"),
        ("mathvision", "answer", "H", "answer: expected one of A, B, C, D, got 'H'"),
        ("mathvision", "question", None, "question: expected a text, got None"),
        ("mmstar", "answer", "E", "answer: expected one of the options in the question (A, B, C, D), got 'E'"),
    ],
)
def test_a_row_of_a_parquet_file_that_is_none(tmp_path, name, field, value, message):
    rows = getattr(published, f"{name}_rows")(3)
    row = 1 if name == "mathvista" else 2
    rows[row][field] = value
    path = published.write_parquet(tmp_path / "x.parquet", rows)
    with pytest.raises(RecordError, match=rf"x\.parquet, line {row + 1}: ") as caught:
        BENCHMARKS[name].read([path])
    assert message in str(caught.value)


def test_files_are_found(tmp_path):
    data = tmp_path / "files"
    bench = published.write_mmbench(data / "MMBench_DEV_EN.tsv", 1)
    star = published.write_mmstar(data / "MMStar/mmstar.parquet", 1)
    for name in ("test-00000-of-00002", "test-00001-of-00002", "testmini-00000-of-00001-725687bf7a18d64b"):
        published.write_mathvista(data / f"MathVista/data/{name}.parquet", 1)
        published.write_mathvision(data / f"MathLLMs/MathVision/{name}.parquet", 1)
    found = {name: find(benchmark, data) for name, benchmark in BENCHMARKS.items()}
    assert (found["mmbench"], found["mmstar"]) == ([bench], [star])
    assert [path.name for path in found["mathvista"]] == ["testmini-00000-of-00001-725687bf7a18d64b.parquet"]
    assert [path.name for path in found["mathvision"]] == ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
    assert find(BENCHMARKS["mmstar"], bench) == [bench]  # a file is itself
    (data / "MathLLMs/MathVision/test-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="shard 00000 of 2 is missing"):
        find(BENCHMARKS["mathvision"], data)
    published.write_mmbench(data / "MMBench_TEST_EN.tsv", 1)
    assert find(BENCHMARKS["mmbench"], data) == [bench]
    published.write_mmbench(data / "MMBench_DEV_CN.tsv", 1)
    with pytest.raises(ValueError, match="mmbench: expected one table, got MMBench_DEV_CN"):
        find(BENCHMARKS["mmbench"], data)
    with pytest.raises(ValueError, match=r"mmstar: expected one of \*.tsv, \*.parquet whose path has mmstar in it"):
        find(BENCHMARKS["mmstar"], data / "MathVista")


def answered(benchmark, questions, answer) -> list:
    """Every question answered by a function, scored."""
    return score(benchmark, {Asking(one): Said(answer(one), "stop", 1) for one in questions})


def test_a_circle_is_right_if_every_rotation_is(tmp_path):
    """Who always says A is right on the questions as they stand, whose truth is A, and in no circle."""
    bench = BENCHMARKS["mmbench"]
    questions = bench.read([published.write_mmbench(tmp_path / "x.tsv", 6)])
    first = outcome(bench, answered(bench, questions, lambda one: "A")).shares
    assert (first["official", "vanilla"].value, first["official", "circular"].value) == (1.0, 0.0)
    truth = outcome(bench, answered(bench, questions, lambda one: one.answer)).shares
    assert {share.value for share in truth.values()} == {1.0}
    # One of the two questions of four options (2 and 5) fails once, in its third rotation.
    slip = outcome(bench, answered(bench, questions, lambda one: "" if one.id == "2000005" else f"({one.answer})"))
    assert slip.shares["official", "vanilla"] == Share(1.0, 6)
    assert slip.shares["official", "circular"] == Share(5 / 6, 6)
    assert slip.failures == {"no answer": {"official": 1, "VLMEvalKit": 1, "lmms-eval": 1}}


def test_circles_that_are_not_whole_are_told(tmp_path):
    bench = BENCHMARKS["mmbench"]
    questions = bench.read([published.write_mmbench(tmp_path / "x.tsv", 6)])
    assert outcome(bench, answered(bench, questions, lambda one: "A")).note == ""
    some = [question for question in questions if question.id not in ("1000004", "5")]
    found = outcome(bench, answered(bench, some, lambda one: "A"))
    assert found.note == "2 of 6 questions lack rotations; 1 have rotations alone"
    assert found.to_json()["note"] == found.note


def test_two_tools_differ_by_more_than_ten_points_on_mmstar(tmp_path):
    """lmms-eval#901: all questions alike, or all categories. 16 of one category right, 4 of another wrong."""
    bench = BENCHMARKS["mmstar"]
    questions = bench.read([published.write_mmstar(tmp_path / "x.parquet", 20)])
    shares = outcome(
        bench, answered(bench, questions, lambda one: one.answer if one.category.startswith("numeric") else "?")
    ).shares
    assert shares["official", ""].value == shares["VLMEvalKit", ""].value == 0.8
    assert shares["lmms-eval", ""].value == 0.5


def test_gain_and_leakage(tmp_path):
    bench = BENCHMARKS["mmstar"]
    questions = bench.read([published.write_mmstar(tmp_path / "x.parquet", 10)])

    def scored(right: int, blind: bool):
        answers = {}
        for place, question in enumerate(questions):
            wrong = "A" if question.answer != "A" else "B"
            answers[Asking(question, blind)] = Said(question.answer if place < right else wrong, "stop", 1)
        return score(bench, answers)

    both = [*scored(7, False), *scored(4, True)]
    found = outcome(bench, both, scored(1, True)).gains
    assert found["official"] == pytest.approx({"S_v": 0.7, "S_wv": 0.4, "MG": 0.3, "S_t": 0.1, "ML": 0.3})
    leaked = outcome(bench, both, scored(6, True)).gains["official"]
    assert leaked["ML"] == 0.0  # never below
    assert outcome(bench, both).gains["official"].keys() == {"S_v", "S_wv", "MG"}
    assert outcome(bench, scored(7, False)).gains == {}
    assert outcome(bench, both).questions == 10  # those without images count for nothing else
    with pytest.raises(ValueError, match="of the language model beneath to the same 10 questions, got 9"):
        outcome(bench, both, scored(1, True)[1:])


def test_rules_that_disagree_are_counted():
    question = Question("1", "?", (), "B", "option", options={"A": "a cat", "B": "a dog"}, group="1")
    bench = BENCHMARKS["mmbench"]
    found = outcome(bench, answered(bench, [question], lambda one: "A dog is what I see"))
    assert found.disagreements == 1
    assert {rule: share.value for (rule, metric), share in found.shares.items() if metric == "vanilla"} == {
        "official": 0.0,
        "VLMEvalKit": 1.0,
        "lmms-eval": 1.0,
    }


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (98, 100, 0.9300, 0.9945),
        (1, 1, 0.20655, 1.0),
    ],
)
def test_wilsons_interval(right, count, low, high):
    """Figures of Brown, Cai and DasGupta's formula by hand."""
    assert micro([True] * right + [False] * (count - right)).interval() == pytest.approx((low, high), abs=5e-5)


def test_a_mean_over_categories_rests_on_fewer_answers():
    """Two categories of 1 and 99 answers: as uncertain as 4/(1 + 1/99) answers; of equal sizes: as all of them."""
    assert macro({"a": [True], "b": [False] * 99}) == Share(0.5, pytest.approx(4 / (1 + 1 / 99)))
    assert macro({"a": [True, False], "b": [True, True]}) == Share(0.75, pytest.approx(4))
    with pytest.raises(ValueError, match="answers in every category"):
        macro({"a": [True], "b": []})
    with pytest.raises(ValueError, match="at least one answer"):
        micro([])
