"""The same subjects under pytest-benchmark: ``pytest bench`` (``--benchmark-autosave``, ``--benchmark-compare``, …).

Each subject passes its correctness gate before anything is timed. Compiled peers are left to ``m4ov bench``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from m4ov_bench import activation, attention, cases, gemm_quantized, head, kl, logprob, machine, norm, vision
from m4ov_bench.peers import Absent
from m4ov_bench.peers.gemm import EAGER
from m4ov_bench.session import OURS, Session, Subject, as_called

ALL = (
    *cases.NORM,
    *cases.ACTIVATION,
    *cases.ATTENTION,
    *cases.HEAD,
    *cases.LOGPROB,
    *cases.KL,
    *cases.FEATURE_ROWS,
    *cases.POSITION_EMBEDDINGS,
    *cases.QUANTIZED,
)
CASES = [case for case in ALL if case.quick]
PEERS = ("eager", EAGER, "Hugging Face", "F.rms_norm", "SDPA with a mask", "F.linear_cross_entropy")


@cache
def subject(case: Any) -> Subject:
    session = Session(machine.describe(), quick=True)
    if isinstance(case, cases.NormCase):
        made = norm.subject(case, False)
    elif isinstance(case, (cases.GatedCase, cases.GeluCase)):
        made = activation.subject(case, False)
    elif isinstance(case, cases.AttentionCase):
        made = attention.subject(case, False)
    elif isinstance(case, cases.FeatureRowsCase):
        made = vision.feature_rows(case, True, False)
    elif isinstance(case, cases.PositionEmbeddingsCase):
        made = vision.interpolation(case, False)
    elif isinstance(case, cases.QuantizedCase):
        made = gemm_quantized.subject(case, gemm_quantized.Layers(quick=True))
    elif isinstance(case, cases.LogprobCase):
        made = logprob.subject(session, case)
    elif isinstance(case, cases.KlCase):
        made = kl.subject(session, case)
    else:
        made = head.subject(session, case)
    assert made.gate.green, f"{made.operator} {made.case}: {made.gate.problem}"
    return made


def timed(benchmark, case, call) -> None:
    counter = iter(range(10**9))
    with gemm_quantized.threads(getattr(case, "threads", torch.get_num_threads())):
        benchmark.pedantic(lambda: call(next(counter)), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("what", ["forward", "backward", "forward + backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(benchmark, case, what):
    made = subject(case)
    if what not in made.kernels:
        pytest.skip(f"{made.operator} is measured as {', '.join(made.kernels) or 'a call only: no kernels here'}")
    benchmark.group = f"{made.operator} {case}: {what}, kernel"
    timed(benchmark, case, made.kernels[what].call)


@pytest.mark.parametrize("who", [OURS, *PEERS])
@pytest.mark.parametrize("what", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_called(benchmark, case, what, who):
    made = subject(case)
    function = made.ours if who == OURS else made.peers.get(who, Absent(f"no peer of {made.operator}"))
    if isinstance(function, Absent):
        pytest.skip(str(function))
    benchmark.group = f"{made.operator} {case}: {what}, as called"
    timed(benchmark, case, as_called(made, function, backward="backward" in what))
