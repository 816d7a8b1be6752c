"""What a model does in a few steps, whole tensors of it; and how far two such records are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.parallel import data, expert
from m4ov.parallel.ledger import Ledger
from m4ov.parallel.mesh import Mesh
from m4ov_kernels.nn import MoERouter, load_balancing_loss
from m4ov_kernels.packing import PackedBatch

BALANCE = 0.1  # weight of the experts' balance loss: large, so that its gradient counts
STEPS = 3
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.9}
# Gradients that are zero but for rounding are far below this; AdamW would make ±lr of them.
ADAMW: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01}


@contextmanager
def margins(model: Qwen3VL) -> Iterator[list[float]]:
    """Collects, call by call, the smallest difference between the least probability that a router chose and the largest
    that it did not: where it is small, rounding decides which expert a token goes to."""
    found: list[float] = []

    def watch(module: MoERouter, args: Any, output: Any) -> None:
        with torch.no_grad():
            ordered = F.linear(args[0], module.weight).softmax(-1).sort(-1, descending=True).values
            found.append(float((ordered[:, module.top_k - 1] - ordered[:, module.top_k]).min()))

    hooks = [module.register_forward_hook(watch) for module in model.modules() if isinstance(module, MoERouter)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Record:
    """Float32, whole tensors by parameter name.

    Attributes:
        loss, norm: of the first step.
        grads: of the first step.
        sgd, adamw: the weights after three steps.
        margin: the smallest of :func:`margins` in all steps, of a model on one process; infinite without experts.
        ledger: of the first step, on this rank (:class:`m4ov.parallel.ledger.Ledger`).
    """

    loss: float
    norm: float
    grads: dict[str, Tensor]
    sgd: dict[str, Tensor] = field(default_factory=dict)
    adamw: dict[str, Tensor] = field(default_factory=dict)
    margin: float = math.inf
    ledger: dict[str, dict[str, list[int]]] = field(default_factory=dict)


def record(build: Callable[[], Qwen3VL], batch: PackedBatch, mesh: Mesh | None, *, steps: int = STEPS) -> Record:
    """Of a model that ``build`` makes anew, trained on one batch (the share of this rank)."""
    model = build()
    ledger = Ledger({} if mesh is None else mesh.axis_of_group())
    with ledger if mesh is not None else nullcontext(), _watched(model, mesh) as margin:
        loss, norm = backward(model, batch, mesh)
    # One process without an image does not run the tower, which then has no gradients; others have zeros.
    grads = {n: p.new_zeros(p.shape) if p.grad is None else p.grad for n, p in model.named_parameters()}
    made = Record(loss, norm, {name: whole(grad) for name, grad in grads.items()})
    made.margin, made.ledger = min(margin, default=math.inf), ledger.table()
    if steps:
        for name, kind, arguments in (("sgd", torch.optim.SGD, SGD), ("adamw", torch.optim.AdamW, ADAMW)):
            trained = build()
            with _watched(trained, mesh) as margin:
                optimizer: Any = kind(trained.parameters(), foreach=False, **arguments)
                for _ in range(steps):
                    backward(trained, batch, mesh)
                    optimizer.step()
            setattr(made, name, {key: whole(parameter) for key, parameter in trained.named_parameters()})
            made.margin = min([made.margin, *margin])
    return made


def _watched(model: Qwen3VL, mesh: Mesh | None) -> AbstractContextManager[list[float]]:
    return margins(model) if mesh is None else nullcontext([])


def backward(model: Qwen3VL, batch: PackedBatch, mesh: Mesh | None) -> tuple[float, float]:
    """Leaves the gradients of the mean over the labels of all ranks, and of the experts' balance loss; returns the sum
    of both and the norm of their gradients."""
    model.zero_grad()
    found, text = model.loss(batch), model.config.text
    balance = found.total.new_zeros(())
    if mesh is None:
        mean = found.total / max(found.num_labels, 1)
        if found.loads:
            balance = load_balancing_loss(found.loads, tokens=batch.tokens)
    else:
        mean = data.token_mean(found.total, found.num_labels, mesh)
        if found.loads:
            balance = expert.balance_loss(found.loads, mesh, top_k=text.num_experts_per_tok)
    (mean + BALANCE * balance).backward()
    values = [mean.detach().double(), balance.detach().double()]
    if mesh is not None:
        values = [mesh.all_reduce(values[0], data.AXES), mesh.all_reduce(values[1], expert.TOKENS)]
    return float(values[0] + BALANCE * values[1]), float(data.grad_norm(model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """Collective, if it is distributed."""
    found: Any = tensor.detach()
    return (found.full_tensor() if isinstance(found, DTensor) else found).clone()  # type: ignore[no-any-return]


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖; what must be zero has to be zero."""
    if found.shape != wanted.shape:
        return float("inf")
    difference, size = (float(tensor.norm()) for tensor in (found.double() - wanted.double(), wanted.double()))
    return 0.0 if difference == 0 else difference / size if size else math.inf


@dataclass(frozen=True)
class Difference:
    """The largest relative differences, and of which tensor; ``adamw``: the largest difference over the learning
    rate."""

    loss: float
    norm: float
    grad: float
    grad_of: str
    sgd: float
    sgd_of: str
    adamw: float
    adamw_of: str

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.grad, self.sgd)


def compare(found: Record, wanted: Record) -> Difference:
    """Every tensor of two records.

    Raises:
        KeyError: they are not of the same parameters.
    """
    if found.grads.keys() != wanted.grads.keys():
        raise KeyError(f"other parameters: {sorted(found.grads.keys() ^ wanted.grads.keys())}")

    def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
        return max(((_nan_is_far(relative(a[name], b[name])), name) for name in b), default=(0.0, ""))

    rate = ADAMW["lr"]
    moved = [(_nan_is_far(float((found.adamw[n] - t).abs().max()) / rate), n) for n, t in wanted.adamw.items()]
    return Difference(
        _nan_is_far(abs(found.loss - wanted.loss) / abs(wanted.loss)),
        _nan_is_far(abs(found.norm - wanted.norm) / abs(wanted.norm)),
        *worst(found.grads, wanted.grads),
        *worst(found.sgd, wanted.sgd),
        *max(moved, default=(0.0, "")),
    )


def _nan_is_far(value: float) -> float:
    return value if value == value else float("inf")


def alike_on_all_ranks(values: list[float]) -> bool:
    """Whether every rank has the same bits."""
    own = torch.tensor(values, dtype=torch.float64)
    both = torch.stack([own, -own])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return bool((both[0] == -both[1]).all())
