"""Checkpoints: the same bits on any layout, whole or not there, errors that name what is wrong, older ones intact."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from m4ov.parallel import ranks
from m4ov.parallel.checkpoint import CheckpointError, Checkpoints, checkpoints, full_tensors, inspect, read

TENSORS = {"weight.a": torch.arange(5.0), "Muon.step": torch.tensor(3.0)}


def save(folder: Path, step: int, tensors: dict, state: dict | None = None, *, keep: int = 2) -> Path:
    Checkpoints(folder, keep=keep).save(step, tensors, state or {}, wait=True)
    return checkpoints(folder)[-1]


def load(folder: Path, like: dict) -> tuple[dict, dict | None]:
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in like.items()}
    state = Checkpoints(folder, keep=2).load(tensors)
    return tensors, state


def test_a_checkpoint_comes_back_to_the_bit(tmp_path):
    drawn = torch.randn(100)
    tensors = {"a": drawn, "b": drawn.bfloat16()[::2], "c": drawn.view(10, 10).t(), "empty": torch.zeros(0, 3)}
    save(tmp_path, 7, tensors, {"seconds": 1.5, "data": {"waiting": [[0, 3]]}})
    found, state = load(tmp_path, tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (state["step"], state["seconds"], state["data"]) == (7, 1.5, {"waiting": [[0, 3]]})
    assert load(tmp_path / "nothing", tensors)[1] is None


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, step, TENSORS)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert load(tmp_path, TENSORS)[1]["step"] == 10


def test_every_random_generator_comes_back(tmp_path):
    def drawn() -> tuple:
        return torch.rand(3).tolist(), np.random.random(3).tolist(), random.random(), random.gauss(0, 1)

    random.gauss(0, 1)  # leaves one for the next call
    save(tmp_path, 1, TENSORS)
    first = drawn()
    drawn()
    load(tmp_path, TENSORS)
    assert drawn() == first


def test_what_is_saved_is_what_was_there_when_it_was_called(tmp_path):
    """The background writes a copy: training goes on at once and changes the tensors in place."""
    tensors = {f"weight.{n}": torch.randn(300, 300) for n in range(10)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(1, tensors, {})
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    saved.wait()
    found = dict(read(checkpoints(tmp_path)[-1]))
    assert all(torch.equal(found[name.removeprefix("weight.")], tensor) for name, tensor in before.items())


def broken(path: Path, how: str) -> str:
    """Damages a checkpoint; what its error must say."""
    shard = path / "__0_0.distcp"
    size = shard.stat().st_size
    if how == "missing shard":
        shard.unlink()
        return r"shard __0_0\.distcp is missing"
    if how == "half a shard":
        shard.write_bytes(shard.read_bytes()[:20])
        return rf"shard __0_0\.distcp has 20 bytes, was saved with {size}"
    if how == "no list":
        (path / "state.json").unlink()
        return "No such file"
    if how == "half a list":
        (path / "state.json").write_text('{"format"')
        return "cannot be read"
    if how == "no metadata":
        (path / ".metadata").unlink()
        return r"shard \.metadata is missing"
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    return "format 99, this version reads 1"


@pytest.mark.parametrize(
    "how", ["missing shard", "half a shard", "no list", "half a list", "no metadata", "another format"]
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_loaded(tmp_path, how):
    save(tmp_path, 2, TENSORS)
    expected = broken(save(tmp_path, 4, TENSORS), how)
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    with pytest.raises(CheckpointError, match=rf"step-00000004: cannot be read \(.*{expected}|{expected}"):
        Checkpoints(tmp_path, keep=2).load(tensors)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    with pytest.raises(CheckpointError, match=r"step-00000004.*remove it to go on from an earlier one"):
        inspect(tmp_path / "step-00000004")
    shutil.rmtree(tmp_path / "step-00000004")
    assert load(tmp_path, TENSORS)[1]["step"] == 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, 4, TENSORS)
    start = r"step-00000004: of another model: "
    with pytest.raises(CheckpointError, match=start + r"weight\.a: expected \[2, 3\], found \[5\]"):
        load(tmp_path, TENSORS | {"weight.a": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match=start + r"weight\.b: expected \[1\], found nothing"):
        load(tmp_path, TENSORS | {"weight.b": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=start + r"it has weight\.a, this one has not"):
        load(tmp_path, {"Muon.step": TENSORS["Muon.step"]})


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from m4ov.parallel.checkpoint import CheckpointError, Checkpoints
saved = Checkpoints(Path(sys.argv[1]), keep=2)
saved.save(1, {"weight": torch.zeros(10)}, {}, wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
saved.save(2, {"weight": torch.zeros(1_000_000)}, {})
try:
    saved.wait()
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path):
    child = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "step-00000002: cannot be written" in child.stdout
    assert "earlier ones are intact" in child.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert dict(read(tmp_path / "step-00000001", prefix=""))["weight"].tolist() == [0.0] * 10


def test_what_a_crash_left_is_cleared(tmp_path):
    left = tmp_path / ".writing-00000001"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert load(tmp_path, TENSORS)[1] is None
    save(tmp_path, 1, TENSORS, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step-00000001: cannot be written \(Not a directory\)"):
        save(tmp_path / "file", 1, TENSORS)


# Layouts: (mesh, placements). The tensors are of uneven sizes; the last has fewer rows than some meshes have ranks.
LAYOUTS = {
    "replicated": ((2,), (Replicate(),)),
    "sharded over 2": ((2,), (Shard(0),)),
    "sharded over 3": ((3,), (Shard(0),)),
    "columns over 2": ((2,), (Shard(1),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "two axes": ((2, 2), (Shard(0), Shard(1))),
}


def whole() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(os.environ["M4OV_TEST_SEED"]))
    shapes = {"weight.a": (7, 5), "weight.b": (8, 4), "Muon.momentum_buffer.a": (7, 5), "weight.c": (2, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def laid_out(layout: str) -> dict[str, torch.Tensor]:
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    tensors = {name: distribute_tensor(tensor, mesh, placements) for name, tensor in whole().items()}
    return tensors | {"AdamW.step.a": torch.tensor(4.0)}


def save_laid_out(folder: Path, layout: str) -> None:
    torch.manual_seed(100 + dist.get_rank())
    saved = Checkpoints(folder, keep=1, rank=dist.get_rank(), size=dist.get_world_size())
    saved.save(5, laid_out(layout), {"data": dist.get_rank()})
    saved.wait()


def load_laid_out(folder: Path, layout: str) -> tuple[bool, dict, list[float]]:
    tensors = laid_out(layout)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    state = Checkpoints(folder, keep=1, rank=dist.get_rank(), size=dist.get_world_size()).load(tensors)
    same = all(
        torch.equal(value, (whole() | {"AdamW.step.a": torch.tensor(4.0)})[name])
        for name, value in full_tensors(tensors, keep=True)
    )
    assert any(isinstance(tensor, DTensor) for tensor in tensors.values())
    return same, state, torch.rand(2).tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("sharded over 2", "sharded over 3"),
        ("hybrid", "columns over 2"),
        ("two axes", "replicated"),
        (None, "two axes"),
    ],
)
def test_saved_on_one_layout_and_loaded_on_another(tmp_path, one, other):
    tensors = whole() | {"AdamW.step.a": torch.tensor(4.0)}
    if one is None:
        torch.manual_seed(100)
        save(tmp_path, 5, tensors, {"data": 0})
    else:
        ranks.run(save_laid_out, int(np.prod(LAYOUTS[one][0])), tmp_path, one)
    found = ranks.run(load_laid_out, int(np.prod(LAYOUTS[other][0])), tmp_path, other)
    assert all(same for same, _, _ in found)
    assert {(state["step"], state["data"]) for _, state, _ in found} == {(5, 0)}
    # A rank goes on with its own random state; one that is new makes its own.
    drawn = [tuple(values) for _, _, values in found]
    assert len(set(drawn)) == len(drawn)
    torch.manual_seed(100)
    assert drawn[0] == tuple(torch.rand(2).tolist())
    again, state = load(tmp_path, tensors)  # and on one process
    assert state["step"] == 5
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    exported = dict(read(checkpoints(tmp_path)[-1]))
    assert exported.keys() == {"a", "b", "c"}
    assert torch.equal(exported["c"], tensors["weight.c"])


def save_on_a_full_disk(folder: Path) -> str:
    rank = dist.get_rank()
    saved = Checkpoints(folder, keep=1, rank=rank, size=2)
    mesh = init_device_mesh("cpu", (2,))
    tensors = {"weight.a": distribute_tensor(torch.randn(1000, 100), mesh, (Shard(0),))}
    saved.save(1, tensors, {}, wait=True)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    saved.save(2, tensors, {})
    with pytest.raises(CheckpointError) as failure:
        saved.wait()
    return str(failure.value)


def test_one_ranks_full_disk_fails_on_all_and_leaves_the_older_checkpoint(tmp_path):
    for message in ranks.run(save_on_a_full_disk, 2, tmp_path):
        assert "step-00000002: cannot be written (rank 1: " in message
        assert "earlier ones are intact" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    inspect(tmp_path / "step-00000001")
