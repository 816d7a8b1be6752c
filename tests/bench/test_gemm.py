"""The benchmark of the quantised linears: peers give what they claim, rows rotate, limits do what they say."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import pytest
import torch

from m4ov_bench import cases, gemm_quantized, peers, report
from m4ov_bench.gate import Truth
from m4ov_bench.peers.gemm import EAGER, ROUNDS_TO
from m4ov_bench.row import Peer

KINDS = {
    "int4": (
        *(EAGER, "int4pack", "OpenVINO u4", "onnxruntime level 4", "onnxruntime level 0"),
        *("zentorch W4A8", "zentorch W4A16"),
    ),
    "int8": (EAGER, "_int_mm", "zentorch W8A8", "OpenVINO i8"),
    "fp8": (EAGER, "dequantised in each call", "_scaled_mm"),
}


@pytest.fixture(scope="module", autouse=True)
def _fresh_inputs():
    torch.manual_seed(int(os.environ["M4OV_TEST_SEED"]))


@pytest.fixture(scope="module")
def layers():
    made = {kind: cases.QuantizedCase(24, 256, 96, kind) for kind in KINDS}
    return {kind: (case, gemm_quantized.Layer(case, quick=False)) for kind, case in made.items()}


def test_every_peer_is_tested(layers):
    for kind, (_, layer) in layers.items():
        assert set(layer.packed_peers(2)) == set(KINDS[kind])
    assert set(ROUNDS_TO) <= {name for names in KINDS.values() for name in names}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_a_peer_gives_what_it_claims(layers, kind, name):
    case, layer = layers[kind]
    peer = layer.packed_peers(2)[name]
    if isinstance(peer, peers.Absent):
        pytest.skip(str(peer))
    definition = gemm_quantized.definition(layer, ROUNDS_TO.get(name, "bf16"))
    for which in range(3):
        inputs = (torch.randn(case.rows, case.width).bfloat16(), torch.tensor(which))
        judged = Truth(definition, inputs, None).judge(peer, backward=False)
        assert judged.green, judged.problem


def test_a_wrong_answer_is_no_peers(layers):
    """The rule sees a weight whose codes are a place off, and an input rounded more coarsely than is claimed."""
    case, layer = layers["int4"]
    inputs = (torch.randn(case.rows, case.width).bfloat16(), torch.tensor(0))
    truth = Truth(gemm_quantized.definition(layer, "int8"), inputs, None)
    moved, coarse = layer.plain.roll(1, 1), (inputs[0] * 8).round() / 8
    assert not truth.judge(lambda x, _: x @ moved.t(), backward=False).green
    assert not truth.judge(lambda x, _: coarse @ layer.plain.t(), backward=False).green
    assert truth.judge(layer.packed_peers(2)[EAGER], backward=False).green


def test_copies_are_apart_and_equal():
    layer = gemm_quantized.Layer(cases.TINY_QUANTIZED[0], quick=True)
    copies = layer.copies(3)
    assert len({weight.packed.data_ptr() for weight in copies}) == 3
    assert all(weight.equal(layer.weight) for weight in copies)
    assert layer.copies(2) == copies[:2]  # made once


def test_each_copy_is_packed_once_and_taken_by_turns():
    packed, called = [], []

    def layer(made, input):
        called.append(made)
        return input + made

    def pack():
        packed.append(len(packed))
        return functools.partial(layer, packed[-1])

    peer = peers.gemm.Rotating(pack, 2)
    found = [float(peer(torch.zeros(1), torch.tensor(which))) for which in (0, 1, 2, 3)]
    assert found == [0, 1, 0, 1]
    assert packed == [0, 1]
    assert called == [0, 1, 0, 1, 0, 1]  # each of them once before the first is timed
    peer(torch.zeros(2), torch.tensor(1))
    assert called[6:] == [0, 1, 1]


def test_threads_are_as_the_case_says_and_then_as_before():
    before = torch.get_num_threads()
    seen = []

    def fail():
        seen.append(torch.get_num_threads())
        raise KeyError

    with pytest.raises(KeyError), gemm_quantized.threads(before + 1):
        fail()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_an_input_is_rounded_as_the_operators_do():
    x = torch.tensor([[1.0, -254.0, 0.4, 3.0]], dtype=torch.bfloat16)
    assert gemm_quantized.rounded(x, "bf16").tolist() == x.double().tolist()
    assert gemm_quantized.rounded(x, "int8").tolist() == [[0.0, -254.0, 0.0, 4.0]]  # steps of 2, halves to even
    assert gemm_quantized.rounded(torch.zeros(1, 3), "int8").tolist() == [[0.0] * 3]


def test_a_claim_is_in_the_table():
    text = report._peer("one", Peer(0.001, 1.25, error=0.5, claim="int8 activations"))
    assert text == "one: 1 ms (1.25 ×; int8 activations, error 50% of allowed)"


def test_another_group_has_no_peers_that_need_whole_ones():
    layer = gemm_quantized.Layer(replace(cases.TINY_QUANTIZED[0], width=200), quick=False)
    assert "no whole groups of 128" in layer.packed_peers(2)["OpenVINO u4"]
