"""What goes wrong in other systems, by the numbers of the list in the project's facts: one test each, for those that
concern these axes. Compared in float64, where a right layout is 1e-14 from one process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from m4ov.parallel import data, ranks
from m4ov.parallel.mesh import Layout, Mesh
from m4ov.parallel.parallelize import Parallel, parallelize
from m4ov.parallel.parity import cases, certificate, steps
from m4ov.parallel.parity.cases import Draw
from m4ov.parallel.tensor import TensorParallel

CLOSE = 1e-10


def gradients(label: str, draw: Draw) -> dict[str, float]:
    """Name of a parameter → the relative difference of its gradient from one process; and the loss'."""
    made = certificate.parallel(certificate.mesh_of(Layout.parse(label)), draw, train=0, dtype=torch.float64)
    wanted = certificate.reference(draw, train=0, dtype=torch.float64)
    found = {name: steps.relative(made.grads[name], grad) for name, grad in wanted.grads.items()}
    return found | {"loss": abs(made.loss - wanted.loss) / abs(wanted.loss)}


def of_text_only_ranks() -> dict[str, float]:
    draw = Draw(seed=3, text_only=0.5)
    assert cases.share(draw, 0, 2).images is not None
    assert cases.share(draw, 1, 2).images is None  # the second rank's
    without = Draw(seed=3, text_only=0.0)  # nobody has one
    calls = [("fsdp2", draw), ("tp2", draw), ("fsdp2", without), ("tp2", without)]
    return {f"{call} {name}": value for call in calls for name, value in gradients(*call).items()}


def test_1_a_rank_without_images_joins_every_collective_of_the_vision_tower():
    """transformers#37186, torchtitan#4777: without it the others wait until the time-out. On tensor ranks, among which
    images are dealt out, fewer images than ranks."""
    assert max(ranks.run(of_text_only_ranks, 2, timeout=50)[0].values()) < CLOSE


def of_experts() -> dict[str, float]:
    draw = Draw(kind="moe", seed=1)
    return {f"{label} {name}": value for label in ("tp2-ep2", "tp2") for name, value in gradients(label, draw).items()}


def test_2_the_router_has_the_whole_gradient_under_ep_and_tp(two_ranks):
    """torchtitan#1805, Megatron-LM#5916, transformers#48687: the loss is right, the router's gradient one rank's."""
    found = two_ranks[0]["experts"]
    routers = {name: value for name, value in found.items() if name.endswith("mlp.gate.weight")}
    assert len(routers) == 4
    assert max(routers.values()) < CLOSE
    assert max(found.values()) < CLOSE


def positions(label: str) -> list[tuple[bool, bool]]:
    """Of every layer: whether it got the batch's positions, and whether their three axes differ."""
    draw, layout = Draw(seed=3, text_only=1.0), Layout.parse(label)
    mesh = Mesh(layout)
    model, batch = parallelize(cases.model(draw), mesh), cases.share(draw, mesh.data_rank, layout.data)
    assert len(batch) > 1  # packed
    found = []

    def watch(module, args):
        given = args[1]
        axes = given.ndim == 2 and bool((given[0] != given[1]).any() and (given[1] != given[2]).any())
        found.append((torch.equal(given, batch.position_ids), axes))

    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(watch)
    model.loss(batch).total.backward()
    return found


def flat_positions_matter() -> bool:
    """Whether the certificate would see positions with one axis."""
    draw = Draw(seed=3, text_only=1.0)
    batch = cases.share(draw)
    flat = replace(batch, position_ids=batch.text_position_ids.expand(3, -1).contiguous())
    right, wrong = (steps.record(lambda: cases.model(draw), each, None, steps=0) for each in (batch, flat))
    return steps.compare(wrong, right).largest > 1e3 * certificate.TOLERANCE


def test_4_positions_keep_three_axes_when_packed_and_split(two_ranks):
    """Automodel#2172, axolotl#3817: M-RoPE's positions become 1-D, and only benchmarks show it."""
    assert [found["positions"] for found in two_ranks] == [[(True, True)] * 4] * 2
    assert flat_positions_matter()


UNEVEN = Draw(seed=33, samples=6, images=2, text_only=1.0)


def tower_rows(split_images: bool) -> int:
    """The patches that this rank's tower runs on, of a batch that all tensor ranks have."""
    config = Parallel(tensor=TensorParallel(split_images=split_images))
    model = parallelize(cases.model(UNEVEN), Mesh(Layout(tp=2)), config)
    rows: list[int] = []
    model.model.visual.patch_embed.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model.loss(cases.share(UNEVEN)).total.backward()
    return sum(rows)


def test_5_images_of_many_sizes_are_dealt_out_evenly(two_ranks):
    """VeOmni#280, #1074: by their patches, not by their number; so that no tensor rank waits for long."""
    images = cases.share(UNEVEN).images
    assert images is not None
    sizes = [math.prod(grid) for grid in images.grids]
    at_most = (sum(sizes) + max(sizes)) / 2  # half of all, and half of an image that lies over the middle
    for half in (len(sizes) // 2, -(-len(sizes) // 2)):
        assert max(sum(sizes[:half]), sum(sizes[half:])) > at_most
    dealt, whole = zip(*(found["tower"] for found in two_ranks), strict=True)
    assert sum(dealt) == sum(sizes)
    assert max(dealt) <= at_most
    assert whole == (sum(sizes),) * 2  # without it


def loads() -> dict[str, float]:
    draw = Draw(seed=3, text_only=0.5)
    mesh = Mesh(Layout(dp_replicate=2, dp_shard=2))
    return data.imbalance(cases.share(draw, mesh.data_rank, 4), mesh)


def test_5_uneven_images_are_reported():
    """VeOmni#280: every rank waits for the one with most images. The most of a rank over the mean of all; that the loop
    writes it down, tests/train/test_ranks.py sees."""
    batches = [cases.share(Draw(seed=3, text_only=0.5), rank, 4) for rank in range(4)]
    tokens = [batch.tokens for batch in batches]
    patches = [0 if batch.images is None else len(batch.images.pixel_values) for batch in batches]
    expected = {"tokens": max(tokens) / sum(tokens) * 4, "patches": max(patches) / sum(patches) * 4}
    assert expected["patches"] > 1.5  # two ranks have none
    assert ranks.run(loads, 4) == [pytest.approx(expected, rel=1e-6)] * 4


class Convolutions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in str(func)
        self.products += "mm" in str(func)
        return func(*args, **(kwargs or {}))


def convolutions(label: str) -> tuple[int, bool]:
    draw, layout = Draw(seed=3), Layout.parse(label)
    mesh = Mesh(layout)
    model = parallelize(cases.model(draw), mesh)
    with Convolutions() as mode:
        model.loss(cases.share(draw, mesh.data_rank, layout.data)).total.backward()
    dist.barrier()
    return mode.count, mode.products > 0


def test_10_the_patch_embedding_is_a_matrix_product_under_fsdp_and_tp(two_ranks):
    """pytorch#174051, transformers#45750: the Conv3d is 10 to 50,000 times slower, and wrappers bring it back."""
    assert [found["convolutions"] for found in two_ranks] == [[(0, True)] * 2] * 2


def all_of_two_ranks() -> dict[str, Any]:
    return {
        "experts": of_experts(),
        "positions": positions("fsdp2") + positions("tp2"),
        "tower": (tower_rows(True), tower_rows(False)),
        "convolutions": [convolutions("fsdp2"), convolutions("tp2")],
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    """What each rank found; started once for all of these tests."""
    return ranks.run(all_of_two_ranks, 2)
