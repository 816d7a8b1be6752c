"""`m4ov eval` from files to records, results and a report: the same twice, and the same when it was stopped."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from m4ov import cli, evaluation
from m4ov.data import ChatEncoder, encoder_of, patchify
from m4ov.data.pictures import to_uri
from m4ov.data.pretrained import reading_of
from m4ov.data.records import RecordError
from m4ov.data.tokenizer import prompt
from m4ov.evaluate.answered import AnswersError, keep, read
from m4ov.evaluate.asking import Asking, Said, prompt_of
from m4ov.evaluate.benchmarks import BENCHMARKS
from m4ov.evaluate.benchmarks.base import Question
from m4ov.sft.training import save_model
from tests.data.chat_server import ChatServer
from tests.evaluate import published
from tests.tiny_task import tiny_splits, tiny_task, weights_of

NAMES = ",".join(BENCHMARKS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A quickstart's model of random weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_model(tiny_task(), weights_of(tiny_task(), 0), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    published.write_mmbench(folder / "MMBench_DEV_EN.tsv", 3)
    published.write_mmstar(folder / "MMStar/mmstar.parquet", 6)
    published.write_mathvista(folder / "MathVista/data/testmini-00000-of-00001.parquet", 4)
    published.write_mathvision(folder / "MathVision/data/test-00000-of-00001.parquet", 4)
    return folder


def m4ov_eval(model: Path, data: Path, out: Path, *more: str) -> int:
    arguments = ["--traceback", "eval", str(model), "--data", str(data), "--out", str(out), "--threads", "1"]
    return cli.main([*arguments, "--max-tokens", "12", *more])


@pytest.fixture(scope="module")
def made(model, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "out"
    assert m4ov_eval(model, data, out, "--bench", NAMES) == 0
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_question_has_a_record_of_what_every_rule_makes_of_it(made, data):
    counts = {"mmbench": 9, "mmstar": 12, "mathvista": 4, "mathvision": 4}
    results = json.loads((made / "results.json").read_text())["benchmarks"]
    for name, bench in BENCHMARKS.items():
        found = rows(made / f"{name}.jsonl")
        assert len(found) == counts[name]
        for row in found:
            assert row["rules"].keys() == {"official", "VLMEvalKit", "lmms-eval"}
            assert 0 < row["tokens"] <= 12
            for one in row["rules"].values():
                assert (one["extracted"] is None) == (one["by"] == "nothing")
                assert not (one["extracted"] is None and one["right"])
            assert ("kind" in row) == any(one["extracted"] is None for one in row["rules"].values())
        seen = [row for row in found if row["with_image"]]
        assert results[name]["questions"] == len(seen)
        for rule in bench.rules:
            failed = sum(row["rules"][rule.name]["extracted"] is None for row in seen)
            assert failed == sum(kind[rule.name] for kind in results[name]["extraction_failures"].values())
        if name != "mmbench":
            right = sum(row["rules"]["official"]["right"] for row in seen)
            assert results[name]["rules"]["official"]["share"]["share"] == right / len(seen)
    assert results["mmstar"]["gain_and_leakage"]["official"].keys() == {"S_v", "S_wv", "MG"}
    assert {row["with_image"] for row in rows(made / "mmstar.jsonl")} == {True, False}
    page = (made / "report.html").read_text()
    for text in (
        "Scores by rule",
        "mmbench circular",
        "mmstar: answers of which nothing was extracted",
        "There was no judge",
    ):
        assert text in page


def test_an_answer_depends_on_its_image(made):
    """Random weights that are large enough see: with and without the picture something else is said."""
    by_id: dict[str, dict[bool, str]] = {}
    for row in rows(made / "mmstar.jsonl"):
        by_id.setdefault(row["id"], {})[row["with_image"]] = row["answer"]
    assert any(said[True] != said[False] for said in by_id.values())


def test_a_question_reaches_the_model_as_it_was_trained_on_questions(model):
    """The tokens and pixels of the quickstart's own encoder, of which its exact match is made."""
    split, encoder = tiny_splits()[1][0], encoder_of(model)
    reading = reading_of(model)
    other = ChatEncoder(reading.tokenizer, reading.pixels, reading.chat)
    for sample in split.samples[:20]:
        buffer = io.BytesIO()
        Image.fromarray(split.images[sample.image]).save(buffer, format="PNG")
        question = Question("1", sample.question, (to_uri(buffer.getvalue()),), sample.answer, "free")
        made = prompt_of(Asking(question), other, torch.float32)
        assert made.input_ids.tolist() == encoder.tokenizer.encode(prompt(sample.question, encoder.geometry.tokens)).ids
        pixels = patchify(split.images[sample.image][None], encoder.geometry)
        assert torch.equal(made.images[0].pixel_values, torch.from_numpy(pixels))
        blind = prompt_of(Asking(question, blind=True), other, torch.float32)
        assert not blind.images
        assert encoder.image_token not in blind.input_ids.tolist()


def test_stopped_and_begun_again_it_comes_to_the_same(made, model, data, tmp_path):
    """Other answers at a time, stopped in the middle of a line, then on to the end: to the bit what one go gives."""
    out = tmp_path / "out"
    assert m4ov_eval(model, data, out, "--bench", "mmbench,mmstar", "--limit", "2", "--batch", "1") == 0
    assert len(rows(out / "mmbench.jsonl")) < 9
    torn = out / "mmstar.answers.jsonl"
    torn.write_bytes(torn.read_bytes()[:-7])
    assert m4ov_eval(model, data, out, "--bench", "mmbench,mmstar", "--batch", "3") == 0
    for name in ("mmbench", "mmstar"):
        assert (out / f"{name}.jsonl").read_bytes() == (made / f"{name}.jsonl").read_bytes()
        assert len(rows(out / f"{name}.answers.jsonl")) == len(rows(made / f"{name}.answers.jsonl"))
    before = (out / "mmstar.answers.jsonl").read_bytes()
    assert m4ov_eval(model, data, out, "--bench", "mmstar") == 0  # nothing is left to ask
    assert (out / "mmstar.answers.jsonl").read_bytes() == before


def test_the_base_beneath_and_a_judge(made, model, data, tmp_path):
    """The answers of another run as the language model's beneath: of the same model, nothing leaks."""
    with ChatServer(lambda seen: "A") as server:
        judge = ["--judge", server.url, "--judge-model", "j", "--judge-prices", "1000000,0"]
        assert m4ov_eval(model, data, tmp_path / "out", "--bench", "mmstar", "--text-base", str(made), *judge) == 0
        asked = len(server.seen)
        found = json.loads((tmp_path / "out/results.json").read_text())["benchmarks"]["mmstar"]
        assert found["gain_and_leakage"]["official"]["ML"] == 0
        # A judge that always says A reads everything, for the rule that asks one; and is not asked twice.
        assert all(
            kind["VLMEvalKit"] == 0 for name, kind in found["extraction_failures"].items() if name != "no answer"
        )
        assert m4ov_eval(model, data, tmp_path / "out", "--bench", "mmstar", *judge) == 0
        assert len(server.seen) == asked > 0
    page = (tmp_path / "out/report.html").read_text()
    assert "Judge: j, asked" in page
    assert "its wording is ours" in page


def test_a_folder_with_other_answers_is_refused(made, model, data, tmp_path, capsys):
    with pytest.raises(OSError, match=r"holds a run with another max_tokens \(12 there, 9 now\).*--out DIR"):
        m4ov_eval(model, data, made, "--bench", "mmbench", "--max-tokens", "9")
    other = tmp_path / "files"
    published.write_mmbench(other / "mmbench.tsv", 2)
    with pytest.raises(OSError, match="holds a run with another data"):
        m4ov_eval(model, other, made, "--bench", "mmbench")
    changed = tmp_path / "model"
    shutil.copytree(model, changed)
    save_model(tiny_task(), weights_of(tiny_task(), 1), tmp_path / "another")
    shutil.copy(tmp_path / "another/model.safetensors", changed / "model.safetensors")
    with pytest.raises(OSError, match="holds a run with another model"):
        m4ov_eval(changed, data, made, "--bench", "mmbench")
    fewer = published.write_mmstar(tmp_path / "mmstar.parquet", 2)
    with pytest.raises(ValueError, match="expected a run on the same files"):
        m4ov_eval(model, fewer, tmp_path / "new", "--bench", "mmstar", "--text-base", str(made))


def test_a_question_that_cannot_be_asked_is_wrong_and_counted(model, tmp_path):
    """Longer than the model's window."""
    rows_of = published.mathvision_rows(2)
    rows_of[0]["question"] = "why? " * 5000
    path = published.write_parquet(tmp_path / "mathvision.parquet", rows_of)
    assert m4ov_eval(model, path, tmp_path / "out", "--bench", "mathvision") == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["benchmarks"]["mathvision"]
    assert (results["questions"], results["not_asked"]) == (2, 1)
    assert results["extraction_failures"]["not asked"] == {"official": 1, "VLMEvalKit": 1, "lmms-eval": 1}
    (row,) = [row for row in rows(tmp_path / "out/mathvision.jsonl") if row["id"] == "1"]
    assert "window" in row["problem"]


def test_an_image_that_is_none_is_named(model, tmp_path):
    rows_of = published.mathvision_rows(2)
    rows_of[1]["decoded_image"]["bytes"] = b"\x89PNG no image"
    path = published.write_parquet(tmp_path / "mathvision.parquet", rows_of)
    with pytest.raises(RecordError, match="not an image"):
        m4ov_eval(model, path, tmp_path / "out", "--bench", "mathvision")


def test_held_out_questions_beside_benchmarks(model, data, tmp_path):
    assert m4ov_eval(model, data, tmp_path / "out", "--bench", "quickstart,mathvision", "--limit", "3") == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["accuracy"].keys() == found["interval"].keys() == {"general", "domain"}
    assert found["benchmarks"]["mathvision"]["questions"] == 3
    records = rows(tmp_path / "out/quickstart.jsonl")
    assert len(records) == 6
    for split, share in found["accuracy"].items():
        right = [row["right"] for row in records if row["split"] == split]
        assert share == sum(right) / len(right)
        assert all(row["right"] == (row["answer"] == row["truth"]) for row in records if row["right"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--bench", "mmlu"],
            "--bench: expected one or more of quickstart, mmbench, mmstar, mathvista, mathvision; got mmlu",
        ),
        (["--bench", ""], "--bench: expected one or more"),
        (["--bench", "mmstar"], "--data: mmstar needs its files"),
        (["--bench", "mmstar", "--data", "nowhere"], "--data: nowhere: no such file or folder"),
        (["--judge", "http://x"], "--judge and --judge-model: expected both or neither"),
        (["--judge-prices", "1"], "--judge-prices: expected two numbers"),
        (["--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
        (["--cache-gib", "0"], "--cache-gib: expected more than 0"),
        (["--limit", "-1"], "--limit: expected at least 0, got -1"),
        (["--text-base", "nowhere"], "--text-base: nowhere: no such folder"),
        (
            ["--judge-key-env", "NO_SUCH_VARIABLE"],
            "--judge-key-env: the environment variable NO_SUCH_VARIABLE is not set",
        ),
    ],
)
def test_a_mistake_names_its_argument(model, arguments, message, capsys):
    assert cli.main(["eval", str(model), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_commands_benchmarks_are_the_packages():
    assert tuple(BENCHMARKS) == evaluation.BENCHMARKS


ASKINGS = [
    Asking(Question(name, "?", (), "A", "option", options={"A": "x"}), blind)
    for name in "ab"
    for blind in (False, True)
]


def test_answers_are_kept_as_they_come(tmp_path):
    path = tmp_path / "answers.jsonl"
    assert read(path, ASKINGS) == {}
    said = {asking: Said(f"é\n{place}", "stop", place) for place, asking in enumerate(ASKINGS)}
    stream = keep(path, iter(list(said.items())[:3]))
    next(stream)
    assert len(read(path, ASKINGS)) == 1  # before the second is asked
    assert len(list(stream)) == 2
    path.write_bytes(path.read_bytes() + b'{"id": "b", "with_im')
    assert read(path, ASKINGS) == dict(list(said.items())[:3])
    assert len(list(keep(path, iter(list(said.items())[3:])))) == 1
    assert read(path, ASKINGS) == said
    assert read(path, ASKINGS[:1]) == {ASKINGS[0]: said[ASKINGS[0]]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no", "line 2: not JSON"),
        ("[1]", "line 2: id: expected a str, got"),
        ('{"id": 1}', "line 2: id: expected a str, got 1"),
        ('{"id": "c", "with_image": true, "answer": "", "finish": "stop"}', "line 2: tokens: expected a int, got None"),
    ],
)
def test_a_line_of_answers_that_is_none(tmp_path, line, message):
    path = tmp_path / "answers.jsonl"
    list(keep(path, [(ASKINGS[0], Said("A", "stop", 1))]))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(AnswersError, match=message):
        read(path, ASKINGS)
    path.write_text(path.read_text().splitlines()[0] + "\n" + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(AnswersError, match="line 2: id: 'a' was answered before"):
        read(path, ASKINGS)
