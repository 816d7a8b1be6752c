"""Layouts: how they are written, what is refused before a process group is made, and which ranks share what."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from m4ov.parallel import ranks
from m4ov.parallel.mesh import DENSE, Layout, LayoutError, Mesh, ModelSizes, check, layouts, nearest

DENSE_MODEL = ModelSizes(layers=36, heads=32, key_value_heads=8, intermediate_size=12288, vocab_size=151936)
MOE = ModelSizes(layers=48, heads=32, key_value_heads=4, intermediate_size=6144, vocab_size=151936, experts=128)


@pytest.mark.parametrize("label", ["1", "fsdp8", "dp2-fsdp2-tp2-ep4", "cp2-tp2", "pp2", "tp8-ep2"])
def test_labels_go_both_ways(label):
    assert str(Layout.parse(label)) == label


@pytest.mark.parametrize(
    ("label", "part"), [("fsdp", "'fsdp'"), ("tp2-tp4", "'tp4'"), ("zp2", "'zp2'"), ("", "''"), ("tp-2", "'tp'")]
)
def test_a_wrong_label_names_its_part(label, part):
    with pytest.raises(LayoutError, match=f"got {part}"):
        Layout.parse(label)


@pytest.mark.parametrize("size", [0, -2, 1.5, True, "2"])
def test_an_axis_is_a_whole_number(size):
    with pytest.raises(LayoutError, match="tp must be a whole number of at least 1"):
        Layout(tp=size)


@pytest.mark.parametrize(
    ("label", "world", "model", "problem", "near"),
    [
        ("fsdp2-tp3", 8, None, "it has 6 ranks (dp_shard 2 · tp 3), the world has 8", "fsdp2-tp4"),
        ("fsdp2-tp2-ep8", 4, None, "ep 8 does not divide the 4 ranks", "fsdp2-tp2-ep4"),
        ("tp6", 6, DENSE_MODEL, "tp 6 does not divide the 32 attention heads (legal and near: 8, 4,", "fsdp3-tp2"),
        ("tp8-ep8", 8, MOE, "tp 8 does not divide the 4 key-value heads (legal and near: 4,", "fsdp2-tp4-ep8"),
        ("fsdp4-ep2", 4, DENSE_MODEL, "ep 2 needs experts, and the model is dense", "fsdp4"),
        ("fsdp3-ep3", 3, MOE, "ep 3 does not divide the 128 experts (legal and near: 4, 2", "fsdp3"),
        ("pp5", 5, DENSE_MODEL, "pp 5 does not divide the 36 layers (legal and near: 6, 4,", "fsdp5"),
    ],
)
def test_what_does_not_divide_is_refused_without_a_process_group(label, world, model, problem, near):
    assert not dist.is_initialized()
    with pytest.raises(LayoutError) as refused:
        check(Layout.parse(label), world, model)
    message = str(refused.value)
    assert message.startswith(f"layout {label}: {problem}")
    assert near in message.partition("nearest legal layouts of")[2].split(": ")[1].split(", ")


@pytest.mark.parametrize("model", [None, DENSE_MODEL, MOE])
@pytest.mark.parametrize("world", [1, 6, 8, 512])
def test_the_nearest_layouts_are_legal(world, model):
    for layout in nearest(Layout(dp_shard=3, tp=5, ep=7), world, model):
        check(layout, world, model)
        assert layout.world == world


def test_every_layout_of_a_world_once():
    found = list(layouts(8))
    assert len(found) == len(set(found))
    assert {layout.world for layout in found} == {8}
    assert all(layout.fold % layout.ep == 0 for layout in found)
    assert len({tuple(getattr(layout, axis) for axis in DENSE) for layout in found}) == 35  # C(3 + 4, 4)


def members(layout: Layout) -> dict:
    mesh = Mesh(layout)
    axes = [*DENSE, "ep", "ep_shard"]
    groups = {axis: mesh.group(axis) for axis in axes}
    total = mesh.all_reduce(torch.tensor([2 ** dist.get_rank()]), ("dp_replicate", "dp_shard"))
    return {axis: dist.get_process_group_ranks(group) for axis, group in groups.items() if group} | {
        "summed": int(total),
        "data_rank": mesh.data_rank,
        "labels": sorted(set(mesh.axis_of_group().values())),
    }


def test_who_shares_what():
    """dp2-fsdp2-tp2-ep2: the tensor ranks are neighbours, and so are the ranks that share experts."""
    found = ranks.run(members, 8, Layout.parse("dp2-fsdp2-tp2-ep2"))
    assert [one["data_rank"] for one in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found[5] == {
        "tp": [4, 5],
        "dp_shard": [5, 7],
        "dp_replicate": [1, 5],
        "ep": [4, 5],
        "ep_shard": [5, 7],
        "summed": 2**1 + 2**3 + 2**5 + 2**7,
        "data_rank": 2,
        "labels": ["dp_replicate", "dp_shard", "ep", "ep_shard", "fold", "tp"],
    }


def refused() -> str:
    try:
        Mesh(Layout(tp=3))
    except LayoutError as error:
        return str(error)
    return ""


def test_a_mesh_of_another_world_is_refused():
    assert "it has 3 ranks (tp 3), the world has 2" in ranks.run(refused, 2)[0]
