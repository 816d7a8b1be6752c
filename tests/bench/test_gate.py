"""The gate: a wrong kernel is red and gets no speed; a right one is green."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from m4ov_bench import activation, cases, gate, head, machine, norm, report
from m4ov_bench.command import execute
from m4ov_bench.session import Session, rows
from m4ov_kernels.dispatch import FUNCTIONS, Implementation

NORM = cases.NormCase(6, 32)
GATED = cases.GatedCase(6, 32)
HEAD = cases.HeadCase(8, 32, 96, labelled=0.5)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_the_rule():
    exact = numbers(64, 64)
    plain = exact.bfloat16()
    assert gate.compare("x", plain, plain, exact).green
    assert gate.compare("x", plain, plain, exact).errors["x"] <= 1
    far = (exact * 1.05).bfloat16()
    red = gate.compare("x", far, plain, exact)
    assert not red.green
    assert red.errors["x"] > 1
    assert "x: RMS error" in red.problem


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_element_is_red(value):
    exact = numbers(64, 64)
    ours = exact.bfloat16()
    ours[13, 7] = value
    assert not gate.compare("x", ours, exact.bfloat16(), exact).green


def test_one_element_off_in_a_large_tensor_is_red_in_max_norm():
    exact = numbers(512, 512)
    ours = exact.bfloat16()
    ours[100, 3] += 1.0
    assert "max-norm" in gate.compare("x", ours, exact.bfloat16(), exact).problem


def test_another_shape_or_dtype_is_red():
    exact = numbers(4, 4)
    assert not gate.compare("x", exact[:2].bfloat16(), exact.bfloat16(), exact).green
    assert not gate.compare("x", exact.float(), exact.bfloat16(), exact).green


def test_nothing_is_lost_in_a_sum_of_gates():
    exact = numbers(4, 4)
    good, bad = exact.bfloat16(), (exact * 2).bfloat16()
    both = gate.compare_all(["a", "b"], [good, bad], [good, good], [exact, exact])
    assert both.errors.keys() == {"a", "b"}
    assert not both.green
    assert "b:" in both.problem
    assert "a:" not in both.problem


def checks(name: str):
    """(a function of an implementation that gives the gate, the implementation that runs here)"""
    operator = FUNCTIONS[name]
    implementation = operator.select(torch.device("cpu"), torch.bfloat16)
    if name == "rms_norm":
        inputs = norm._inputs(NORM)
        grads = (torch.randn(6, 32).bfloat16(),)
        return lambda call, raw: norm.check(NORM, call or norm.ours(NORM), raw, inputs, grads), implementation
    if name == "swiglu":
        inputs = tuple(torch.randn(6, 32).bfloat16().requires_grad_() for _ in range(2))
        grads = (torch.randn(6, 32).bfloat16(),)
        return lambda call, raw: activation.check(
            GATED, call or activation.ours(GATED), raw, inputs, grads
        ), implementation
    inputs = head._inputs(HEAD)
    return lambda call, raw: head.check(HEAD, call or head.linear_cross_entropy, raw, inputs), implementation


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "linear_cross_entropy"])
def test_the_operators_are_green(name):
    check, implementation = checks(name)
    result = check(None, implementation)
    assert result.green, result.problem
    assert any("(out=)" in tensor for tensor in result.errors) == (implementation is not None)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "linear_cross_entropy"])
@pytest.mark.parametrize("kind", ["fwd", "bwd"])
@pytest.mark.parametrize("fault", ["scaled", "one element", "not written"])
def test_a_wrong_kernel_is_red(name, kind, fault):
    """The raw kernels with a fault in what they leave in ``out``, which nothing but the gate would see."""
    check, implementation = checks(name)
    if implementation is None:
        pytest.skip("no kernels here: the reference serves every operator")
    real = getattr(implementation, kind)

    def wrong(*arguments, out, **options):
        results = (out,) if isinstance(out, torch.Tensor) else out
        saved = results[0].clone()
        real(*arguments, out=out, **options)
        if fault == "scaled":
            results[0].mul_(1.1)
        elif fault == "one element":
            results[0].view(-1)[results[0].abs().argmax()] = -results[0].abs().max()
            results[0].view(-1)[0] += results[0].abs().max()
        else:
            results[0].view(-1)[-1:].copy_(saved.view(-1)[-1:])

    fwd, bwd = (wrong if kind == k else getattr(implementation, k) for k in ("fwd", "bwd"))
    result = check(None, Implementation("native", fwd, bwd))
    assert not result.green
    assert "(out=)" in result.problem


def test_a_wrong_public_function_is_red():
    check, implementation = checks("swiglu")
    result = check(lambda gates, up: torch.nn.functional.silu(up) * gates, implementation)
    assert "output:" in result.problem


def test_a_red_gate_has_no_speed(capsys, monkeypatch, tmp_path):
    """One row without a time, printed in red, and the exit status says so."""
    session = Session(machine.describe(), quick=True)
    subject = activation.subject(GATED, False)
    red = replace(subject, gate=gate.Gate({"output": 9.0}, "output: far off"), ours=None, peers={}, kernels=None)
    made = list(rows(session, red))
    assert [row.green for row in made] == [False]
    assert made[0].seconds is None
    assert made[0].fraction is None
    assert "output: far off" in report.as_json(made)["rows"][0]["problem"]
    from m4ov_bench import runner

    monkeypatch.setattr(runner, "stream", lambda *_, **__: iter(made))
    given = {"family": [], "quick": True, "plot": None, "against": None, "case": "", "seed": None}
    options = type("Options", (), {**given, "json": tmp_path / "a" / "b.json"})
    assert execute(options) == 1
    assert "no speed" in capsys.readouterr().out
    assert (tmp_path / "a" / "b.json").is_file()
