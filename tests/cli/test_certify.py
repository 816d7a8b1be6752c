"""``m4ov certify``: files in, text, JSON and a picture out, and one line for each mistake."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from m4ov import cli
from m4ov_kernels.numerics import certify

LENGTHS = [7, 3, 12]


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    rollout = -torch.rand(sum(LENGTHS))
    return {
        "rollout": rollout,
        "train": (rollout + 0.2 * torch.randn(sum(LENGTHS))).clamp(max=0.0),
        "mask": (torch.rand(sum(LENGTHS)) < 0.7).long(),
        "token_types": (torch.rand(sum(LENGTHS)) < 0.2).long(),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0),
    }


def write(folder, kind, tensors):
    """The command's arguments."""
    if kind == "safetensors":
        save_file(
            {"logprobs": tensors["rollout"], "other": tensors["train"], "mask": tensors["mask"]},
            folder / "a.safetensors",
        )
        save_file({name: tensors[name] for name in ("token_types", "cu_seqlens")}, folder / "b.safetensors")
        a, b = f"{folder}/a.safetensors", f"{folder}/b.safetensors"
        return [a, f"{a}:other", "--mask", a, "--token-types", b, "--cu-seqlens", f"{b}:cu_seqlens"]
    if kind == "npy":
        for name, values in tensors.items():
            np.save(folder / f"{name}.npy", values.numpy())
        names = ("mask", "cu_seqlens", "token_types")
        options = [part for name in names for part in (f"--{name.replace('_', '-')}", f"{folder}/{name}.npy")]
        return [f"{folder}/rollout.npy", f"{folder}/train.npy", *options]
    parts = {name: values.split(LENGTHS) for name, values in tensors.items() if name != "cu_seqlens"}
    with (folder / "all.jsonl").open("w") as file:
        for row in range(len(LENGTHS)):
            record = {name: values[row].tolist() for name, values in parts.items()}
            file.write(json.dumps(record | {"logprobs": record["rollout"]}) + "\n")
    path = f"{folder}/all.jsonl"
    return [path, f"{path}:train", "--mask", path, "--token-types", f"{path}:token_types"]


@pytest.mark.parametrize("kind", ["safetensors", "npy", "jsonl"])
def test_round_trip(kind, tensors, tmp_path, capsys):
    arguments = write(tmp_path, kind, tensors)
    out = [tmp_path / "out" / name for name in ("c.json", "c.png")]
    options = ["--bins", "3", "--clip-low", "0.1", "--clip-high", "0.15"]
    assert cli.main(["certify", *arguments, *options, "--json", str(out[0]), "--plot", str(out[1])]) == 0
    values = {name: tensors[name] for name in ("mask", "token_types", "cu_seqlens")}
    expected = certify(tensors["rollout"], tensors["train"], **values, position_bins=3, clip_low=0.1, clip_high=0.15)
    assert capsys.readouterr().out == expected.text() + "\n"
    assert json.loads(out[0].read_text()) == json.loads(json.dumps(expected.as_json()))
    assert out[1].read_bytes().startswith(b"\x89PNG")


def test_identical_files(tensors, tmp_path, capsys):
    arguments = write(tmp_path, "npy", tensors)
    assert cli.main(["certify", arguments[0], arguments[0], "--at-most", "0"]) == 0
    assert capsys.readouterr().out.startswith("identical in all 22 tokens of 1 sequence\n")


def test_at_most_is_the_exit_status(tensors, tmp_path, capsys):
    rollout, train, *_ = write(tmp_path, "npy", tensors)
    largest = float((tensors["train"].double() - tensors["rollout"].double()).abs().max())
    for limit, status in ((largest, 0), (largest * 0.999, 1)):
        assert cli.main(["certify", rollout, train, "--at-most", str(limit)]) == status
    tensors["train"][3] = float("nan")
    np.save(train, tensors["train"].numpy())
    assert cli.main(["certify", rollout, train, "--at-most", "100"]) == 1
    assert cli.main(["certify", rollout, train]) == 0
    np.save(train, np.zeros(0, np.float32))
    assert cli.main(["certify", train, train, "--at-most", "100"]) == 1


def test_null_is_a_nan_that_is_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"logprobs": [null, -1.0, -2.5]}\n\n{"logprobs": []}\n{"logprobs": [-1]}\n')
    assert cli.main(["certify", f"{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("NaN in 1 token of rollout and 1 token of training, first in sequence 0, token 0")
    assert "identical in all 3 tokens of 2 sequences" in out


MISTAKES = {
    "missing": (["a.npy", "none.npy"], "none.npy: no such file"),
    "kind": (["a.npy", "a.pt"], "a.pt: expected a file of .safetensors, .npy, .jsonl"),
    "tensor": (["a.safetensors", "a.safetensors:x"], "a.safetensors: no tensor 'x'; it has logprobs, long"),
    "field": (["a.jsonl", "a.jsonl:x"], "a.jsonl, line 1: no field 'x'; it has logprobs, text"),
    "no list": (["a.jsonl", "a.jsonl:text"], "a.jsonl: field 'text' must be a list of numbers in every line"),
    "not json": (["a.jsonl", "broken.jsonl"], "broken.jsonl, line 2: not JSON"),
    "not npy": (["a.npy", "broken.npy"], "broken.npy: not a .npy file of numbers"),
    "not safetensors": (["a.npy", "broken.safetensors"], "broken.safetensors: not a .safetensors file"),
    "sequences": (["a.jsonl", "short.jsonl"], "a.jsonl has 2 sequences, short.jsonl has 1"),
    "lengths": (["a.jsonl", "other.jsonl"], "sequence 1 has 1 tokens in a.jsonl, 2 in other.jsonl"),
    "shapes": (["a.npy", "a.safetensors:long"], "train_logprobs must be [3], as rollout_logprobs; got [4]"),
    "twice": (["a.jsonl", "a.jsonl", "--cu-seqlens", "a.npy"], "--cu-seqlens: a.jsonl has a sequence a line already"),
    "mask": (["a.npy", "a.npy", "--mask", "a.npy"], "mask must be an int64"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", -np.ones(3, np.float32))
    save_file({"logprobs": -torch.ones(3), "long": -torch.ones(4)}, "a.safetensors")
    for name, lines in {
        "a": ['{"logprobs": [-1, -2], "text": "a"}', '{"logprobs": [-1], "text": "b"}'],
        "short": ['{"logprobs": [-1, -2]}'],
        "other": ['{"logprobs": [-1, -2]}', '{"logprobs": [-1, -2]}'],
        "broken": ['{"logprobs": [-1, -2]}', "{"],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    for suffix in ("npy", "safetensors"):
        (tmp_path / f"broken.{suffix}").write_bytes(b"no such thing")
    (tmp_path / "a.pt").write_bytes(b"")
    arguments, message = MISTAKES[mistake]
    assert cli.main(["certify", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("m4ov certify: ")
    assert captured.err.count("\n") == 1
