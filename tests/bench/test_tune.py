"""``m4ov kernels tune`` on the CPU: real kernels, interpreted, real problems and gate; only the clock is the test's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from m4ov_bench import tune
from m4ov_bench.tunables import TUNABLES, Problem, Size, Tunable
from m4ov_kernels import configs, gpu
from m4ov_kernels.configs import Row
from m4ov_kernels.gpu import Config

CPU = torch.device("cpu")
SMALL = Size(elements=1200, wide=150)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's stand-in: a GPU runs the command itself")


@triton.jit
def _double_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Right only where one block holds everything."""
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, 2.0 * tl.load(x_ptr + place, mask=place < count), mask=place < count)


def _double(width: int, dtype: torch.dtype, device: torch.device, size: Size) -> Problem:
    x = torch.randn(width, dtype=dtype)
    out = torch.empty_like(x)

    def call() -> None:
        config = configs.get("double", x)
        _double_kernel[(1,)](x, out, width, **config.options())

    return Problem(lambda: out.fill_(math.nan), call, lambda: [out], ["out"], [2 * x], [2 * x.double()])


DOUBLE = Tunable("double", lambda _: (Config({"BLOCK": size}) for size in (32, 64, 128)), _double)


def ever_faster() -> tune.Timer:
    """Each call takes 0.9 of what the one before took."""
    calls = itertools.count()
    return lambda call: 0.9 ** next(calls)


@pytest.fixture
def _small_tables() -> Iterator[None]:
    """Whole rows end at 64 columns, so that the wide kernels serve 150."""
    rows = [
        Row(name, "any", width, Config({"BLOCK_ROWS": 4, "BLOCK_D": width}))
        for name in ("rms_norm_fwd", "rms_norm_bwd", "quantize_rows")
        for width in (32, 64)
    ]
    with configs.override(*rows):
        yield


@pytest.mark.usefixtures("_small_tables")
@pytest.mark.parametrize("tunable", TUNABLES, ids=lambda tunable: tunable.kernel)
def test_every_problem_is_right_at_every_candidate(tunable):
    rows = configs.rows_of(tunable.kernel, "cpu", "fp32")
    for row in {row.width is None: row for row in rows}.values():
        slot = tune.Slot(tunable, torch.float32, row.width)
        outcome = tune.search(slot, row.config, CPU, ever_faster(), SMALL, math.inf)
        assert outcome.rejected == {}
        assert len(outcome.seconds) > 2
        assert outcome.untried == 0
        assert outcome.seconds[tune.describe(outcome.best)] == min(outcome.seconds.values())


def test_a_fast_wrong_candidate_is_not_timed():
    slot = tune.Slot(DOUBLE, torch.float32, None)
    held = Config({"BLOCK": 256})
    timed: list[int] = []

    def timer(call):
        call()
        timed.append(configs.get("double", torch.empty(0)).constexprs["BLOCK"])
        return float(timed[-1])  # the smaller, the faster

    outcome = tune.search(slot, held, CPU, timer, Size(1, 100), math.inf)
    assert timed == [256, 128]
    assert outcome.best.constexprs == {"BLOCK": 128}
    assert len(outcome.rejected) == 2
    assert all("out: " in reason for reason in outcome.rejected.values())
    with pytest.raises(RuntimeError, match=r"the configuration in force .* is wrong"):
        tune.search(slot, Config({"BLOCK": 64}), CPU, timer, Size(1, 100), math.inf)


def test_a_candidate_that_raises_is_rejected():
    slot = tune.Slot(next(t for t in TUNABLES if t.kernel == "rms_norm_fwd"), torch.float32, 32)
    held = Config({"BLOCK_ROWS": 4, "BLOCK_D": 32})
    narrow = Tunable("rms_norm_fwd", lambda _: iter([Config({"BLOCK_ROWS": 4, "BLOCK_D": 16})]), slot.tunable.problem)
    outcome = tune.search(tune.Slot(narrow, torch.float32, 32), held, CPU, lambda call: 1.0, SMALL, math.inf)
    (reason,) = outcome.rejected.values()
    assert "expected BLOCK_D to hold the row" in reason
    assert outcome.best == held


def test_noise_and_the_end_of_time_change_nothing():
    slot = tune.Slot(DOUBLE, torch.float32, None)
    held = Config({"BLOCK": 256})
    times = iter([1.0, 0.985])
    assert tune.search(slot, held, CPU, lambda _: next(times), Size(1, 100), math.inf).best == held
    outcome = tune.search(slot, held, CPU, lambda _: 1.0, Size(1, 100), 0.0)
    assert (list(outcome.seconds), outcome.untried) == ([tune.describe(held)], 3)


def test_the_table_that_is_written_serves_its_architecture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")  # where the table would be found
    monkeypatch.setattr(configs.tables, "FOLDER", tmp_path)
    configs.write(tmp_path / "default.json", configs.read(configs.FOLDER / "default.json"))
    configs.forget()
    try:
        name = "feature_rows_index"
        before = configs.rows_of(name, "sm_90", "fp32")
        path = tune.run([name], CPU, ever_faster(), SMALL, 60.0, tmp_path)
        assert path == tmp_path / "sm_90.json"
        table = configs.read(path)
        assert set(table.measured) == {name}
        assert torch.__version__ in table.measured[name]
        assert {row.dtype for row in table.rows} == {"bf16", "fp16", "fp32"}
        assert configs.rows_of(name, "sm_90", "fp32") != before
        assert configs.get(name, torch.empty(1)) == configs.rows_of(name, "sm_90", "fp32")[0].config
        assert [targets for _, targets in configs.shipped(name, "fp32")] == [
            ("sm_80", "sm_100", "gfx942"),
            ("sm_90",),
        ]
        assert configs.rows_of(name, "sm_80", "fp32") == before
        kept = path.read_text()
        tune.run([name], CPU, lambda call: 1.0, SMALL, 0.0, tmp_path)
        assert path.read_text() == kept
        assert "the time is up: 3 rows keep what they have" in capsys.readouterr().out
    finally:
        monkeypatch.undo()
        configs.forget()


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match=r"kernel: expected one of .*rms_norm_fwd, .*; got 'no_kernel'"):
        tune.slots(["no_kernel"], "sm_90")


def test_without_a_gpu_it_says_so(capsys):
    assert tune.command([], 1.0) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err
