"""What holds for every operator, drawn from its entry in ``operators``: accuracy of results and gradients on every ISA
for any shape, dtype, strides and values; outputs written whole and nothing beside them; every wrong argument refused.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m4ov_kernels.dispatch import FUNCTIONS

from . import strategies
from .guarded import guarded
from .operators import CASES

FAULTS = [pytest.param(case, fault, id=f"{name}-{fault}") for name, case in CASES.items() for fault in case.corruptions]


@pytest.fixture(params=sorted(CASES))
def case(request):
    return CASES[request.param]


def test_every_operator_is_entered():
    assert CASES.keys() == FUNCTIONS.keys(), "enter it in tests/kernels/operators"
    assert all(name == case.name for name, case in CASES.items())


@given(data=st.data())
@settings(max_examples=40)
def test_results_and_gradients(case, isa, data):
    call = data.draw(strategies.drawn(case.call))
    with data.draw(strategies.drawn(lambda draw: case.settings(draw, call.arguments))):
        case.judge(call, case.evaluate(call))


@given(data=st.data(), shift=st.integers(0, 3), threads=st.sampled_from((1, 2, 3, 8)))
@settings(max_examples=25)
def test_every_element_is_written_and_nothing_else(case, isa, data, shift, threads):
    call = data.draw(strategies.drawn(case.call))
    around = data.draw(strategies.drawn(lambda draw: case.settings(draw, call.arguments)))
    with around, guarded(FUNCTIONS[case.name], shift, threads, case.bitwise):
        case.evaluate(call)


@pytest.mark.parametrize(("case", "fault"), FAULTS)
@given(data=st.data())
@settings(max_examples=12)
def test_every_fault_is_refused_by_name(case, fault, data):
    arguments = data.draw(strategies.drawn(case.arguments))
    data.draw(strategies.drawn(lambda draw: case.refuse(arguments, fault, draw)))
