"""What goes along with a run on records: the average of the weights, and the loss on records that are held out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from m4ov.data import DataError
from m4ov.data.rows import RecordRows
from m4ov.data.whole import write_whole
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.sft.average import Average
from m4ov.sft_recipe import SftConfig
from m4ov.train import World

_TAIL = 5  # "tail" averages over one part of so many


class Along:
    """The loop's callback.

    The loss is the mean over the answers' tokens of all held-out records, on the weights that the run would hand on:
    their average, where there is one. Each rank measures its share of the rows.

    Args:
        held_out: ``None``: nothing is measured.
        folder: of the run; ``held_out.jsonl`` is written there.

    Attributes:
        losses: (step, loss) of every measurement.
    """

    def __init__(
        self,
        config: SftConfig,
        model: Qwen3VL,
        held_out: RecordRows | None,
        folder: Path,
        world: World,
        console: Console,
    ) -> None:
        self.config, self.model, self.held_out = config, model, held_out
        self.folder, self.world, self.console = folder, world, console
        self.ended = False
        self.losses: list[tuple[int, float]] = []
        self.average: Average | None = None

    def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averages, if there are any."""
        if self.config.average.kind == "none":
            return {}
        self.average = Average(self.config.average, weights, -(-self.config.train.steps // _TAIL))
        return self.average.tensors()

    def begin(self, state: dict[str, Any] | None) -> None:
        """Measure where the run starts, or go on."""
        if state is not None:
            self.losses = [(step, loss) for step, loss in state["losses"]]
            return
        if self.average is not None:
            self.average.begin()
        self._measure(0)

    def after_step(self, done: int) -> None:
        """Average; measure, where it is time to."""
        if self.average is not None:
            self.average.after_step(done)
        if done % self.config.evaluate.every == 0 or done == self.config.train.steps:
            self._measure(done)

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        return {"losses": [list(pair) for pair in self.losses]}

    def _measure(self, step: int) -> None:
        if self.held_out is None:
            return
        with nullcontext() if self.average is None else self.average.in_place(self.model):
            loss = self._loss(self.held_out, step)
        self.losses.append((step, loss))
        self.console.print(f"step {step} · held-out loss {loss:.4f}")
        if self.world.first:
            lines = (json.dumps({"step": step, "loss": loss}) for step, loss in self.losses)
            write_whole(self.folder / "held_out.jsonl", "\n".join(lines) + "\n")

    @torch.no_grad()
    def _loss(self, rows: RecordRows, step: int) -> float:
        ranks = self.world.data_size
        total = labels = 0.0
        self.model.eval()
        # Every rank runs the model equally often, on a token without a label where the rows are used up: sharded
        # weights are gathered by all.
        for row in range(self.world.data_rank, -(-len(rows) // ranks) * ranks, ranks):
            _, batch = rows.batch(row)
            with self.world.watched(f"step {step}: the held-out records"):
                found = self.model.loss(batch)
            total, labels = total + found.total.item(), labels + found.num_labels
        self._reshard()
        self.model.train()
        total, labels = self.world.reduce(f"step {step}: held-out loss", [total, labels])
        if not labels:
            raise DataError(f"step {step}: none of the held-out records can be measured: no image of theirs is whole")
        return total / labels

    def _reshard(self) -> None:
        """Of FSDP: after a forward without a backward some weights are still gathered, and would not change."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
