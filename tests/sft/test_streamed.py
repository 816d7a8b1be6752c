"""`m4ov run sft`: from files of records to a model that transformers loads, as one run and as what it is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from m4ov import cli, sft_run
from m4ov.data import DataError, read_records
from m4ov.data.pretrained import FILES, reading_of
from m4ov.data.rows import RecordRows
from m4ov.evaluate.answers import answer_of, last_answers
from m4ov.models.qwen3_vl import from_pretrained
from m4ov.parallel.mesh import Layout
from m4ov.sft import lora, streamed
from m4ov.sft.parts import part_of
from m4ov.train import RunFolderError, World
from m4ov.train.metrics import read as read_metrics
from tests.sft import streamed_small as small
from tests.tiny_task import equal_states, quiet


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.write_data(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return small.write_checkpoint(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    """A new model, trained on some of the records, its weights averaged, and everything reported."""
    folder = tmp_path_factory.mktemp("runs") / "new"
    sft_run.run(small.config(folder, data, average__kind="ema", average__decay=0.5))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rows_of(made, folder: Path) -> RecordRows:
    """The held-out records of a run."""
    return streamed.prepare(made, folder, World(), quiet()).held_out


def mean_loss(model, rows: RecordRows) -> float:
    with torch.no_grad():
        found = [model.loss(rows.batch(row)[1]) for row in range(len(rows))]
    return sum(float(loss.total) for loss in found) / sum(loss.num_labels for loss in found)


def test_a_new_model_is_trained_measured_and_written(whole, data):
    numbers = json.loads((whole / "results.json").read_text())
    metrics = read_metrics(whole / "metrics.jsonl")
    assert numbers["steps"] == len(metrics) == small.STEPS
    assert 0.8 < numbers["fill"] <= 1
    assert numbers["fill"] == numbers["tokens"] / (small.STEPS * 4 * 128)
    waited, took = (sum(row[name] for row in metrics) for name in ("data_wait_seconds", "step_seconds"))
    assert numbers["data_wait"] == pytest.approx(waited / took)
    # Every record is on one side, and no image on both.
    sides = [list(read_records(whole / "data" / name, absolute=True)) for name in ("train", "held-out")]
    assert sorted(record.id for side in sides for record in side) == sorted(r.id for r in read_records(data))
    first = [{record.images[0] for record in side if record.images} for side in sides]
    assert not first[0] & first[1]
    held_out = numbers["held_out"]
    assert held_out["records"] == len(sides[1]) > 0
    assert [step for step, _ in held_out["loss"]] == [0, 2, 3]
    assert held_out["loss"][-1][1] < held_out["loss"][0][1]
    assert 0 < held_out["asked"] <= held_out["records"]
    page = (whole / "report.html").read_text()
    assert "Loss on the held-out records" in page
    assert page.count("<figure>") == 2


def test_what_is_written_is_what_was_measured(whole, data):
    """The model, read by us, has the last held-out loss, and so has transformers' class and the examples' answers."""
    made = small.config(whole, data, average__kind="ema", average__decay=0.5)
    rows = rows_of(made, whole)
    ours = from_pretrained(whole / "model").eval()
    numbers = json.loads((whole / "results.json").read_text())["held_out"]
    assert mean_loss(ours, rows) == pytest.approx(numbers["loss"][-1][1], rel=1e-5)
    theirs = AutoModelForImageTextToText.from_pretrained(whole / "model")
    assert equal_states(dict(theirs.named_parameters()), dict(ours.named_parameters()))
    found = last_answers(ours, rows, short=made.evaluate.short)
    assert found is not None
    assert (len(found.right), found.value) == (numbers["asked"], numbers["exact_match"])
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    place = next(n for n, made in enumerate(rows.made) if made.pictures)
    record, conversation = rows.records[place], rows.made[place]
    rendered = tokenizer.apply_chat_template(record.messages, tokenize=False)
    for count in conversation.tokens_of_image:
        rendered = rendered.replace("<|image_pad|>", "\0" * count, 1)
    assert tokenizer(rendered.replace("\0", "<|image_pad|>"))["input_ids"] == conversation.input_ids
    processor = Qwen2VLImageProcessorPil.from_pretrained(whole / "model")
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (1024, 4096)


def test_exact_match_is_of_the_last_answer(whole, data):
    """A model that is told what to say: right where the most likely tokens are the answer, and only there."""
    rows = rows_of(small.config(whole, data, average__kind="ema", average__decay=0.5), whole)
    assert answer_of([-100, -100, 5, 6, -100, 7, 8, -100]) == (5, 7)
    assert answer_of([-100, -100]) == (0, 0)
    model = from_pretrained(whole / "model").eval()
    found = last_answers(model, rows, short=1000)
    assert found is not None
    assert len(found.right) == len(rows.made)
    one = next(n for n, made in enumerate(rows.made) if len(made.pictures))
    begin, end = answer_of(rows.made[one].labels)
    batch = next(rows.batch(row) for row in range(len(rows)) if one in rows.rows[row])
    offset = int(batch[1].cu_seqlens[batch[0].index(one)])
    with torch.no_grad():
        said = model.lm_head(model(batch[1]).hidden_states)[offset + begin - 1 : offset + end - 1].argmax(-1)
    rows.made[one].labels[begin:end] = said.tolist()  # now that is the true answer
    again = last_answers(model, rows, short=1000)
    assert again is not None
    assert sum(again.right) == sum(found.right) + (said.tolist() != rows.made[one].input_ids[begin:end])
    assert last_answers(model, rows, short=0) is None


def test_the_same_command_finds_it_done(whole, data):
    before = weights_of(whole / "model")
    made = small.config(whole, data, average__kind="ema", average__decay=0.5)
    found = streamed.run(made, streamed.prepare(made, whole, World(), quiet()), Layout(), whole, quiet(), World())
    assert found.result.resumed_at == small.STEPS
    assert equal_states(weights_of(whole / "model"), before)
    with pytest.raises(RunFolderError, match=r"data\.capacity \(128 there, 256 now\)"):
        sft_run.run(small.config(whole, data, average__kind="ema", average__decay=0.5, data__capacity=256))


def test_a_checkpoint_keeps_what_is_frozen_and_its_own_files(checkpoint, data, tmp_path):
    made = small.config(tmp_path / "run", data, checkpoint, freeze=["vision", "embeddings"], evaluate__every=10)
    found = small.train(made)
    assert isinstance(found, streamed.Trained)
    before, after = weights_of(checkpoint), weights_of(tmp_path / "run" / "model")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        kept = part_of(name) in ("vision", "embeddings")
        assert torch.equal(weight, before[name]) == kept, name
        assert kept or torch.equal(weight, found.result.weights[name])
    there = [name for name in FILES if (checkpoint / name).is_file()]
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= set(there)
    for name in there:
        assert (tmp_path / "run" / "model" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert found.parameters[1] < found.parameters[0]


def test_adapters_are_merged_into_what_they_stood_beside(checkpoint, data, tmp_path):
    made = small.config(tmp_path / "run", data, checkpoint, lora__rank=2, lora__targets=["q_proj", "o_proj"])
    found = small.train(made)
    assert isinstance(found, streamed.Trained)
    assert all(".lora_" in name for name in found.result.weights)
    before, after = weights_of(checkpoint), weights_of(tmp_path / "run" / "model")
    factor = made.lora.alpha / made.lora.rank
    for name, weight in after.items():
        stem = name.removesuffix(".weight")
        if not stem.endswith(("q_proj", "o_proj")) or ".language_model." not in name:
            assert torch.equal(weight, before[name]), name
            continue
        down, up = (found.result.weights[f"{stem}.lora_{side}.default.weight"] for side in "AB")
        torch.testing.assert_close(weight, before[name] + factor * up @ down)
        assert not torch.equal(weight, before[name])
    model = from_pretrained(tmp_path / "run" / "model").eval()
    rows = rows_of(made, tmp_path / "run")
    assert mean_loss(model, rows) == pytest.approx(found.losses[-1][1], rel=1e-4)
    names = lora.targets(from_pretrained(checkpoint), made.lora, [])
    assert len(found.result.weights) == 2 * len(names)


def test_a_checkpoint_is_written_in_the_dtype_of_its_files(data, tmp_path):
    source = small.write_checkpoint(tmp_path / "half", dtype=torch.bfloat16)
    small.train(small.config(tmp_path / "run", data, source, train__steps=1, train__precision="bf16"))
    assert {weight.dtype for weight in weights_of(tmp_path / "run" / "model").values()} == {torch.bfloat16}
    made = small.config(tmp_path / "run", data, source, train__steps=1, train__precision="bf16", dtype="fp32")
    small.train(made)  # nothing is left to do but to write it
    assert {weight.dtype for weight in weights_of(tmp_path / "run" / "model").values()} == {torch.float32}


def test_the_command(data, tmp_path, capsys):
    overrides = ["train.steps=1", "data.capacity=128", "data.rows=1", "data.max_pixels=4096", "evaluate.examples=0"]
    sizes = ["model.text.layers=1", "model.vision.layers=2", "run.threads=1", "data.held_out_share=0.35"]
    command = ["run", "sft", f"data.train={data}", f"run.folder={tmp_path / 'run'}", *overrides, *sizes]
    assert cli.main(command) == 0
    assert "report: " in capsys.readouterr().out
    assert cli.main(["run", "sft"]) == 2
    assert "data.train: expected a file or folder of records, got ''" in capsys.readouterr().err


def test_other_formats_are_converted_once(data, tmp_path, checkpoint):
    source = small.sharegpt(tmp_path / "talks")
    made = small.config(tmp_path / "run", source, checkpoint, data__held_out=str(data), train__steps=1)
    small.train(made)
    assert len(list(read_records(tmp_path / "run" / "data" / "train"))) == 30
    assert not (tmp_path / "run" / "data-held-out").exists()  # these were records
    (shard,) = (tmp_path / "run" / "data" / "train").iterdir()
    times = shard.stat().st_mtime_ns
    streamed.prepare(made, tmp_path / "run", World(), quiet())
    assert shard.stat().st_mtime_ns == times
    file = source / "talks.json"
    file.write_text(file.read_text().replace("circle", "square"))
    with pytest.raises(DataError, match=r"^data\.train: .*talks: its contents changed since it was converted"):
        streamed.prepare(made, tmp_path / "run", World(), quiet())
    # Where nothing rests on it yet, it is converted again.
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "gone")
    streamed.prepare(made, tmp_path / "run", World(), quiet())
    said = [turn["content"][-1]["text"] for r in read_records(tmp_path / "run/data/train") for turn in r.messages]
    assert not any("circle" in words for words in said)


def test_the_chat_format_is_that_of_the_template(checkpoint, tmp_path):
    from m4ov.data import CHATML, PLAIN
    from tests.data.test_chat import QWEN

    assert reading_of(checkpoint).chat is PLAIN
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in FILES:
        if (checkpoint / name).is_file():
            (folder / name).write_bytes((checkpoint / name).read_bytes())
    (folder / "chat_template.jinja").write_text(QWEN)
    assert reading_of(folder).chat is CHATML
    (folder / "chat_template.jinja").write_text(QWEN.replace("<|im_end|>\n", "<|im_end|>"))
    with pytest.raises(DataError, match=r"its chat template is none that is known; it makes '<\|im_start\|>user"):
        reading_of(folder)
    assert reading_of(folder, "chatml").chat is CHATML
    (folder / "chat_template.jinja").unlink()
    assert reading_of(folder).chat is CHATML  # Qwen's, where nothing is said


def spoil(checkpoint: Path, folder: Path, what: str) -> Path:
    """A copy of a checkpoint with one thing wrong."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = folder / "preprocessor_config.json"
    if what == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what == "processor":
        settings.unlink()
    elif what == "patches":
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "patch_size": 16}))
    elif what == "vocabulary":
        words = json.loads((folder / "tokenizer.json").read_text())
        words["model"]["vocab"] |= {f"word{number}": 1000 + number for number in range(9)}
        (folder / "tokenizer.json").write_text(json.dumps(words))
    elif what == "ids":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "image_token_id": 7}))
    return folder


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("tokenizer", r"model\.path: .*expected a tokenizer \(tokenizer\.json\), got none"),
        ("processor", r"model\.path: .*expected an image processor \(preprocessor_config\.json\), got none that"),
        ("patches", r"model\.path: .*its processor has patch_size 16, its vision tower 8"),
        ("vocabulary", r"model\.path: .*its tokenizer has 1009 tokens, its model embeds \d+"),
        ("ids", r"model\.path: .*its configuration has image_token_id 7, its tokenizer <\|image_pad\|> as 6"),
    ],
)
def test_a_checkpoint_that_does_not_fit_itself(checkpoint, data, tmp_path, what, problem):
    folder = spoil(checkpoint, tmp_path / "model", what)
    with pytest.raises(ValueError, match=problem) as refused:
        sft_run.run(small.config(tmp_path / "run", data, folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data__train": "{0}/none"}, r"data\.train: .*/none: no such file or folder"),
        (
            {"data__train": "{0}/asked.jsonl", "data__held_out_share": 0.0},
            r"data\.train: .*none of its 20 can be used \(.*expected an answer",
        ),
        ({"data__train": "{0}/empty.jsonl"}, r"data\.train: .*empty"),
        ({"data__held_out": "{0}/empty.jsonl"}, r"data\.held_out: .*empty"),
        ({"data__held_out": "{0}/asked.jsonl"}, r"data\.held_out: .*none of its 20 can be used"),
        ({"data__held_out": "{1}/../{2}"}, r"data\.held_out: expected other records than those of data\.train"),
        ({"data__held_out_share": 1e-9}, r"data\.train: .*none is left for measuring \(a share of 1e-09\)"),
        ({"model__path": "{0}/none"}, r"model\.path: .*none: no such folder"),
        ({"data__max_pixels": 10**6}, r"data\.max_pixels: expected at most 28672: an image of 1000000 pixels has 3906"),
        ({"data__min_pixels": 8192, "data__max_pixels": 4096}, r"data\.min_pixels: expected at most 4096"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_trained(changes, problem, data, checkpoint, tmp_path):
    asked = [
        {"id": f"q{number}", "messages": [{"role": "user", "content": "?"}], "reward": {"a": 1}} for number in range(20)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "empty.jsonl").write_text("")
    filled = {n: v.format(tmp_path, data, data.name) if isinstance(v, str) else v for n, v in changes.items()}
    made = small.config(tmp_path / "run", data, checkpoint, **filled)
    with pytest.raises(ValueError, match=problem) as refused:
        sft_run.run(made)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "run.json").exists()  # the folder is free for the right arguments


def test_rows_are_a_multiple_of_the_ranks(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"data\.rows: expected a multiple of 3, the ranks .* \(layout dp3\); got 4"):
        sft_run.run(small.config(tmp_path, data))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lora__rank": 2, "parallel__tp": 2}, r"lora\.rank: expected 0 with parallel\.tp above 1"),
        ({"freeze": ["vison"]}, r"freeze: expected some of vision, merger, language, embeddings, got 'vison'"),
        ({"freeze": ["vision", "merger", "language", "embeddings"]}, r"freeze: expected something left to train"),
        ({"train__accumulate": 2}, r"train\.accumulate: expected 1"),
        ({"average__kind": "mean"}, r"average\.kind: expected none or ema or tail, got 'mean'"),
    ],
)
def test_a_recipe_that_cannot_be(changes, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        small.config(tmp_path, tmp_path, **changes)


#: All records are read before the first step.
ALL = {"data__held_out_share": 0.0, "data__rows": 8, "data__window": 8.0}


def test_broken_records_are_named_and_the_run_goes_on(data, checkpoint, tmp_path):
    folder = tmp_path / "spoilt"
    folder.mkdir()
    lines = (data / "records.jsonl").read_text().replace('"images/', f'"{data}/images/').splitlines()
    lines.insert(3, '{"id": ')
    lines.insert(
        5,
        json.dumps(
            {
                "id": "gone",
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": "gone.png"}, {"type": "text", "text": "?"}],
                    },
                    {"role": "assistant", "content": "!"},
                ],
            }
        ),
    )
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    made = small.config(tmp_path / "run", folder, checkpoint, train__steps=1, **ALL)
    sft_run.run(made)
    named = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {(row["line"], row["kind"]) for row in named} == {(4, "not JSON"), (6, "image")}
    numbers = json.loads((tmp_path / "run" / "results.json").read_text())
    assert numbers["quarantined"] == {"not JSON": 1, "image": 1}
    assert numbers["held_out"]["loss"] == []
    assert "Records that could not be used" in (tmp_path / "run" / "report.html").read_text()
