"""Data production: four stages whose bytes do not depend on how often they were cut off, nor on who ran them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from m4ov.data.labels import check_labels
from m4ov.data.production import STEPS, BuildError, build, report
from m4ov.data.production.engines import RayEngine
from m4ov.data.production.steps import Result, Task, run
from m4ov.data.shards import WriteError, image_path, read_records
from m4ov.data_recipe import AllotConfig, EngineConfig
from tests.data.small_production import digest, recipe, rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that nothing disturbed: its folder, and what came out."""
    folder = tmp_path_factory.mktemp("made")
    return folder, build(recipe(folder))


# --- what comes out --------------------------------------------------------------------------------------------------


def test_records_are_whole_and_everything_is_accounted_for(made):
    folder, production = made
    records = list(read_records(production.records))
    assert len({record.id for record in records}) == len(records) == production.counts["select"]["accepted"] > 60
    for record in records:
        assert not check_labels(record)
        with Image.open(image_path(record.images[0], folder / "records")) as shown:
            assert shown.format == "PNG"
        assert record.max_pixels % 1024 == 0
    counts = production.counts
    assert counts["images"]["images"] == 40
    assert counts["allot"]["questions"] == 160 == counts["questions"]["candidates"] + counts["questions"]["missing"]
    rejected = Counter((row["stage"], row["reason"]) for row in rows(folder, "rejected.jsonl"))
    assert rejected == production.reasons
    of_quality = sum(count for (stage, _), count in rejected.items() if stage == "quality")
    assert counts["questions"]["candidates"] == len(records) + of_quality
    audits = rows(folder, "audit.jsonl")
    assert sum(audit["allotted"]["questions"] for audit in audits) == 160
    assert all(0 <= audit["scores"]["combined"] <= 1 for audit in audits)
    topics = {record.labels["topic"][0] for record in records}
    assert topics >= {"shapes", "scans", "world"}


def test_nobody_guesses_more_than_the_recipe_allows(made):
    _, production = made
    judged = production.counts["judge"]
    assert judged["guessed_after"] / judged["kept_blind"] <= 0.7
    assert judged["guessed_before"] / judged["judged_blind"] > judged["guessed_after"] / judged["kept_blind"]
    asked: dict[str, Counter] = {}
    for record in read_records(production.records):
        asked.setdefault(record.question, Counter())[record.answer] += 1
    for question, answers in asked.items():
        if sum(answers.values()) >= 4:
            assert max(answers.values()) / sum(answers.values()) <= 0.7, (question, answers)


def test_density_allots_more_to_denser_images_and_uniform_does_not(made, tmp_path):
    folder, _ = made
    audits = rows(folder, "audit.jsonl")
    order = sorted(audits, key=lambda audit: audit["scores"]["combined"])
    few, many = order[: len(order) // 4], order[-len(order) // 4 :]
    assert sum(a["allotted"]["questions"] for a in many) > 1.5 * sum(a["allotted"]["questions"] for a in few)
    assert sum(a["allotted"]["max_pixels"] for a in many) > sum(a["allotted"]["max_pixels"] for a in few)
    production = build(recipe(tmp_path, allot=AllotConfig(by="uniform", questions=160)))
    alike = rows(tmp_path, "audit.jsonl")
    assert production.counts["allot"]["questions"] == 160
    assert {a["allotted"]["questions"] for a in alike} == {4}
    assert len({a["allotted"]["max_pixels"] for a in alike}) == 1
    assert [a["scores"] for a in alike] == [a["scores"] for a in audits]


def test_the_report_shows_it(made):
    folder, production = made
    covered = report.write(production, recipe(folder), 1.0)
    page = (folder / "report.html").read_text()
    assert covered.records == production.counts["select"]["accepted"]
    for text in ("Stages", "Rejections", "Right without looking", "Information density", "Coverage", "Cost", "Samples"):
        assert f"<h2>{text}</h2>" in page
    assert page.count("<figure>") == 24
    assert page.count("data:image/svg+xml;base64,") == 3
    assert f"{production.counts['select']['accepted']:,} of {production.counts['questions']['candidates']:,}" in page
    (folder / "report.html").unlink()


def test_every_step_is_counted(made):
    left_out = ("balance", "rematch")  # labels.balance is 0
    assert list(made[1].counts) == [step for step in STEPS if step not in left_out]


# --- cut off, gone on ------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(made):
    folder, first = made
    before = digest(folder)
    again = build(recipe(folder))
    assert (again.made, again.before) == (0, first.made)
    assert digest(folder) == before
    assert again.to_json() == first.to_json()


def test_what_is_damaged_or_gone_is_made_again(made):
    folder, _ = made
    before = digest(folder)
    (folder / "steps/match/00001.manifest.json").unlink()
    shard = folder / "steps/questions/00002.candidates.jsonl"
    shard.write_bytes(shard.read_bytes()[:-40])
    (folder / "steps/check/00000.manifest.json").write_text("{")
    assert build(recipe(folder)).made == 3  # what stands on them is as it was, and so are its inputs
    assert digest(folder) == before


def test_a_change_makes_anew_what_depends_on_it(made, tmp_path):
    folder, _ = made
    other = dataclasses.replace(recipe(folder).quality, max_prior=0.9)
    shards = len(list((folder / "steps/select").glob("*.manifest.json")))
    before = digest(folder)
    changed = build(recipe(folder, quality=other))
    assert changed.made <= 1 + shards
    assert changed.counts["select"]["accepted"] > 0
    build(recipe(folder))
    assert digest(folder) == before


def test_an_interrupt_stops_between_shards_and_says_where(tmp_path, made):
    def interrupt(step, shards, done):
        if step == "match" and done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 7 shards of scores and labels of images"):
        build(recipe(tmp_path), interrupt)
    assert not list(tmp_path.rglob(".*.writing"))
    build(recipe(tmp_path))
    assert digest(tmp_path) == digest(made[0])


FORK = multiprocessing.get_context("forkserver")
# Children should begin to build at once, and not to import.
FORK.set_forkserver_preload(["m4ov.data.production", "sklearn.datasets", "imagehash", __name__])


def _build_in_child(config, most_bytes, said):
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        build(config)
    except WriteError as error:
        said.put(str(error))


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, made):
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
    for manifests in sorted(random.integers(1, 36, 2).tolist()):
        child = FORK.Process(target=_build_in_child, args=(recipe(tmp_path), 0, None))
        child.start()
        end = time.monotonic() + 60
        while child.is_alive() and len(list(tmp_path.glob("steps/*/*.manifest.json"))) < manifests:
            assert time.monotonic() < end
            time.sleep(0.002)
        child.kill()
        child.join()
    build(recipe(tmp_path))
    assert digest(tmp_path) == digest(made[0])


def test_a_disk_that_is_full_stops_the_run_and_leaves_nothing_half_written(tmp_path, made):
    """The operating system refuses to write past a limit, as it does on a full disk."""
    said = FORK.Queue()
    child = FORK.Process(target=_build_in_child, args=(recipe(tmp_path), 30_000, said))
    child.start()
    message = said.get(timeout=60)
    child.join()
    assert "cannot be written (File too large)" in message
    assert str(tmp_path) in message
    assert not list(tmp_path.rglob(".*.writing"))
    for manifest in tmp_path.glob("steps/*/*.manifest.json"):
        for name, sha in json.loads(manifest.read_text())["outputs"].items():
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sha
    build(recipe(tmp_path))
    assert digest(tmp_path) == digest(made[0])


# --- on Ray ----------------------------------------------------------------------------------------------------------


def _dies_once(task):
    """Half a file, and then the end, the first time."""
    mark = task.path("died")
    if task.index == 1 and not mark.exists():
        mark.touch()
        task.path(f"steps/{task.step}").mkdir(parents=True, exist_ok=True)
        task.path(f"steps/{task.step}/.00001.rows.jsonl.1.writing").write_text('{"half')
        os.kill(os.getpid(), signal.SIGKILL)
    return Result({"rows": [{"index": task.index}]}, {"rows": 1})


def _fails(task):
    raise BuildError(f"{task.name} cannot")


@pytest.fixture(scope="module")
def ray_engine():
    pytest.importorskip("ray")
    engine = RayEngine(EngineConfig(kind="ray", workers=2))
    yield engine
    engine.close()


def test_ray_makes_the_same_bytes(ray_engine, made, tmp_path):
    config = recipe(tmp_path, engine=EngineConfig(kind="ray", workers=2, shard_images=8))
    production = build(config)
    assert production.to_json() == made[1].to_json()
    assert digest(tmp_path) == digest(made[0])


def test_a_worker_that_is_killed_loses_nothing(ray_engine, tmp_path):
    tasks = [Task(str(tmp_path), "rows", index, _dies_once) for index in range(4)]
    done = sorted(ray_engine.map(tasks), key=lambda one: one.index)
    assert (tmp_path / "died").exists()
    assert [rows(tmp_path, name) for one in done for name in one.outputs] == [[{"index": index}] for index in range(4)]
    here = [run(Task(str(tmp_path / "here"), "rows", index, _dies_once)) for index in (0, 2, 3)]
    assert [one.outputs[f"steps/rows/{one.index:05d}.rows.jsonl"] for one in here] == [
        one.outputs[f"steps/rows/{one.index:05d}.rows.jsonl"] for one in done if one.index != 1
    ]


def test_an_error_of_a_worker_is_the_error_itself(ray_engine, tmp_path):
    with pytest.raises(BuildError, match="rows 0 cannot"):
        list(ray_engine.map([Task(str(tmp_path), "rows", 0, _fails)]))
