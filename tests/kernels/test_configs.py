"""Configurations as data: which row a call gets, and what a table that is none says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m4ov_kernels import configs, gpu
from m4ov_kernels.configs import Row, Table
from m4ov_kernels.gpu import ARCHITECTURES, Config


def rows(dtype: str = "any", warps: int = 4) -> list[Row]:
    return [
        Row("k", dtype, 64, Config({"BLOCK": 64}, warps)),
        Row("k", dtype, 256, Config({"BLOCK": 256}, 2 * warps)),
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(configs.tables, "FOLDER", tmp_path)
    configs.forget()
    yield tmp_path
    monkeypatch.undo()
    configs.forget()


def write(path: Path, *rows: Row) -> None:
    configs.write(path, Table({}, rows))
    configs.forget()


def test_the_width_and_the_dtype_choose(folder):
    write(folder / "default.json", *rows(), *rows("fp32", warps=1))
    for dtype, warps in ((torch.bfloat16, 4), (torch.float16, 4), (torch.float32, 1)):
        for count in (1, 1000):  # of tokens, which nothing asks for
            x = torch.empty(count, 1, dtype=dtype)
            assert configs.find("k", x, 1) == configs.find("k", x, 64) == Config({"BLOCK": 64}, warps)
            assert configs.find("k", x, 65) == Config({"BLOCK": 256}, 2 * warps)
            assert configs.find("k", x, 257) is None
    with pytest.raises(ValueError, match="'k' has no row without a bound"):
        configs.get("k", torch.empty(1))
    with pytest.raises(ValueError, match="no table has a configuration of 'other' for bf16"):
        configs.find("other", torch.empty(1, dtype=torch.bfloat16), 1)


def test_an_architectures_rows_come_before_the_default(folder, monkeypatch):
    write(folder / "default.json", *rows(), Row("other", "any", None, Config({"BLOCK": 16})))
    write(folder / "sm_90.json", *rows("bf16", warps=8))
    x = torch.empty(1, dtype=torch.bfloat16)
    assert configs.find("k", x, 1) == Config({"BLOCK": 64}, 4)
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
    assert configs.find("k", x, 1) == Config({"BLOCK": 64}, 8)
    assert configs.find("k", x.float(), 1) == Config({"BLOCK": 64}, 4)
    assert configs.get("other", x) == Config({"BLOCK": 16})
    shipped = configs.shipped("k", "bf16")
    assert {(row.config.num_warps, row.width): targets for row, targets in shipped} == {
        (4, 64): ("sm_80", "sm_100", "gfx942"),
        (8, 256): ("sm_80", "sm_100", "gfx942"),
        (8, 64): ("sm_90",),
        (16, 256): ("sm_90",),
    }
    assert all(targets == ARCHITECTURES for _, targets in configs.shipped("k", "fp32"))


def test_override_holds_inside_and_nests(folder):
    write(folder / "default.json", *rows())
    x = torch.empty(1)
    with configs.override(Row("k", "any", None, Config({"BLOCK": 8}))):
        assert configs.get("k", x) == Config({"BLOCK": 8})
        with configs.override(Row("k", "fp32", None, Config({"BLOCK": 2}))):
            assert configs.get("k", x) == Config({"BLOCK": 2})
        assert configs.get("k", x) == Config({"BLOCK": 8})
    assert configs.find("k", x, 1) == Config({"BLOCK": 64})


def test_what_is_written_is_read(folder):
    table = Table({"k": "a GPU, today"}, (*rows(), Row("k", "bf16", None, Config({"A": 1, "B": 2}, 16, 3))))
    path = folder / "default.json"
    configs.write(path, table)
    assert configs.read(path) == table
    assert len(path.read_text().splitlines()) == 3 + len(table.rows)
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "dtype: expected one of bf16, fp16, fp32, any; got 'fp8'"),
        ({"num_warps": 3}, "num_warps: expected a power of two up to 32, got 3"),
        ({"num_warps": 64}, "num_warps: expected a power of two up to 32, got 64"),
        ({"blocks": {"BLOCK": 48}}, "blocks: expected powers of two, got"),
        ({"num_stages": 0}, "num_stages: expected at least 1, got 0"),
        ({"width": 32}, "width: expected more than the 64 of the row before, got 32"),
        ({"warps": 4}, "row 1: expected blocks, dtype, kernel, num_stages, num_warps, width; got"),
    ],
)
def test_a_table_that_is_none_is_refused(folder, change, message):
    path = folder / "sm_80.json"
    write(path, *rows())
    data = json.loads(path.read_text())
    data["rows"][1].update(change)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"sm_80\.json: ") as error:
        configs.read(path)
    assert message in str(error.value)


def test_every_table_that_ships_is_read_and_named_for_an_architecture():
    names = [path.stem for path in configs.FOLDER.glob("*.json")]
    assert configs.DEFAULT in names
    for name in names:
        table = configs.table(name)
        assert table.rows
        assert name == configs.DEFAULT or (
            name in ARCHITECTURES and table.measured.keys() >= {r.kernel for r in table.rows}
        )
