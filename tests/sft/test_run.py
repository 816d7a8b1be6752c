"""`m4ov run curriculum`, whole and small: arms, models, report; what is done is not done again."""

from __future__ import annotations

import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console
from transformers import Qwen3VLForConditionalGeneration

from m4ov import config, curriculum
from m4ov.data import DataError
from m4ov.data.records import Record, assistant, image, user
from m4ov.data.shards import write_records
from m4ov.manifest import CurriculumConfig
from m4ov.train import RunFolderError, command

MANIFEST = """
task: curriculum
data: {image_size: 32, images_per_step: 6, questions_per_image: 1, held_out_digits: 30, shift: 2}
model:
  vision: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2, deepstack_layers: [0]}
  text: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 4, key_value_heads: 2, head_dim: 16}
train: {precision: fp32, log_every: 1}
evaluate: {limit: 20, examples: 2}
gates: {limit: 10}
pools: {general: easy-vqa, domain: digits, allotted: RECORDS, uniform: ""}
skills: {general: easy-vqa, domain: digits}
arms:
  start: {steps: 2, stages: {all: {mixture: {general: 1}, steps: 2}}}
  curriculum:
    start: start
    steps: 4
    stages:
      knowledge:
        mixture: {domain: 1}
        steps: 1
        rounds: 2
        guards: {general: {epsilon: 0.02, pool: general, replay: 0.3}}
      refine: {mixture: {domain: 1, general: 1}, steps: 1, freeze: [vision], lora: {rank: 2}, average: {kind: tail}}
  allotted: {start: start, steps: 1, stages: {all: {mixture: {allotted: 1}, steps: 1}}}
  uniform: {start: start, steps: 1, stages: {all: {mixture: {uniform: 1}, steps: 1}}}
"""


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Forty training and twenty test images of easy-vqa, some of them as records too."""
    root = Path(next(iter(find_spec("easy_vqa").submodule_search_locations))) / "data"
    for split, count in (("train", 40), ("test", 20)):
        folder = tmp_path / "easy" / split
        (folder / "images").mkdir(parents=True)
        rows = [row for row in json.loads((root / split / "questions.json").read_text()) if row[2] < count]
        (folder / "questions.json").write_text(json.dumps(rows))
        for number in {row[2] for row in rows}:
            shutil.copy(root / split / "images" / f"{number}.png", folder / "images")
    records = [
        Record(f"{number}", [user(image(f"easy/train/images/{number}.png"), "a question?"), assistant("an answer")])
        for number in range(8)
    ]
    write_records(records, tmp_path / "records.jsonl")
    file = tmp_path / "manifest.yaml"
    file.write_text(MANIFEST.replace("RECORDS", str(tmp_path / "records.jsonl")))
    return file


def load(manifest: Path, *overrides: str) -> CurriculumConfig:
    folder = manifest.parent
    return config.load(
        CurriculumConfig, manifest, [f"data.easy_vqa={folder / 'easy'}", f"run.folder={folder / 'runs'}", *overrides]
    )


def said(function, monkeypatch) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    monkeypatch.setattr(command, "Console", lambda quiet: console)
    function()
    return console.export_text()


def test_a_curriculum_from_data_to_report(manifest, monkeypatch):
    text = said(lambda: curriculum.run(load(manifest)), monkeypatch)
    assert "uniform is left out: pools.uniform names no data" in text
    assert "curriculum, stage 2 of 2: refine, up to 2 steps" in text
    home = manifest.parent / "runs"
    results = json.loads((home / "results.json").read_text())
    assert [(arm["arm"], arm["seed"], arm["steps"]) for arm in results["arms"]] == [
        ("start", 0, 2),
        ("curriculum", 0, 4),
        ("allotted", 0, 1),
    ]
    assert all(set(arm["shares"]) == {"general", "domain"} for arm in results["arms"])
    assert [claim["came out"] in ("yes", "no") for claim in results["claims"]] == [True] * len(results["claims"])
    assert [(row["name"], row["round"]) for row in results["decisions"]] == [
        *(("knowledge", 0), ("knowledge", 1), ("knowledge", 2)),
        *(("refine", 0), ("refine", 1), ("refine", 2)),
    ]
    page = (home / "report.html").read_text()
    for found in ("Arms", "Final figures", "Decisions of the curriculum", "Examples", "data wait"):
        assert found in page
    model = Qwen3VLForConditionalGeneration.from_pretrained(home / "seed-0" / "curriculum" / "model")
    assert not any("lora" in name for name, _ in model.named_parameters())
    stamps = {path: path.stat().st_mtime_ns for path in home.glob("seed-0/*/model/model.safetensors")}
    assert len(stamps) == 3
    again = said(lambda: curriculum.run(load(manifest)), monkeypatch)
    assert "stage" not in again
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    with pytest.raises(RunFolderError, match=r"arms\.allotted\.steps \(1 there, 3 now\)"):
        curriculum.run(load(manifest, "arms.allotted.steps=3"))


def test_data_that_is_not_there_is_named(manifest):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        curriculum.run(load(manifest, "pools.uniform=nothing.jsonl"))
