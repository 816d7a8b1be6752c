"""The loops of the SFT benchmark, each in a process of its own (:mod:`m4ov_bench.turns`): ours, and its peers'.

All begin with the weights that the recipe draws, have the same samples in every step, and the same learning rates.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from m4ov_bench.peers import trainers
from m4ov_bench.turns import Turns
from m4ov_kernels.packing import PackedBatch

if TYPE_CHECKING:
    from m4ov.data import Mixture, Pool
    from m4ov.manifest import CurriculumConfig
    from m4ov.sft import Task

ADAMW, RECIPE = "AdamW", "Muon and AdamW, as the recipe"  # what trains ours


@dataclass(frozen=True)
class End:
    """What a loop did.

    Attributes:
        loss: of the first step, the mean over its labels.
        tokens, labels, slots: of the first step, as the model was given them; slots: with the padding.
        peak_mib: the most memory of the process from before its model was made, beyond what it held then; ``None``
            where the system cannot tell. Workers have their own.
        wait: the share of the loop's time in which it waited for data; ``None``: it does not say.
    """

    loss: float
    tokens: int
    labels: int
    slots: int
    peak_mib: float | None
    wait: float | None = None


@dataclass(frozen=True)
class Work:
    """What all of them train, on what: the recipe's configuration, tokenizer and pools.

    Attributes:
        counts: pool → images of a step.
        seed: of weights and samples.
    """

    config: CurriculumConfig
    task: Task
    pools: tuple[Pool, ...]
    counts: dict[str, int]
    seed: int

    def mixture(self) -> Mixture:
        """The samples of every step."""
        from m4ov.data import Mixture

        return Mixture(self.pools, self.counts, self.task.encoder, seed=self.seed, dtype=self.task.dtype)

    def model(self) -> nn.Module:
        """Ours, with the random weights that all begin with."""
        from m4ov.sft.training import model_of

        return model_of(self.config, self.task, self.seed)


class AllAdamW(nn.Module):
    """A model under other names of its parameters: Muon knows its matrices by their names, so AdamW has them all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def named_parameters(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for index, (_, parameter) in enumerate(self.model.named_parameters(*arguments, **options)):
            yield f"parameter {index}", parameter


def hugging_face(task: Task, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """transformers' class with these weights, in training mode.

    Raises:
        RuntimeError: its parameters have other names.
    """
    from m4ov.models.qwen3_vl import build, cast_parameters

    model = build(task.model_config, seed=0)
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        raise RuntimeError(f"parameters differ: {sorted(parameters.keys() ^ weights.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    model.config.use_cache = model.config.text_config.use_cache = False
    return cast_parameters(model, dtype).train()


def ours(turns: Turns, kind: str, file: Path, threads: int) -> End:
    """The recipe's loop, with the recipe's model and data. ``kind``: ``ADAMW`` or ``RECIPE``; ``file``: the work."""
    torch.set_num_threads(threads)
    work: Work = pickle.loads(file.read_bytes())
    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401  the loop imports it; a library is not its memory

    from m4ov.models.qwen3_vl import training_flops
    from m4ov.sft.training import loss_of
    from m4ov.train import train
    from m4ov.train.machine import peak_mib, reset_peak_mib
    from m4ov.train.metrics import read

    first: list[tuple[float, int, int]] = []

    def loss_with_notes(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
        loss, labels = loss_of(model.model if isinstance(model, AllAdamW) else model, batch)
        if not first:
            first.append((loss.item() / labels, batch.tokens, labels))
        return loss, labels

    held = reset_peak_mib()
    model = work.model()
    with tempfile.TemporaryDirectory(prefix="m4ov-bench-") as name:
        train(
            AllAdamW(model) if kind == ADAMW else model,
            work.mixture(),
            loss_with_notes,
            config=work.config.train,
            optim=work.config.optim,
            folder=Path(name),
            console=Console(quiet=True),
            flops_of=lambda batch: training_flops(work.task.model_config, batch),
            callback=_Between(turns),
        )
        rows = read(Path(name) / "metrics.jsonl")
    lengths = [row["step"] - before for row, before in zip(rows, [0, *(row["step"] for row in rows)], strict=False)]
    waited, took = (
        sum(row[key] * steps for row, steps in zip(rows, lengths, strict=True))
        for key in ("data_wait_seconds", "step_seconds")
    )
    ((loss, tokens, labels),) = first
    return End(loss, tokens, labels, tokens, _beyond(peak_mib(), held), waited / took)


class _Between:
    """A callback of the loop (:class:`m4ov.train.Callback`) that waits between the steps."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.ended = turns, False

    def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def begin(self, state: dict[str, Any] | None) -> None:
        self.ended = not self.turns.begin()

    def after_step(self, done: int) -> None:
        self.ended = not self.turns.next()

    def state_dict(self) -> dict[str, Any]:
        return {}


def theirs(turns: Turns, name: str, file: Path, threads: int, steps: int) -> End:
    """A peer's loop: ``name`` of :data:`m4ov_bench.peers.trainers.NAMES`; ``steps``: how many have samples."""
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns of the worker that is forked
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    work: Work = pickle.loads(file.read_bytes())
    from transformers import Trainer, TrainerCallback  # noqa: F401  before the memory is looked at
    from transformers import logging as transformers_logging

    from m4ov.data import to_hugging_face
    from m4ov.train.machine import peak_mib, reset_peak_mib

    if name == trainers.TRL:
        import trl.trainer.sft_trainer  # noqa: F401

    transformers_logging.set_verbosity_error()
    mixture = work.mixture()
    by_step = [trainers.samples_of(mixture.batch(step)) for step in range(steps)]
    per_step = len(by_step[0])
    if any(len(samples) != per_step for samples in by_step):
        raise RuntimeError(f"steps differ in their samples: {sorted({len(samples) for samples in by_step})}")
    samples = [sample for samples in by_step for sample in samples]
    weights = {name: weight.detach() for name, weight in work.model().named_parameters()}
    first: dict[str, Any] = {}

    class Between(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if not turns.begin():
                control.should_training_stop = True

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if not turns.next():
                control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "loss" in logs:
                first.setdefault("loss", float(logs["loss"]))

    def look(module: nn.Module, arguments: Any, inputs: dict[str, Tensor]) -> None:
        first["tokens"] = int(inputs["attention_mask"].sum())
        first["slots"] = inputs["attention_mask"].numel()
        first["labels"] = int((inputs["labels"][:, 1:] != -100).sum())
        looking.remove()

    optim = work.config.optim
    held = reset_peak_mib()
    model = hugging_face(work.task, weights, trainers.weights_dtype(name))
    looking = model.register_forward_pre_hook(look, with_kwargs=True)
    with tempfile.TemporaryDirectory(prefix="m4ov-bench-") as folder:
        options = {
            "output_dir": folder,
            "max_steps": work.config.train.steps,
            "learning_rate": optim.lr,
            "lr_scheduler_type": "cosine",
            "warmup_steps": optim.warmup_steps,
            "adam_beta1": optim.betas[0],
            "adam_beta2": optim.betas[1],
            "weight_decay": 0.0,  # as ours: of Muon's matrices alone
            "max_grad_norm": optim.max_grad_norm,
        }
        tokenizer = to_hugging_face(work.task.tokenizer)
        loop = trainers.trainer(
            name, model, samples, per_step, tokenizer=tokenizer, callback=Between(), options=options
        )
        loop.train()
    return End(first["loss"], first["tokens"], first["labels"], first["slots"], _beyond(peak_mib(), held))


def _beyond(peak: float | None, held: float | None) -> float | None:
    return None if peak is None or held is None else peak - held
