"""How much each linear minds being quantised, and which are therefore left in 16 bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m4ov.quantize.calibration import Batch, run
from m4ov.quantize.checkpoint import replace
from m4ov.quantize.linears import Group

#: Share of the quantisable weights that `--keep auto` may leave in 16 bits.
BUDGET = 0.05


@dataclass(frozen=True)
class Sensitivity:
    """One linear, quantised alone.

    Attributes:
        error: ‖ŷ − y‖/‖y‖ of its outputs on the sampled rows.
        loss_change: of the model on the calibration batches, nats a token.
    """

    error: float
    loss_change: float


@contextmanager
def replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """``module`` in place of the one of that name, for a while."""
    before = model.get_submodule(name)
    replace(model, name, module)
    try:
        yield
    finally:
        replace(model, name, before)


@torch.no_grad()
def output_error(module: nn.Module, quantised: nn.Module, rows: Tensor) -> float:
    """Of the two on the same input, in float32."""
    exact = module(rows).float()
    return float((quantised(rows).float() - exact).norm() / exact.norm().clamp_min(1e-30))


@torch.no_grad()
def loss_of(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean of the batches' losses."""
    return sum(float(run(model, batch).loss) for batch in batches) / len(batches)


def measure(
    model: nn.Module,
    quantised: Mapping[str, Callable[[], nn.Module]],
    rows: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    advance: Callable[[], object] = lambda: None,
) -> tuple[float, dict[str, Sensitivity]]:
    """(the model's loss, each linear's sensitivity).

    Args:
        quantised: name → makes the module that replaces it.
        rows: name → sampled inputs [R, K], in the dtype in which the model runs.
        batches: with labels.
    """
    before = loss_of(model, batches)
    found = {}
    for name, make in quantised.items():
        module = make()
        error = output_error(model.get_submodule(name), module, rows[name])
        with replaced(model, name, module):
            found[name] = Sensitivity(error, loss_of(model, batches) - before)
        advance()
    return before, found


@dataclass(frozen=True)
class Keep:
    """How many linears stay in 16 bits: a share of the weights at most (``budget``), or the ``count`` most sensitive.

    ``parse("auto")`` is a budget of 5%, ``parse("3%")`` another, ``parse("4")`` a count.
    """

    budget: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Keep:
        if text == "auto":
            return cls(budget=BUDGET)
        if re.fullmatch(r"\d+", text):
            return cls(count=int(text))
        if re.fullmatch(r"\d+(\.\d+)?%", text) and float(text[:-1]) <= 100:
            return cls(budget=float(text[:-1]) / 100)
        raise ValueError(
            f"--keep: expected auto, a number of linears (4), or a share of the weights (3%); got {text!r}"
        )

    @property
    def asks(self) -> bool:
        """Whether sensitivities are needed."""
        return bool(self.budget or self.count)


def choose(
    groups: Sequence[Group], sizes: Mapping[str, int], found: Mapping[str, Sensitivity], loss: float, keep: Keep
) -> dict[Group, str]:
    """Groups that stay in 16 bits, with the reason. A group (q, k, v; gate, up) stays whole, because engines fuse it.

    Most harmful first: by loss, then by error. Under a budget only harm that counts: more than 1% of the loss and more
    than 0.001 nats.

    Args:
        sizes: weights of each linear.
    """
    harm = {group: sum(found[name].loss_change for name in group.names) for group in groups}
    order = sorted(groups, key=lambda group: (-harm[group], -max(found[name].error for name in group.names)))
    if keep.count is not None:
        chosen: dict[Group, str] = {}
        left = keep.count
        for group in order:
            if left <= 0:
                break
            left -= len(group.names)
            chosen[group] = f"among the {keep.count} most sensitive: {_harm(group, harm, found)}"
        return chosen
    budget = (keep.budget or 0.0) * sum(sizes[name] for group in groups for name in group.names)
    tolerance = max(0.01 * loss, 1e-3)
    chosen = {}
    for group in order:
        size = sum(sizes[name] for name in group.names)
        if harm[group] > tolerance and size <= budget:
            budget -= size
            chosen[group] = f"sensitive: {_harm(group, harm, found)}"
    return chosen


def _harm(group: Group, harm: Mapping[Group, float], found: Mapping[str, Sensitivity]) -> str:
    error = max(found[name].error for name in group.names)
    return f"loss {harm[group]:+.4f} nats, outputs off by {error:.1%}"
