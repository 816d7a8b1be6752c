"""Each kind's own: options, mixed precision, clipping, how images are dealt out, and what is refused."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial

from m4ov.models.qwen3_vl import Qwen3VL, save
from m4ov.parallel import data, expert, ranks
from m4ov.parallel.data import DataParallel
from m4ov.parallel.expert import ExpertParallel
from m4ov.parallel.mesh import Layout, LayoutError, Mesh
from m4ov.parallel.parallelize import Parallel, load, parallelize
from m4ov.parallel.parity import cases, certificate, steps
from m4ov.parallel.parity.cases import Draw
from m4ov.parallel.tensor import TensorParallel, split_evenly
from m4ov_kernels.nn import load_balancing_loss

DRAW = Draw(kind="moe", seed=4)


def options() -> dict[str, float]:
    """How far from one process: clipped gradients, a tower that every tensor rank runs whole, bf16 weights."""
    mesh = Mesh(Layout(tp=2))
    wanted = certificate.reference(DRAW, train=0, dtype=torch.float64)
    found = {}

    whole = Parallel(tensor=TensorParallel(split_images=False), data=DataParallel(reshard_after_forward=False))
    made = steps.record(
        lambda: parallelize(cases.model(DRAW, torch.float64), mesh, whole), cases.share(DRAW), mesh, steps=0
    )
    found["whole tower"] = steps.compare(made, wanted).largest

    model = parallelize(cases.model(DRAW, torch.float64), mesh)
    steps.backward(model, cases.share(DRAW), mesh)
    before = {name: steps.whole(parameter.grad) for name, parameter in model.named_parameters()}
    norm = data.clip_grad_norm(model.parameters(), 0.5 * wanted.norm)
    found["norm"] = abs(float(norm) - wanted.norm) / wanted.norm
    found["clipped norm"] = abs(float(data.grad_norm(model.parameters())) / wanted.norm - 0.5)
    found["direction"] = max(
        steps.relative(steps.whole(parameter.grad), 0.5 * before[name]) for name, parameter in model.named_parameters()
    )
    return found


def test_options_do_not_change_the_gradients(two_ranks):
    found = two_ranks[0]["options"]
    assert found.pop("whole tower") < 1e-10
    assert max(found.values()) < 1e-6, found  # the norm is float32


def from_files(label: str, kind: str, folder: Path) -> float:
    draw, mesh = Draw(kind=kind, seed=4), Mesh(Layout.parse(label))

    def build() -> Qwen3VL:
        with torch.device("meta"):
            model = Qwen3VL(draw.config)
        parallelize(model, mesh).to_empty(device="cpu")
        load(model, folder)
        return model.train()

    made = steps.record(build, cases.share(draw, mesh.data_rank, mesh.layout.data), mesh, steps=2)
    return steps.compare(made, certificate.reference(draw, train=2)).largest


@pytest.mark.parametrize(("label", "kind"), [("tp2", "dense"), ("fsdp2-ep2", "moe")])
def test_a_model_that_was_never_whole_is_filled_from_files(tmp_path, label, kind):
    save(cases.model(Draw(kind=kind, seed=4)), tmp_path)
    assert max(ranks.run(from_files, 2, label, kind, tmp_path)) < 3e-6  # float32


def narrow() -> tuple[float, set[torch.dtype], set[torch.dtype]]:
    mesh = Mesh(Layout(dp_shard=2))
    draw = Draw(seed=4)
    mixed = Parallel(data=DataParallel(param_dtype="bfloat16", reduce_dtype="float32"))
    model = parallelize(cases.model(draw), mesh, mixed)
    seen: set[torch.dtype] = set()
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.add(output[0].dtype))
    loss, _ = steps.backward(model, cases.share(draw, mesh.data_rank, 2), mesh)
    wanted = certificate.reference(draw, train=0).loss
    return abs(loss - wanted) / wanted, seen, {parameter.grad.dtype for parameter in model.parameters()}


def test_bf16_weights_with_float32_sums(two_ranks):
    for difference, computed, reduced in (found["narrow"] for found in two_ranks):
        assert 0 < difference < 2e-2
        assert (computed, reduced) == ({torch.bfloat16}, {torch.float32})


def balanced() -> list[tuple[float, float]]:
    """The sum over the ranks of their parts of the balance loss, and what one process has."""
    mesh = Mesh(Layout(dp_shard=2))
    return [_balanced(mesh, kind) for kind in ("world", "sequences")]


def _balanced(mesh: Mesh, kind: str) -> tuple[float, float]:
    draw = dataclasses.replace(DRAW, samples=6)
    model = cases.model(draw, torch.float64)
    batch = cases.share(draw, mesh.data_rank, 2)
    part = expert.balance_loss(model.loss(batch).loads, mesh, top_k=2, config=ExpertParallel(balance=kind))
    total = mesh.all_reduce(part.detach().clone(), expert.TOKENS)
    whole = cases.share(draw)
    if kind == "world":
        return float(total), float(load_balancing_loss(model.loss(whole).loads, tokens=whole.tokens))
    batches = [cases.share(draw, rank, 2) for rank in range(2)]
    each = [batch.tokens * load_balancing_loss(model.loss(batch).loads, tokens=batch.tokens) for batch in batches]
    return float(total), float(sum(each) / whole.tokens)


def test_the_balance_loss_is_over_the_tokens_it_names(two_ranks):
    for found in (one["balanced"] for one in two_ranks):
        assert found[0][1] != pytest.approx(found[1][1], rel=1e-4)
        for total, wanted in found:
            assert total == pytest.approx(wanted, rel=1e-9)


def biases() -> float:
    draw = Draw(seed=4, bias=True)
    made = certificate.parallel(certificate.mesh_of(Layout(dp_shard=2, tp=2)), draw, train=1, dtype=torch.float64)
    assert "model.language_model.layers.1.self_attn.o_proj.bias" in made.grads
    return steps.compare(made, certificate.reference(draw, train=1, dtype=torch.float64)).largest


def test_biases_in_the_attention_are_added_once():
    assert max(ranks.run(biases, 4)) < 1e-10


def refusals() -> list[str]:
    messages = []
    for layout in (Layout(pp=2), Layout(cp=2)):
        with pytest.raises(LayoutError) as refused:
            parallelize(cases.model(Draw()), Mesh(layout))
        messages.append(str(refused.value))
    partial = torch.nn.Parameter(torch.ones(2))
    mesh = Mesh(Layout(dp_shard=2))
    weight = torch.nn.Parameter(DTensor.from_local(torch.ones(2), mesh.data_mesh, [Partial()], run_check=False))
    weight.grad = weight.detach()
    try:
        data.grad_norm([partial, weight])
    except ValueError as error:
        messages.append(str(error))
    dist.barrier()
    return messages


def test_what_is_not_built_is_refused(two_ranks):
    for messages in (found["refusals"] for found in two_ranks):
        assert [message.partition(";")[0] for message in messages] == [
            "layout pp2: pp 2: this axis is not built yet",
            "layout cp2: cp 2: this axis is not built yet",
            "grad_norm: a gradient [2] is not summed: (Partial(sum),)",
        ]


def all_of_two_ranks() -> dict[str, Any]:
    return {"options": options(), "narrow": narrow(), "balanced": balanced(), "refusals": refusals()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    """What each rank found; started once for all of these tests."""
    return ranks.run(all_of_two_ranks, 2)


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="param_dtype must be one of float32, bfloat16, float16 or None; got 'int8'"):
        DataParallel(param_dtype="int8")
    with pytest.raises(ValueError, match="balance must be one of world, replica, sequences; got 'layer'"):
        ExpertParallel(balance="layer")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_images_are_dealt_out_evenly(size):
    for _ in range(50):
        sizes = torch.randint(1, 60, (int(torch.randint(0, 12, ())),)).tolist()
        bounds = split_evenly(sizes, size)
        assert (bounds[0], bounds[-1], len(bounds)) == (0, len(sizes), size + 1)
        parts = [sum(sizes[a:b]) for a, b in pairwise(bounds)]
        assert all(a <= b for a, b in pairwise(bounds))
        if sizes:  # nobody has more than its share and one image
            assert max(parts) <= sum(sizes) / size + max(sizes)
