"""The certificate: that the layouts of two ranks pass it, and that it can fail."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from m4ov import cli
from m4ov.parallel.mesh import LayoutError
from m4ov.parallel.parity import certificate, fuzz, steps
from m4ov.parallel.parity.certificate import Row
from m4ov.parallel.parity.steps import Difference, Record

FAST = ("fsdp2", "tp2", "tp2-ep2")


@pytest.fixture(scope="module")
def rows():
    return list(certificate.certify(certificate.plan(FAST, 2)))


def test_two_ranks_are_one_process(rows):
    assert [(row.layout, row.kind) for row in rows] == [
        ("fsdp2", "dense"),
        ("fsdp2", "moe"),
        ("tp2", "dense"),
        ("tp2", "moe"),
        ("tp2-ep2", "moe"),
    ]
    for row in rows:
        assert row.good, row


def test_their_collectives_are_those_written_down(rows):
    golden = json.loads(certificate.GOLDEN.read_text())
    assert {f"{layout} dense" for layout in certificate.LAYOUTS if "ep" not in layout} <= golden["ledger"].keys()
    assert {f"{layout} moe" for layout in certificate.LAYOUTS} == {
        name for name in golden["ledger"] if name.endswith(" moe")
    }
    assert certificate.ledger_differences(rows) == []


def test_another_collective_is_seen(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(certificate, "GOLDEN", tmp_path / "ledger.json")
    certificate.write_ledger(rows)
    assert certificate.ledger_differences(rows) == []
    assert certificate.compared(rows) == "5 of 5 rows compared"
    ledger = {axis: {kind: list(entry) for kind, entry in kinds.items()} for axis, kinds in rows[2].ledger.items()}
    ledger["tp"]["all_gather"][0] += 1
    changed = dataclasses.replace(rows[2], ledger=ledger)
    (line,) = certificate.ledger_differences([changed])
    assert line.startswith("tp2 dense: all_gather over tp: ")
    golden = json.loads(certificate.GOLDEN.read_text()) | {"torch": "1.0"}
    certificate.GOLDEN.write_text(json.dumps(golden))
    assert certificate.ledger_differences([changed]) == []
    assert certificate.compared([changed]).startswith("not compared: none is written down")


def made(**changes) -> Record:
    grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    weights = {name: grad + 1 for name, grad in grads.items()}
    values = {"loss": 2.0, "norm": 5.0, "grads": grads, "sgd": weights, "adamw": weights} | changes
    return Record(**values)


def test_what_differs_is_measured_and_named():
    same = steps.compare(made(), made())
    assert same.largest == same.adamw == 0
    off = steps.compare(made(grads={"a": torch.tensor([3.0, 4.5]), "b": torch.zeros(2)}), made())
    assert (off.grad, off.grad_of) == (pytest.approx(0.1), "a")
    assert off.largest == off.grad
    # what must be zero, what is not a number, other shapes: all infinitely far
    for wrong in (torch.tensor([0.0, 1e-20]), torch.tensor([0.0, math.nan]), torch.zeros(3)):
        assert steps.compare(made(grads={"a": torch.tensor([3.0, 4.0]), "b": wrong}), made()).grad == math.inf
    assert steps.compare(made(loss=math.nan), made()).largest == math.inf
    moved = steps.compare(made(adamw={"a": torch.tensor([4.0, 5.0]), "b": torch.tensor([1.0, 1.0 + 1e-4])}), made())
    assert (moved.adamw, moved.adamw_of) == (pytest.approx(0.1, rel=1e-2), "b")
    with pytest.raises(KeyError, match="other parameters: \\['b'\\]"):
        steps.compare(made(grads={"a": torch.ones(2)}), made())


def test_a_row_is_good_within_the_tolerances():
    near = Difference(1e-7, 1e-7, 9e-7, "a", 1e-7, "a", 9e-3, "a")
    row = Row("tp2", "dense", near, True, {}, 1.0)
    assert row.good
    assert not dataclasses.replace(row, alike=False).good
    for field in ("loss", "norm", "grad", "sgd"):
        assert not dataclasses.replace(row, difference=dataclasses.replace(near, **{field: 2e-6})).good
    assert not dataclasses.replace(row, difference=dataclasses.replace(near, adamw=2e-2)).good


def test_random_layouts_and_batches():
    """A few of ``m4ov parity --fuzz``; in float64."""
    first = int(torch.randint(10**6, ())) * 100
    seeds = [seed for seed in range(first, first + 40) if fuzz.pair(seed).layout.world == 2][:4]
    for outcome in fuzz.run(seeds):
        assert outcome.good, outcome


def test_a_pair_follows_from_its_seed():
    pairs = [fuzz.pair(seed) for seed in range(60)]
    assert pairs == [fuzz.pair(seed) for seed in range(60)]
    assert {one.layout.world for one in pairs} == {2, 4, 8}
    assert any(one.layout.ep > 1 and one.layout.tp > 1 for one in pairs)
    assert all(one.draw.samples >= one.layout.data for one in pairs)


def test_the_command_refuses_at_once(capsys):
    for arguments, message in (
        (["--layouts", "tp3"], "tp 3 does not divide the 8 attention heads (legal and near: 4, 2, 8)"),
        (["--layouts", "fsdp4", "--world", "2"], "layout fsdp4 has 4 ranks; --world is 2"),
        (["--layouts", "tp2,xp2"], "got 'xp2'"),
        (["--fuzz", "0"], "at least 1"),
    ):
        assert cli.main(["parity", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_layout_of_experts_is_not_run_with_a_dense_model():
    assert [(str(layout), kind) for layout, kind in certificate.plan(["tp2-ep2", "tp2", "fsdp8"], 4)] == [
        ("tp2-ep2", "moe"),
        ("tp2", "dense"),
        ("tp2", "moe"),
    ]
    with pytest.raises(LayoutError):
        certificate.plan(["fsdp2-ep4"], 8)
