"""`m4ov run quickstart`, whole and small: from images to the report, stopped anywhere, on many ranks."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from m4ov import quickstart
from m4ov.data import DataError, digits, easy_vqa, read_records
from m4ov.quickstart import data, flow
from m4ov.sft import stage
from m4ov.train import Interrupted, RunFolderError, command
from m4ov.train.metrics import read as read_metrics
from tests.quickstart.small import KEPT, digest, load


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    console = Console(record=True, width=200, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "Console", lambda quiet: console)
        quickstart.run(load(folder))
    return folder, console.export_text()


@pytest.fixture
def without_report(monkeypatch):
    """The report is not what is tested: it costs two processes."""
    monkeypatch.setattr(flow, "write", lambda *_: None)


def test_from_images_to_the_report(whole):
    folder, text = whole
    home = folder / "run"
    assert [row["name"] for row in decisions(home)] == ["knowledge"] * 3 + ["restore"] * 3 + ["refine"] * 2
    assert "quickstart, stage 3 of 3: refine, up to 2 steps" in text
    results = json.loads((home / "results.json").read_text())
    assert results["steps"] == 6
    assert set(results["accuracy"]) == {"general", "domain"}
    assert results["produced"]["counts"]["select"]["accepted"] > 200
    assert results["produced"]["seconds"] > 0
    page = (home / "report.html").read_text()
    for title in (
        "Stages",
        "Decisions of the stages",
        "Data: what each step made",
        "Data: records by topic",
        "Loss",
        "Reinforcement learning",
    ):
        assert f"<h2>{title}" in page, title
    assert "information density of the images" in page
    assert (home / "data" / "report.html").exists()
    steps = [row["step"] for file in sorted(home.glob("*/metrics.jsonl")) for row in read_metrics(file)]
    assert steps == [1, 2, 1, 2, 1, 2, 1, 2]
    assert results["reinforcement"]["steps"] == 2
    assert digest(home / "model", "*.safetensors") == digest(home / "reinforcement" / "model", "*.safetensors")
    assert digest(home / "model", "*.safetensors") != digest(home / "3-refine" / "model", "*.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(home / "model")
    saved = load_file(home / "model" / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


def decisions(home: Path) -> list[dict]:
    return [json.loads(line) for line in (home / "decisions.jsonl").read_text().splitlines()]


def test_what_is_held_out_is_in_no_pool_and_no_gate(whole):
    """Of the digits the recipe's own split; of easy-vqa the training images alone."""
    config = load(whole[0])
    material = quickstart.gather(config, Console(quiet=True))
    _, held_out = digits(64, held_out=30, split_seed=0)
    test = easy_vqa("test", 64)
    assert (material.tests["domain"].images == held_out.images).all()
    unseen = {image.tobytes() for split in (held_out, test) for image in split.images}
    seen = {name: {image.tobytes() for image in pool.split.images} for name, pool in material.pools.items()}
    gates = {name: {image.tobytes() for image in split.images} for name, split in material.gates.items()}
    for name in ("general", "domain"):
        assert len(gates[name]) > 5
        assert not (seen[name] & gates[name]), name
    # A training and a test image of easy-vqa may be equal, but not so many of them as if they were the same ones.
    assert not (seen["domain"] | gates["domain"]) & unseen
    assert len((seen["general"] | gates["general"]) & unseen) <= 1


def test_questions_are_asked_as_the_held_out_ones_are(whole):
    material = quickstart.gather(load(whole[0]), Console(quiet=True))
    pool = material.pools["general"]
    assert all(sample.question[0].islower() for sample in pool.split.samples)
    asked = {sample.question for sample in material.tests["general"].samples}
    own = sum(sample.question in asked for sample in pool.split.samples)
    assert own > 0.3 * len(pool.split.samples)
    kinds = {sample.kind for sample in pool.split.samples}
    assert {"shape", "colour", "yes/no, this shape", "yes/no, not this colour", "region"} <= kinds
    assert pool.flip
    assert not material.pools["domain"].flip


def test_what_is_done_is_not_done_again(whole, monkeypatch):
    home = whole[0] / "run"
    before = {file: file.stat().st_mtime_ns for file in home.glob("**/*") if file.is_file() and file.name != ".lock"}
    monkeypatch.setattr(
        flow, "write", lambda config, material, produced, end, policy, folder, console: seen.append(produced)
    )
    seen: list[data.Produced] = []
    quickstart.run(load(whole[0]))
    assert seen[0].seconds is None
    after = {file: file.stat().st_mtime_ns for file in home.glob("**/*") if file.is_file() and file.name != ".lock"}
    assert after == before


def test_stopped_in_production_and_in_a_stage_it_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch, without_report):
    class Interrupting(data.Progress):
        def watch(self, step: str, shards: int, done: int) -> None:
            if step == "match" and done == 2:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(data, "Progress", Interrupting)
        with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 4 shards of scores and labels of images"):
            quickstart.run(load(tmp_path))
    assert not (tmp_path / "run" / "data" / "records").exists()
    assert list((tmp_path / "run" / "data" / "steps" / "match").glob("*.manifest.json"))

    original, losses = stage.loss_of, 0  # of the process

    def stopping(*arguments, **options):
        nonlocal losses
        losses += 1
        if losses == 3:  # in the second stage
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(stage, "loss_of", stopping)
        with pytest.raises(Interrupted, match="stopped after step 1;"):
            quickstart.run(load(tmp_path))
    assert (tmp_path / "run" / "1-knowledge" / "stage.json").exists()
    assert not (tmp_path / "run" / "2-restore" / "stage.json").exists()
    quickstart.run(load(tmp_path))
    assert digest(tmp_path / "run", *KEPT) == digest(whole[0] / "run", *KEPT)


def test_a_run_with_another_recipe_or_other_records_is_refused(whole, tmp_path, without_report):
    home = tmp_path / "run"
    shutil.copytree(whole[0] / "run", home)
    with pytest.raises(RunFolderError, match=r"another stages\.refine\.steps \(2 there, 1 now\)"):
        quickstart.run(load(tmp_path, "stages.refine.steps=1"))
    with pytest.raises(RunFolderError, match=r"another production\.allot\.questions \(360 there, 30 now\)"):
        quickstart.run(load(tmp_path, "production.allot.questions=30"))
    assert digest(home, *KEPT) == digest(whole[0] / "run", *KEPT)
    # Records that are not as they were made are made again, and are the same; others of the same name are noticed.
    records = next((home / "data" / "records").iterdir())
    content = records.read_text()
    records.write_text(content.replace("yes", "no"))
    quickstart.run(load(tmp_path))
    assert records.read_text() == content
    (home / "data.json").write_text(json.dumps({"records": "0" * 64}))
    with pytest.raises(RunFolderError, match=r"another records \(0{64} there, [0-9a-f]{64} now\)"):
        quickstart.run(load(tmp_path))


def test_a_broken_image_is_named(tmp_path, without_report):
    from importlib.util import find_spec

    root = Path(next(iter(find_spec("easy_vqa").submodule_search_locations))) / "data"
    for split, count in (("train", 40), ("test", 20)):
        folder = tmp_path / "easy" / split
        (folder / "images").mkdir(parents=True)
        rows = [row for row in json.loads((root / split / "questions.json").read_text()) if row[2] < count]
        (folder / "questions.json").write_text(json.dumps(rows))
        for number in {row[2] for row in rows}:
            shutil.copy(root / split / "images" / f"{number}.png", folder / "images")
    broken = tmp_path / "easy" / "train" / "images" / "7.png"
    broken.write_bytes(broken.read_bytes()[:40])
    easy = f"data.easy_vqa={tmp_path / 'easy'}"
    with pytest.raises(DataError, match=r"7\.png.*; data\.on_bad_image=skip leaves such images out"):
        quickstart.run(load(tmp_path, easy))
    config = load(tmp_path, easy, "data.on_bad_image=skip")
    produced = quickstart.produce(config, Console(quiet=True))
    assert produced.production.reasons["images", "image"] == 1
    used = {record.meta["image_id"] for record in read_records(produced.production.records)}
    assert "easy_vqa-0007" not in used
    assert "easy_vqa-0008" in used


def test_under_torchrun_with_tensor_ranks(whole, tmp_path):
    """One rank makes the data, both train, and the model of the last stage is that of one process; the first alone goes
    on from there."""
    load(tmp_path)
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys\nfrom pathlib import Path\nfrom m4ov import quickstart\nfrom m4ov.quickstart import flow\n"
        "from tests.quickstart.small import load\n"
        "flow.write = lambda *_: None\nquickstart.run(load(Path(sys.argv[1]), 'parallel.tp=2'))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(worker), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stderr[-3000:]
    home, one = tmp_path / "run", whole[0] / "run"
    assert json.loads((home / "reinforcement" / "arm.json").read_text())["steps"] == 2
    assert digest(home, "data/records/*") == digest(one, "data/records/*")
    for row, expected in zip(decisions(home), decisions(one), strict=True):
        assert row["figures"] == expected["figures"]
        assert row["action"] == expected["action"]
    found, weights = (load_file(folder / "3-refine" / "model" / "model.safetensors") for folder in (home, one))
    for name, weight in weights.items():
        # AdamW divides gradients by their size, those of the keys' biases too, which are nothing but rounding.
        far = 1e-1 if name.endswith("attn.qkv.bias") else 1e-4
        assert (found[name] - weight).norm() <= far * weight.norm(), name
