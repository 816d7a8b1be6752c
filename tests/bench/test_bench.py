"""The benchmark end to end on tiny shapes, and its timers on calls of known length."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import m4ov_bench
from m4ov_bench import cases, machine, measure, memory, peers, plots, report, runner
from m4ov_bench.peers import trainers
from m4ov_bench.peers.gemm import EAGER
from m4ov_bench.session import memory_bound
from m4ov_kernels.dispatch import native_extension

HOST_FUNCTIONS = ("mrope_positions", "pack_patches", "pack_sequences")  # their peers are not PyTorch's
PLAIN = dict.fromkeys(("qk_norm_mrope", "vision_rope"), "Hugging Face")  # what a row is compared with, if not eager
PLAIN |= dict.fromkeys(("int4_linear", "int8_linear", "fp8_linear"), EAGER)
FAST = measure.Effort(seconds=0.05, each=0.02, fewest=2, most=3)


@pytest.fixture(scope="module")
def tiny():
    """The short run on tiny shapes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(measure, "QUICK", FAST)
    for name in [name for name in vars(cases) if name.startswith("TINY_")]:
        made = [replace(case, quick=True) for case in getattr(cases, name)]
        made = [replace(case, compiled=False) if hasattr(case, "compiled") else case for case in made]
        patch.setattr(cases, name[5:], tuple(made))
    patch.setattr(cases, "NORM", (cases.NormCase(8, 64, quick=True), cases.NormCase(4, 32, residual=True, quick=True)))
    patch.setattr(cases, "ACTIVATION", (cases.GatedCase(8, 64, quick=True),))
    patch.setattr(cases, "HEAD", (cases.HeadCase(8, 32, 96, labelled=0.5, quick=True),))
    patch.setattr(cases, "FEATURE_ROWS", (cases.FeatureRowsCase(12, 48, 0.5, quick=True),))
    patch.setattr(
        cases, "POSITION_EMBEDDINGS", (cases.PositionEmbeddingsCase("tiny", ((1, 4, 2),), 40, 3, quick=True),)
    )
    patch.setattr(machine, "_COPY_BYTES", 2**16)
    patch.setattr(machine, "_MATRIX", 128)
    heard: list[str] = []
    state = torch.get_rng_state()
    rows = m4ov_bench.run(quick=True, say=heard.append, allocator="as tested", seed=int(os.environ["M4OV_TEST_SEED"]))
    assert torch.equal(torch.get_rng_state(), state), "run() must leave the caller's random numbers alone"
    patch.undo()
    return rows, heard


def test_every_family_of_the_short_run_gives_rows(tiny):
    rows, heard = tiny
    assert {row.family for row in rows} == {*runner.QUICK_FAMILIES}
    assert all(row.green for row in rows), [row.problem for row in rows if not row.green]
    assert any("kernel" in text for text in heard) == (native_extension()[0] is not None)


def test_rows_hold_what_they_promise(tiny):
    for row in tiny[0]:
        assert row.seconds is not None
        assert row.machine.allocator == "as tested"
        kernels = {"int8 dot OP/s"} if native_extension()[0] else set()
        assert row.machine.limits.keys() == {"copy B/s", "bf16 mm FLOP/s", "fp32 mm FLOP/s"} | kernels
        assert row.errors
        assert max(row.errors.values()) <= 1
        if row.what.endswith(", kernel"):
            assert row.fraction > 0
            assert row.limit
            assert row.limit_seconds > 0
            assert row.rate > 0
            assert row.unit in ("B", "FLOP", "OP")
        if row.what.endswith("forward, as called") and row.operator not in HOST_FUNCTIONS:
            assert row.peers[PLAIN.get(row.operator, "eager")].ratio > 0
        if "torch.compile" in row.peers:
            assert row.peers["torch.compile"].absent
    called = [row for row in tiny[0] if row.family == "head" and row.what == "forward + backward, as called"]
    assert {"F.linear_cross_entropy", "Hugging Face"} <= called[0].peers.keys()


def test_kernels_are_measured_where_there_are_kernels(tiny):
    what = {(row.operator, row.what) for row in tiny[0] if row.what.endswith(", kernel")}
    if native_extension()[0] is None:
        assert not what
    else:
        assert {("rms_norm", "backward, kernel"), ("linear_cross_entropy", "forward + backward, kernel")} <= what


def test_a_step_of_training_is_compared_with_a_trainers(tiny):
    (row,) = [row for row in tiny[0] if row.family == "sft"]
    assert row.errors.keys() == {"loss", "gradients", "first loss"}
    assert row.rate > 0
    assert row.unit == "tokens"
    assert "100% fill" in row.note
    trainer = row.peers[trainers.TRAINER]
    assert trainer.ratio > 0
    assert trainer.error <= 1
    assert all(row.peers[name].absent for name in trainers.NAMES if name != trainers.TRAINER)
    if sys.platform.startswith("linux"):
        assert row.memory_mib > 0
        assert trainer.memory_mib > 0


def test_json_round_trip_and_table_and_plot(tiny, tmp_path):
    rows, _ = tiny
    report.write_json(rows, tmp_path / "bench.json")
    loaded = json.loads((tmp_path / "bench.json").read_text())
    assert len(loaded["rows"]) == len(rows)
    assert loaded["machine"] == json.loads(json.dumps(dataclasses.asdict(rows[0].machine)))
    assert report.table(rows, "all").row_count == len(rows)
    grown = [
        dataclasses.replace(rows[0], what="memory, 8 tokens", tokens=tokens, memory_mib=1.0 * tokens, peers={})
        for tokens in (8, 16)
    ]
    written = plots.write([*rows, *grown], tmp_path / "bench.png")
    expected = {"bench-memory.png"}
    for row in rows:
        if any(peer.ratio for peer in row.peers.values()):
            expected.add(f"bench-{row.family}.png")
        if row.bytes and row.flops and row.seconds:
            expected.add(f"bench-{row.family}-roofline.png")
    assert len(expected) >= 3
    assert {path.name for path in written} == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_there_is_no_plot_of_nothing(tmp_path):
    assert plots.write([], tmp_path / "bench.png") == []


def test_an_unknown_family_lists_the_families():
    with pytest.raises(ValueError, match="no benchmark is named 'nrm'; there are norm, activation"):
        m4ov_bench.run(["nrm"])


def test_importing_the_package_imports_no_torch():
    code = "import sys, m4ov_bench, m4ov_bench.command; print('torch' in sys.modules, len(m4ov_bench.FAMILIES))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.split()[0] == "False"


@pytest.mark.parametrize("family", runner.FAMILIES)
def test_every_family_is_a_module(family):
    import importlib

    assert callable(importlib.import_module(f"m4ov_bench.{family}").benchmark)


def test_interleaved_times_and_ratios(monkeypatch):
    """By a clock that the calls move: on a busy machine a sleep takes any time."""
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    times = measure.interleaved(
        {"short": lambda _: take(0.002), "long": lambda _: take(0.006)},
        measure.Effort(seconds=0.2, each=0.1, fewest=5, most=12),
    )
    assert times["short"].seconds == pytest.approx(0.002)
    assert times["long"].ratio_to(times["short"]) == pytest.approx(3)
    assert times["long"].less(times["short"]) == pytest.approx(0.004)
    assert sum(sample is not None for sample in times["long"].rounds) >= 5


def test_disturbed_samples_are_left_out_while_enough_remain():
    def rounds(*seconds: float, slow: int) -> measure.Times:
        return measure.Times(tuple(measure.Sample(s, 0, i < slow) for i, s in enumerate(seconds)))

    assert rounds(9, 9, 1, 1, 1, 1, 1, slow=2).seconds == 1
    assert rounds(9, 9, 9, 1, 1, 1, 1, slow=3).seconds == 1  # too few are calm: all count
    assert rounds(9, 9, 9, 9, 1, 1, 1, slow=4).seconds == 9


def test_inputs_rotate_from_call_to_call():
    seen = []
    measure.interleaved({"a": seen.append, "b": seen.append}, FAST)
    timed = seen[6:]  # after warm-up and estimate
    assert timed == list(range(len(timed)))
    assert len(timed) >= 4


def test_a_copy_through_the_kernels_own_buffers_is_scaled_to_its_traffic():
    source, sink = torch.ones(8), torch.zeros(8)
    kernel = memory_bound(lambda _: None, 96, 0.0, [[(source, sink)]])
    kernel.limit(5)
    assert torch.equal(source, sink)
    assert kernel.scale == 1.5  # 32 bytes read, 32 written


def test_page_faults_are_counted():
    times = measure.interleaved({"fresh": lambda _: torch.ones(2**24), "none": lambda _: None}, FAST)
    assert times["none"].faults == 0
    assert times["fresh"].faults >= 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark of Linux")
def test_memory_sees_whole_logits_and_the_lack_of_them():
    case = cases.HeadCase(512, 32, 32768, kept=0)
    whole = case.rows * case.vocabulary * 2 / 2**20  # 32 MiB in bf16
    assert memory.extra_mib("eager", case) >= whole
    if native_extension()[0] is not None:
        assert memory.extra_mib("m4ov", case) < whole <= memory.extra_mib("m4ov", replace(case, kept=1 << 30))


def test_memory_of_an_unknown_kind_fails_loudly(monkeypatch):
    monkeypatch.setattr(
        memory.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "why\nbecause")
    )
    with pytest.raises(RuntimeError, match="because"):
        memory.extra_mib("eager", cases.HeadCase(2, 2, 2))


def test_an_absent_peer_says_why(monkeypatch):
    monkeypatch.setattr(peers.base.importlib.util, "find_spec", lambda name: None)
    assert peers.linear_cross_entropy(8, False)["Hugging Face"] == "transformers is not installed"
    assert peers.swiglu("left out")["torch.compile"] == "left out"
    monkeypatch.setattr(peers.base.shutil, "which", lambda name: None)
    assert "compiler" in peers.swiglu(True)["torch.compile"]


def test_targets_are_labelled_as_asked():
    target = cases.targets(cases.HeadCase(100, 8, 50, labelled=0.25))
    assert int((target != -100).sum()) == 25
    assert int(target.max()) < 50
