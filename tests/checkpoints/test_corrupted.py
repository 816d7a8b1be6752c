"""Files that are cut off, contradict themselves or their index, or hide what they are: errors that name file and
tensor, and no other kind of error, whatever the bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from m4ov import cli
from m4ov.checkpoints import inspect, open_checkpoint, verify
from m4ov.models.sharded import WeightsError
from m4ov_kernels.gemm.weights import Int4Weight
from tests.checkpoints import small

NAME = f"{small.TEXT}.0.mlp.down_proj"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def make(tmp_path):
    """A sound checkpoint, in one file or two."""

    def made(shards: int = 1, format: str = "awq") -> Path:
        weight = Int4Weight.quantize(small.linear(16, 64).half(), group_size=32)
        plain = {"model.language_model.norm.weight": torch.ones(64).bfloat16(), "lm_head.weight": small.linear(9, 64)}
        folder = small.write(tmp_path / "model", {NAME: weight}, format, plain, shards=shards)
        assert verify(open_checkpoint(folder)).ok
        return folder

    return made


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, header: dict | str, values: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def entry(change):
    """Change what the header says of the scales."""

    def apply(folder: Path) -> None:
        header, values = header_of(folder / FILE)
        change(header[f"{NAME}.scales"])
        with_header(folder / FILE, header, values)

    return apply


def bytes_of(change):
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def twice(folder: Path) -> None:
    header, values = header_of(folder / FILE)
    text = json.dumps(header)
    with_header(folder / FILE, text[:-1] + f', "{NAME}.scales": {{}}}}', values)


def shifted(folder: Path) -> None:
    header, values = header_of(folder / FILE)
    for value in header.values():
        if "data_offsets" in value:
            value["data_offsets"] = [offset + 8 for offset in value["data_offsets"]]
    with_header(folder / FILE, header, values + bytes(8))


HEADERS = {
    "empty": (bytes_of(lambda data: b""), "nothing of a header in a file of 0"),
    "cut in the length": (bytes_of(lambda data: data[:5]), "nothing of a header in a file of 5"),
    "cut in the header": (bytes_of(lambda data: data[:50]), "a header of .* bytes in a file of 50: it is cut off"),
    "cut in the values": (bytes_of(lambda data: data[:-1]), r"\S+: data_offsets: .*is it cut off"),
    "a length of everything": (bytes_of(lambda data: b"\xff" * 8 + data[8:]), "a header of 18446744073709551615 bytes"),
    "not JSON": (bytes_of(lambda data: data[:8] + b"(" + data[9:]), "its header: Expecting value"),
    "not UTF-8": (bytes_of(lambda data: data[:10] + b"\xff" + data[11:]), "its header: 'utf-8' codec"),
    "nested without end": (
        lambda folder: with_header(folder / FILE, '{"a":' + "[" * 100_000, b""),
        "its header: .*(recursion|Expecting)",
    ),
    "a list": (lambda folder: with_header(folder / FILE, "[]", b""), "its header: expected an object, got list"),
    "more behind": (bytes_of(lambda data: data + b"more"), "4 bytes behind the last tensor"),
    "a tensor twice": (twice, rf"tensor {NAME}\.scales is there twice"),
    "a hole": (shifted, r"\S+: expected its values to begin at byte 0, got 8"),
    "an unknown dtype": (entry(lambda e: e.update(dtype="F7")), rf"{NAME}\.scales: dtype: expected one of .*got 'F7'"),
    "a wrong dtype": (
        entry(lambda e: e.update(dtype="F32")),
        rf"{NAME}\.scales: data_offsets: expected 128 bytes for F",
    ),
    "a wrong shape": (entry(lambda e: e.update(shape=[3, 16])), rf"{NAME}\.scales: data_offsets: expected 96 bytes"),
    "a negative size": (entry(lambda e: e.update(shape=[-2, 16])), rf"{NAME}\.scales: shape: expected a list of sizes"),
    "no shape": (entry(lambda e: e.pop("shape")), rf"{NAME}\.scales: shape: expected a list of sizes, got None"),
    "offsets of another kind": (
        entry(lambda e: e.update(data_offsets="0")),
        rf"{NAME}\.scales: data_offsets: expected \[",
    ),
    "offsets past the end": (
        entry(lambda e: e.update(data_offsets=[10**9, 10**9 + 64])),
        rf"{NAME}\.scales: data_offsets: expected inside",
    ),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_damaged_file_is_named_and_its_tensor(fault, make):
    folder = make()
    breaks, message = HEADERS[fault]
    breaks(folder)
    with pytest.raises(WeightsError, match=rf"model/{FILE}: cannot be read as a safetensors file \(.*{message}"):
        open_checkpoint(folder)


def index(change):
    return lambda folder: small.edit(folder, lambda content: change(content["weight_map"]), INDEX)


def copied(folder: Path) -> None:
    """A tensor in both files, of which the index names one."""
    first, second = sorted(folder.glob("*.safetensors"))
    save_file(load_file(second) | load_file(first), second)


def index_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    first = next(iter(json.loads(text)["weight_map"]))
    (folder / INDEX).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{first}": "model-00002-of-00002.safetensors", ')
    )


INDICES = {
    "a file is missing": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        r"model: model-00002-of-00002.safetensors of 2 shards missing; .*says that \S+ is in model-00002",
    ),
    "a tensor is in two files": (
        copied,
        r"00002-of-00002.safetensors: .* there; .*does not say so: it says that \S+ is in",
    ),
    "a tensor is named twice": (index_twice, r"index.json: not an index .*tensor \S+ is there twice"),
    "a path leads out": (
        index(lambda names: names.update({f"{NAME}.scales": "../secret.safetensors"})),
        r"index.json: expected names of files in this folder .*got '../secret.safetensors' for \S+scales",
    ),
    "a path from the root": (
        index(lambda names: names.update({f"{NAME}.scales": "/etc/secret.safetensors"})),
        r"got '/etc/secret.safetensors' for \S+scales",
    ),
    "a pickle in the index": (
        index(lambda names: names.update({f"{NAME}.scales": "pytorch_model.bin"})),
        r"end in .safetensors, got 'pytorch_model.bin' for \S+scales",
    ),
    "a tensor that is nowhere": (
        index(lambda names: names.update(more=sorted(names.values())[0])),
        r"more missing; .*index",
    ),
    "a tensor that it leaves out": (
        index(lambda names: names.pop(f"{NAME}.scales")),
        r"scales there; .*does not say so",
    ),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "not an index of safetensors files .KeyError"),
    "numbers": (index(lambda names: names.update(more=3)), "not an index of safetensors files .TypeError"),
}


@pytest.mark.parametrize("fault", INDICES)
def test_an_index_that_is_wrong_is_named_and_its_tensor(fault, make):
    folder = make(shards=2)
    breaks, message = INDICES[fault]
    breaks(folder)
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(folder)


def tensors(change):
    def apply(folder: Path) -> None:
        found = small.load(folder)
        change(found)
        small.store(folder, found)

    return apply


def settings_of(**changes):
    return lambda folder: small.edit(folder, lambda config: config["quantization_config"].update(changes))


def narrow(found) -> None:
    found[f"{NAME}.scales"] = found[f"{NAME}.scales"][:1]


def poisoned(found) -> None:
    found[f"{NAME}.scales"][1, 3] = float("nan")


WEIGHTS = {
    "a missing scale": (
        tensors(lambda found: found.pop(f"{NAME}.scales")),
        rf"{FILE}: awq: {NAME}\.scales must be .*no such",
    ),
    "a scale of another dtype": (
        tensors(lambda found: found.update({f"{NAME}.scales": torch.ones(2, 16, dtype=torch.int32)})),
        rf"{FILE}: awq: {NAME}\.scales must be .*got int32 tensor",
    ),
    "a scale of another shape": (
        tensors(narrow),
        rf"{FILE}: awq: {NAME}\.scales must be .*got float16 tensor \[1, 16\]",
    ),
    "NaN in a scale": (tensors(poisoned), rf"{FILE}: awq: {NAME}\.scales must be finite; got 1 NaN"),
    "a wrong group size": (settings_of(group_size=64), rf"{FILE}: awq: {NAME}\.qzeros must be .*\[1, 2\]"),
    "a group size of nothing": (settings_of(group_size=0), r"awq: config\['group_size'\] must be one of 32, 64, 128"),
    "another width": (settings_of(bits=3), r"awq: config\['bits'\] must be one of 4; got 3"),
    "another method": (settings_of(quant_method="aqlm"), r"quant_method'\] must be one of 'awq'"),
    "no configuration": (
        lambda folder: small.edit(folder, lambda config: config.pop("quantization_config")),
        rf"{FILE}: {NAME}\.\S+ is int32.*has no configuration of a quantisation",
    ),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_a_weight_that_is_wrong_is_an_error_of_all_three_commands(fault, make, tmp_path, capsys):
    folder = make()
    breaks, message = WEIGHTS[fault]
    breaks(folder)
    checkpoint = open_checkpoint(folder)
    report = inspect(checkpoint)
    assert not report.ok
    with pytest.raises(WeightsError, match=message):
        checkpoint.read(NAME)
    errors = [finding.message for finding in report.findings if finding.level == "error"]
    assert any(NAME in error for error in errors), errors
    rows = {row.name: row for row in verify(checkpoint).rows}
    assert rows[NAME].verdict == "damaged"
    assert cli.main(["checkpoint", "verify", str(folder)]) == 1
    assert cli.main(["checkpoint", "inspect", str(folder)]) == 1
    assert cli.main(["checkpoint", "convert", str(folder), "--to", "gptq", "--out", str(tmp_path / "out")]) == 2
    assert "m4ov checkpoint: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_not_finite_is_found_in_plain_tensors_too(make):
    folder = make()
    tensors(lambda found: found["lm_head.weight"][2].fill_(float("inf")))(folder)
    row = next(row for row in verify(open_checkpoint(folder)).rows if row.name == "lm_head.weight")
    assert (row.verdict, row.detail) == ("not finite", "64 values are NaN or infinite")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_a_pickle_is_refused_by_name_and_never_opened(name, tmp_path, capsys):
    class Armed:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"lm_head.weight": torch.ones(3, 3), "armed": Armed()}, folder / name)
    (folder / "config.json").write_text("{}")
    for path in (folder, folder / name):
        assert cli.main(["checkpoint", "inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert f"{folder / name}: a pickle" in error
        assert "safetensors" in error
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_safetensors_is_said_and_not_copied(make, tmp_path, capsys):
    folder = make()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert any("pytorch_model.bin" in note for note in open_checkpoint(folder).notes)
    assert cli.main(["checkpoint", "convert", str(folder), "--to", "gptq", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    capsys.readouterr()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_bytes_are_another_kind_of_error(tmp_path_factory, data):
    """Bytes changed, cut out or put in, anywhere in the header or the index: it is read, or refused."""
    folder = _fuzzed(tmp_path_factory)
    path = folder / data.draw(st.sampled_from(("model-00001-of-00002.safetensors", INDEX, "config.json")))
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0] if path.suffix == ".safetensors" else len(whole)
    place = data.draw(st.integers(0, end - 1))
    cut = data.draw(st.integers(0, 3))
    put = data.draw(st.binary(max_size=4))
    path.write_bytes(whole[:place] + put + whole[place + cut :])
    try:
        verify(open_checkpoint(folder))
    except WeightsError as error:
        assert str(folder) in str(error)  # noqa: PT017
    finally:
        path.write_bytes(whole)


def _fuzzed(factory) -> Path:
    if not hasattr(_fuzzed, "folder"):
        weight = Int4Weight.quantize(small.linear(16, 64).half(), group_size=32)
        plain = {"model.language_model.norm.weight": torch.ones(64).bfloat16()}
        _fuzzed.folder = small.write(factory.mktemp("fuzz") / "model", {NAME: weight}, "gptq", plain, shards=2)
    return _fuzzed.folder
