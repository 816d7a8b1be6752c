"""`m4ov data`: from a recipe to records and a report, stopped and gone on; and files of records checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from m4ov import allocator, cli
from m4ov.data.shards import read_records

FEW = [
    "sources.easy_vqa=8",
    "sources.scenes=2",
    "sources.digits=4",
    "sources.sheets=2",
    "sources.flags=4",
    "sources.photos=2",
    "allot.questions=88",
    "engine.shard_images=4",
    "parquet=true",
    "gallery=6",
]


def test_build_is_stopped_goes_on_and_its_records_are_valid(tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["data", "build", "data", f"run.folder={folder}", *FEW]
    keep = {name: value for name, value in os.environ.items() if name not in allocator.ENVIRONMENT}
    child = subprocess.Popen(
        [sys.executable, "-m", "m4ov", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=keep
    )
    end = time.monotonic() + 60
    while not list(folder.glob("steps/images/*.manifest.json")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    # CPython itself dies of the signal if the interrupt met an exec() of source text; a shell shows 130 for both.
    assert child.returncode in (130, -signal.SIGINT), errors
    assert errors.strip().startswith("m4ov data: stopped")
    assert "the same command goes on" in errors
    assert not list(folder.rglob(".*.writing"))

    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "are there)" in said  # what the first run made
    results = json.loads((folder / "results.json").read_text())
    records = list(read_records(folder / "records"))
    assert len(records) == results["counts"]["select"]["accepted"] > 20
    assert list(read_records(folder / "parquet")) == records
    page = (folder / "report.html").read_text()
    assert page.count("<figure>") == 6

    assert cli.main(command) == 0  # nothing is left to do
    assert "0 made in this run" in capsys.readouterr().out
    assert cli.main(["data", "validate", str(folder / "records"), "--labels", "--images", "decode"]) == 0
    broken = folder / "records" / "broken.jsonl"
    value = records[0].to_json()
    value["labels"]["topic"][-1] = "shapes.single.hexagon"
    broken.write_text(json.dumps(value) + "\n{\n")
    capsys.readouterr()
    assert cli.main(["data", "validate", str(broken), "--labels", "--json", str(tmp_path / "found.json")]) == 1
    problems = json.loads((tmp_path / "found.json").read_text())["problems"]
    assert {(problem["line"], problem["field"]) for problem in problems} == {(1, "labels.topic"), (2, "")}


def test_a_folder_is_one_run_s(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"task": "quickstart"}))
    assert cli.main(["data", "build", "data", f"run.folder={tmp_path}"]) == 2
    assert "holds a run with another task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "dta"], "did you mean data?"),
        (["build", "quickstart"], "has the task 'quickstart'; `m4ov data build` needs a recipe with task: data"),
        (["build", "data", "allot.question=3"], "unknown key allot.question; did you mean allot.questions?"),
        (["build", "data", "teacher.kind=http"], "teacher.base_url: expected the address of a server, got ''"),
        (["build", "data", "labels.extend=3"], "labels.extend: expected 0 with teacher.kind=embedded, got 3"),
        (["build", "data", "labels.topics=topcs", "run.folder={}"], "topcs: No such file or directory"),
        (["validate", "x.jsonl", "--images", "all"], "--images: expected no, header or decode; got all"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys, tmp_path):
    assert cli.main(["data", *(argument.format(tmp_path / "run") for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
