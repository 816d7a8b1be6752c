"""Something small that trains on ranks: Muon and AdamW, dropout, packed rows of uneven length, a parameter that few
batches use. Light to import: every rank does so."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

from m4ov.data import PackedLoader
from m4ov.data.loader import Visit
from m4ov.parallel.checkpoint import full_tensors
from m4ov.recipe import OptimConfig, TrainConfig
from m4ov.train import CheckpointError, Interrupted, RankError, TrainResult, World, train

SAMPLES, CAPACITY, WORDS = 57, 24, 11


@dataclass(frozen=True)
class Row:
    ids: Tensor  # [T]
    labels: Tensor  # [T], -100 at the last token of each sample

    @property
    def tokens(self) -> int:
        return len(self.ids)


def row(visits: Sequence[Visit]) -> Row:
    """Tokens follow from the visit alone, whichever rank makes them; few rows have the word 0."""
    ids, labels = [], []
    for epoch, index in visits:
        random = torch.Generator().manual_seed(1000 * epoch + index)
        sample = torch.randint(1, WORDS, (lengths()[index],), generator=random)
        if index % 19 == 0:
            sample[0] = 0
        ids.append(sample)
        labels.append(torch.cat([sample[1:], torch.tensor([-100])]))
    return Row(torch.cat(ids), torch.cat(labels))


def lengths() -> list[int]:
    return [2 + index * 7 % 19 for index in range(SAMPLES)]


class Small(nn.Module):
    def __init__(self, dropout: float = 0.0, always: bool = False) -> None:
        """``always``: the parameter that few batches use takes part in all, as FSDP demands."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.embed = nn.Embedding(WORDS, 16)
            layers = [nn.Linear(16, 16) for _ in range(3)] + [nn.Linear(16, 12), nn.Linear(12, 16)]
            self.text = nn.ModuleDict({"layers": nn.ModuleList(layers)})  # Muon trains what has this name
            self.seldom = nn.Parameter(torch.randn(16))
            self.head = nn.Linear(16, WORDS)
        self.dropout, self.always = dropout, always

    def forward(self, ids: Tensor) -> Tensor:
        hidden_states = self.embed(ids)
        used = (ids == 0).any()  # as a batch with an image uses the tower, and another does not
        if used or self.always:
            hidden_states = hidden_states + self.seldom * used
        for layer in self.text["layers"]:
            hidden_states = F.dropout(torch.tanh(layer(hidden_states)), self.dropout, self.training)
        return self.head(hidden_states)


def summed_loss(model: nn.Module, batch: Row) -> tuple[Tensor, int]:
    total = F.cross_entropy(model(batch.ids), batch.labels, ignore_index=-100, reduction="sum")
    return total, int((batch.labels != -100).sum())


def loader(world: World, rows: int = 4) -> PackedLoader[Row]:
    return PackedLoader(
        lengths(), row, capacity=CAPACITY, rows=rows, seed=3, rank=world.data_rank, ranks=world.data_size
    )


def run(
    folder: Path,
    world: World,
    *,
    steps: int,
    dropout: float = 0.0,
    model: nn.Module | None = None,
    terminate: tuple[int, int] | None = None,
    **train_options: object,
) -> TrainResult:
    """Train it in float32, or go on.

    Args:
        terminate: (step, rank): SIGTERM comes to that rank while it computes that step.
    """
    data = loader(world)
    sent = False

    def loss_of(model: nn.Module, batch: Row) -> tuple[Tensor, int]:
        nonlocal sent
        if (data.step - 1, world.rank) == terminate and not sent:
            sent = True  # a second one would end a rank that is alone at once
            os.kill(os.getpid(), signal.SIGTERM)
        return summed_loss(model, batch)

    options = {"checkpoint_seconds": 0.0, "checkpoint_steps": 1, "log_every": 1, "precision": "fp32", **train_options}
    return train(
        Small(dropout) if model is None else model,
        data,
        loss_of,
        config=TrainConfig(steps=steps, **options),  # type: ignore[arg-type]
        optim=OptimConfig(warmup_steps=2),
        folder=folder,
        console=Console(quiet=True),
        world=world,
    )


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), patience=0.5) if dist.is_initialized() else World()


def sharded(mesh_shape: tuple[int, ...]) -> nn.Module:
    """The small model under FSDP2 (HSDP where the mesh has two axes); gradients are summed, not averaged."""
    model = Small(always=True)
    names = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for layer in model.text["layers"]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def train_small(
    folder: Path,
    mesh: tuple[int, ...] | None = None,
    terminate: tuple[int, int] | None = None,
    always: bool = False,
) -> dict[str, torch.Tensor] | str:
    """The float32 weights after eight steps, or how it was interrupted."""
    model = Small(always=always) if mesh is None else sharded(mesh)
    try:
        found = run(folder, world(), steps=8, model=model, terminate=terminate)
    except Interrupted as interrupt:
        return str(interrupt)
    return {name: tensor for name, tensor in full_tensors(found.weights, keep=True) if tensor is not None}


def die_in_the_second_step(folder: Path, sharded_over: tuple[int, ...] | None = None) -> str:
    def loss_of(model: nn.Module, batch: Row):
        if dist.get_rank() == 1 and (folder / "checkpoints" / "step-00000001").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(model, batch)

    global summed_loss
    original, summed_loss = summed_loss, loss_of
    try:
        run(folder, world(), steps=200, model=None if sharded_over is None else sharded(sharded_over))
    except RankError as error:
        (folder / "error").write_text(str(error))
        raise
    return "it should not come here"


def rank_main(rank: int, size: int, port: int, folder: Path, steps: int, status: int = 7) -> None:
    """A rank as torchrun starts it, with a store that the parent holds. Leaves with ``status`` when another ended."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    world = World.start(10)
    try:
        run(folder, world, steps=steps, dropout=0.1, timeout_seconds=10.0)
    except (RuntimeError, CheckpointError):
        os._exit(status)  # the background save may wait in vain for the rank that is gone
    world.close()
