"""`m4ov checkpoint`: tables and JSON, exit statuses, disks that are full, memory, and what `m4ov quantize` writes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m4ov import cli
from m4ov.checkpoints import Options, convert, open_checkpoint, verify
from m4ov.models.sharded import WeightsError
from m4ov_kernels.gemm.weights import Int4Weight
from tests.checkpoints import small

NAMES = [f"{small.TEXT}.{layer}.{own}_proj" for layer in range(2) for own in ("self_attn.q", "self_attn.k", "mlp.down")]


@pytest.fixture
def original():
    torch.manual_seed(7)
    return {name: small.linear(32, 64).bfloat16() for name in NAMES}


@pytest.fixture
def source(original, tmp_path):
    made = {name: Int4Weight.quantize(weight, group_size=32) for name, weight in original.items()}
    return small.write(tmp_path / "source", made, "compressed-tensors-int4", {"norm.weight": torch.ones(4)}, shards=2)


def run(*arguments) -> int:
    return cli.main(["--traceback", "checkpoint", *map(str, arguments)])


def test_the_commands_from_end_to_end(original, source, tmp_path, capsys):
    assert run("inspect", source) == 0
    said = capsys.readouterr().out
    for words in ("6 × compressed-tensors-int4", "Marlin", "text", "qkv_proj", "down_proj"):
        assert words in said
    assert run("convert", source, "--to", "awq", "--out", tmp_path / "awq") == 0
    assert "exact: 6 weights, every value" in capsys.readouterr().out
    assert run("verify", source, tmp_path / "awq") == 0
    assert "alike: 1 same, 6 equal" in capsys.readouterr().out
    assert run("verify", tmp_path / "awq") == 0
    assert "sound: 7 sound" in capsys.readouterr().out
    plain = tmp_path / "original"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(small.MODEL))
    small.store(plain, {f"{name}.weight": weight for name, weight in original.items()} | {"norm.weight": torch.ones(4)})
    capsys.readouterr()
    assert run("verify", plain, tmp_path / "awq", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["counts"] == {"same": 1, "rounded": 6}
    rows = {row["name"]: row for row in found["rows"]}
    for name, weight in original.items():
        off = Int4Weight.quantize(weight, group_size=32).dequantize(torch.float64) - weight.double()
        assert rows[name]["error"] == pytest.approx(float(off.norm() / weight.double().norm()))
        assert rows[name]["largest"] == pytest.approx(float(off.abs().max()))
        assert set(rows[name]["hashes"][1]) == {f"{name}.{leaf}" for leaf in ("qweight", "qzeros", "scales")}
    assert run("verify", plain, tmp_path / "awq", "--tolerance", "0.2") == 0
    assert run("verify", plain, tmp_path / "awq", "--tolerance", "0.01") == 1


def test_json_says_what_the_tables_say(source, tmp_path, capsys):
    assert run("inspect", source, "--json", "--tensor-parallel", "2") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["formats"] == {"compressed-tensors-int4": 6}
    assert report["ranks"] == 2
    assert report["linears"]["text"]["quantised"] == 6
    assert {product["name"] for product in report["products"]} >= {f"{small.TEXT}.0.mlp.down_proj"}
    assert run("convert", source, "--to", "plain", "--dtype", "float32", "--out", tmp_path / "out", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["exact"]) == sorted(NAMES)
    assert result["rounded"] == {}
    assert result["nbytes"] == 4 * (6 * 32 * 64 + 4)


def test_a_digest_is_of_the_tensors_and_not_of_the_files(source, tmp_path):
    again = tmp_path / "again"
    convert(open_checkpoint(source), Options(again, "compressed-tensors-int4", shard_bytes=500))
    assert len(list(again.glob("*.safetensors"))) > 2
    both = verify(open_checkpoint(source), open_checkpoint(again))
    assert both.digests[0] == both.digests[1]
    assert both.counts == {"same": 7}
    tensors = small.load(source)
    tensors["norm.weight"][0] = 2
    for path in again.iterdir():
        if "safetensors" in path.name:
            path.unlink()
    small.store(again, tensors)
    other = verify(open_checkpoint(source), open_checkpoint(again))
    assert other.digests[0] == both.digests[0] != other.digests[1]
    assert [(row.name, row.verdict) for row in other.rows if row.verdict != "same"] == [("norm.weight", "different")]


def test_what_differs_is_said(source, tmp_path):
    again = tmp_path / "again"
    convert(open_checkpoint(source), Options(again, "gptq"))
    tensors = small.load(again)
    del tensors["norm.weight"]
    tensors["more"] = torch.ones(3)
    tensors[f"{NAMES[0]}.scales"][0, 0] *= 2
    tensors[f"{NAMES[1]}.qweight"], tensors[f"{NAMES[1]}.scales"] = (
        torch.zeros(8, 8, dtype=torch.int32),
        torch.ones(2, 8),
    )
    tensors[f"{NAMES[1]}.qzeros"] = torch.full((2, 1), 0x77777777, dtype=torch.int32)
    small.store(again, tensors)
    found = {row.name: row for row in verify(open_checkpoint(source), open_checkpoint(again)).rows}
    assert found["norm.weight"].verdict == "missing"
    assert found["more"].verdict == "extra"
    assert found[NAMES[0]].verdict == "different"
    assert (found[NAMES[1]].verdict, found[NAMES[1]].detail) == ("shape", "[32, 64] and [8, 64]")
    assert {found[name].verdict for name in NAMES[2:]} == {"same"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "MODEL: nowhere: no such file or folder"),
        (["inspect", ".", "--tensor-parallel", "0"], "--tensor-parallel: expected at least 1, got 0"),
        (["verify", ".", "nowhere"], "B: nowhere: no such file or folder"),
        (["verify", ".", "--tolerance", "nan"], "--tolerance: expected at least 0, got nan"),
        (["convert", ".", "--to", "marlin", "--out", "x"], "--to: expected one of awq, gptq"),
        (["convert", ".", "--to", "awq", "--out", "."], "--out: . exists already"),
        (["convert", ".", "--to", "awq", "--out", "x", "--scale-dtype", "int8"], "--scale-dtype: expected one of"),
        (["convert", ".", "--to", "awq", "--out", "x", "--shard-gib", "0"], "--shard-gib: expected more than 0"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["checkpoint", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_nothing_to_convert_is_said(source, tmp_path):
    plain = tmp_path / "plain"
    convert(open_checkpoint(source), Options(plain, "plain"))
    with pytest.raises(WeightsError, match="nothing in it is quantised; `m4ov quantize` does that"):
        convert(open_checkpoint(plain), Options(tmp_path / "out", "awq"))
    small.edit(source, lambda config: config["quantization_config"].update(kv_cache_scheme={"num_bits": 8}))
    with pytest.raises(WeightsError, match="scales of a KV cache are not converted"):
        convert(open_checkpoint(source), Options(tmp_path / "out", "awq"))


def test_a_full_disk_leaves_nothing(source, tmp_path):
    """Files of at most 2,000 bytes, which is what a full disk does to a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(WeightsError, match=r"out: cannot be written \(File too large\)"):
            convert(open_checkpoint(source), Options(tmp_path / "out", "awq"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsError, match="no such folder"):
        convert(open_checkpoint(source), Options(tmp_path / "file/out", "awq"))


MEMORY = """
import sys
from pathlib import Path
import torch
from m4ov.checkpoints import Options, convert, inspect, open_checkpoint, verify

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

def extra(function):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before

torch.set_num_threads(1)
folder = Path(sys.argv[1])
source = open_checkpoint(folder / "source")
convert(source, Options(folder / "warm", "awq"))
print(extra(lambda: convert(source, Options(folder / "awq", "awq"))))
print(extra(lambda: convert(source, Options(folder / "plain", "plain", dtype=torch.float32))))
print(extra(lambda: inspect(source)))
print(extra(lambda: verify(source, open_checkpoint(folder / "plain"))))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's to tell")
def test_memory_is_that_of_the_largest_weight(tmp_path):
    """64 MB of weights in float32, 4 MB each: a weight is held packed, one code a byte, and in its new form."""
    torch.manual_seed(8)
    made = {
        f"{small.TEXT}.{layer}.mlp.down_proj": Int4Weight.quantize(small.linear(1024, 1024).half(), group_size=128)
        for layer in range(16)
    }
    small.write(tmp_path / "source", made, "gptq_v2")
    child = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    # MiB: a weight in float32, some float64 copies of its rows, what the allocator keeps; all weights are 64.
    for peak in map(float, child.stdout.split()):
        assert peak <= 40, child.stdout
