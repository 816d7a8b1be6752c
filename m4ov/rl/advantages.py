"""From rewards of several kinds to one advantage for each answer: a table over (N, c) for what is right or wrong,
group-relative values for the rest, each objective scaled before they are summed. README.md has the derivation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, sqrt

import torch
from torch import Tensor

from m4ov.rl_recipe import AdvantageConfig
from m4ov_kernels.head import group_advantages

#: Numbers summed over all ranks, as ``World.reduce`` with a name in front does it.
Reduce = Callable[[list[float]], list[float]]


@dataclass(frozen=True)
class Outcomes:
    """What the advantages of right and wrong answers to a prompt are, by how many of its N are right.

    Attributes:
        size: N.
        choices: of each c from 0 to N: "pass_at_k", "pass_at_1" or "skip".
        values: float64 ``[N + 1, 2]``: of a wrong and of a right answer.
    """

    size: int
    choices: tuple[str, ...]
    values: Tensor

    def text(self) -> str:
        """The table, a line for each c."""
        lines = [f"right of {self.size}  choice     wrong     right"]
        for count, (choice, (wrong, right)) in enumerate(zip(self.choices, self.values.tolist(), strict=True)):
            lines.append(f"{count:>{len(f'right of {self.size}')}}  {choice:<9}  {wrong:+.4f}  {right:+.4f}")
        return "\n".join(lines)


def pass_at_k(size: int, correct: int, k: int) -> float:
    """The chance that at least one of k different answers of N is right, c of them being so: ``1 − C(N−c, k)/C(N, k)``.
    Unbiased for independent answers (Chen et al., arXiv 2107.03374).

    Raises:
        ValueError: not ``0 ≤ c ≤ N`` and ``1 ≤ k ≤ N``.
    """
    if not 0 <= correct <= size or not 1 <= k <= size:
        raise ValueError(f"pass_at_k: expected 0 <= correct <= size and 1 <= k <= size; got {correct}, {size}, {k}")
    return 1.0 - comb(size - correct, k) / comb(size, k)


def subset_advantages(size: int, correct: int, k: int, *, scaled: bool = True) -> tuple[float, float]:
    """Of a wrong and of a right answer: the mean advantage of the k-subsets it is in, a subset's reward being whether
    any of it is right. (0, 0) where all subsets have the same. ``scaled``: over the standard deviation of subsets."""
    none_right = comb(size - correct, k) / comb(size, k)
    mean = 1.0 - none_right
    sigma = sqrt(mean * none_right)
    if sigma == 0.0:
        return 0.0, 0.0
    divisor = sigma if scaled else 1.0
    alone = comb(size - correct - 1, k - 1) / comb(size - 1, k - 1)  # a wrong one's other k − 1 are wrong too
    return (none_right - alone) / divisor, none_right / divisor


def outcomes(size: int, config: AdvantageConfig) -> Outcomes:
    """The table for N answers.

    Raises:
        ValueError: k is larger than N.
    """
    if size < 1:
        raise ValueError(f"outcomes: expected at least 1 answer to a prompt; got {size}")
    uses = tuple(rule.use for rule in config.rules)
    if "pass_at_k" in uses and config.k > size:
        raise ValueError(f"advantages.k: expected at most {size}, the answers to a prompt; got {config.k}")
    shares = tuple(rule.up_to for rule in config.rules)
    return _table(size, config.k, uses, shares, config.kind == "grpo")


@lru_cache(maxsize=64)
def _table(size: int, k: int, uses: tuple[str, ...], shares: tuple[float, ...], scaled: bool) -> Outcomes:
    choices, values = [], []
    for correct in range(size + 1):
        choice = next(use for use, share in zip(uses, shares, strict=True) if correct / size <= share + 1e-12)
        if choice == "pass_at_k" and size - correct < k:
            choice = "pass_at_1"  # every k-subset has a right one: nothing to learn there but from single answers
        if correct in (0, size):
            choice = "skip"
        choices.append(choice)
        of = {"pass_at_k": k, "pass_at_1": 1}
        values.append(subset_advantages(size, correct, of[choice], scaled=scaled) if choice in of else (0.0, 0.0))
    return Outcomes(size, tuple(choices), torch.tensor(values, dtype=torch.float64))


@dataclass(frozen=True)
class Composed:
    """Of n answers in G groups.

    Attributes:
        advantages: float32 ``[n]``, the sum of the parts.
        parts: objective → float64 ``[n]``, scaled and weighted.
        choices: of each group, what its counts chose ("" without an outcome).
        informative: bool ``[G]``: some answer of the group has an advantage; the others are to be sampled again.
        metrics: of this step, over all ranks: ``rms_<objective>`` before it was scaled, ``share_<objective>``: of the
            groups in which it tells answers apart, ``informative``, and ``chose_<choice>``, as shares of groups.
    """

    advantages: Tensor
    parts: dict[str, Tensor]
    choices: tuple[str, ...]
    informative: Tensor
    metrics: dict[str, float]


def compose(
    values: Mapping[str, Sequence[float] | Tensor],
    correct: Sequence[bool] | Tensor,
    sizes: Sequence[int],
    config: AdvantageConfig,
    *,
    reduce: Reduce | None = None,
) -> Composed:
    """One advantage for each answer.

    Args:
        values: component → ``[n]``, group after group; those that are no objective are left alone.
        correct: ``[n]``, bool.
        sizes: answers of each group.
        reduce: sums numbers over ranks; ``None``: this rank has the whole step.

    Raises:
        ValueError: an objective has no values, or their number is not that of the answers; a value is not finite; k is
            larger than a group.
    """
    right = torch.as_tensor(correct, dtype=torch.bool)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    count = int(bounds[-1])
    if right.shape != (count,):
        raise ValueError(f"compose: correct: expected [{count}], the sum of sizes; got {list(right.shape)}")
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes), dtype=torch.int64))
    raw: dict[str, Tensor] = {}
    choices: tuple[str, ...] = ("",) * len(sizes)
    for name, objective in config.objectives.items():
        if name == config.outcome:
            tables = [outcomes(size, config) for size in sizes]
            counts = [int(part.sum()) for part in right.split(list(sizes))]
            choices = tuple(table.choices[c] for table, c in zip(tables, counts, strict=True))
            found = [table.values[c] for table, c in zip(tables, counts, strict=True)]
            rows = torch.stack(found) if found else torch.zeros(0, 2, dtype=torch.float64)
            raw[name] = torch.where(right, rows[group, 1], rows[group, 0])
            continue
        if name not in values:
            known = ", ".join(values)
            raise ValueError(f"advantages.objectives.{name}: expected one of the rewards {known}; got no such")
        rewards = torch.as_tensor(values[name], dtype=torch.float64)
        if rewards.shape != (count,) or not bool(rewards.isfinite().all()):
            expected = f"[{count}] finite values"
            raise ValueError(f"compose: values[{name!r}]: expected {expected}; got {rewards}")
        among = right if objective.among == "correct" else torch.ones_like(right)
        kind = config.kind if objective.scaled else "dr_grpo"
        raw[name] = _relative(rewards, among, group, bounds, kind, config.min_std)
    return _summed(raw, choices, bounds, config, reduce)


def _relative(rewards: Tensor, among: Tensor, group: Tensor, bounds: Tensor, kind: str, min_std: float) -> Tensor:
    """Values less their group's mean ("grpo": over its standard deviation) among some of the answers; 0 for the
    others."""
    count = bounds.shape[0] - 1
    inner = torch.zeros(count + 1, dtype=torch.int64)
    inner[1:] = torch.bincount(group[among], minlength=count).cumsum(0) if count else inner[1:]
    found = group_advantages(rewards[among], inner, kind=kind, unbiased=False)
    told = torch.where((found.std >= min_std)[group[among]], found.advantages, 0.0)
    return torch.zeros_like(rewards).masked_scatter(among, told)


def _summed(
    raw: dict[str, Tensor], choices: tuple[str, ...], bounds: Tensor, config: AdvantageConfig, reduce: Reduce | None
) -> Composed:
    """Each objective to the same size over the step, by the answers of those groups in which it tells any apart."""
    groups, sizes = bounds.shape[0] - 1, bounds.diff()
    telling = {name: _any(part != 0, bounds) for name, part in raw.items()}
    own = [float(groups)]
    for name, part in raw.items():
        own += [float(part.square().sum()), float(sizes[telling[name]].sum()), float(telling[name].sum())]
    kinds = ("pass_at_k", "pass_at_1", "skip")
    wanted = [telling[name] for name, objective in config.objectives.items() if objective.weight]
    informative = torch.stack([torch.zeros(groups, dtype=torch.bool), *wanted]).any(0)
    own += [float(informative.sum()), *(float(choices.count(kind)) for kind in kinds)]
    total = own if reduce is None else reduce(own)
    all_groups = max(total[0], 1.0)
    metrics = {"informative": total[-4] / all_groups}
    metrics |= {f"chose_{kind}": n / all_groups for kind, n in zip(kinds, total[-3:], strict=True) if config.outcome}
    parts = {}
    for place, (name, part) in enumerate(raw.items()):
        square, rows, told = total[1 + 3 * place : 4 + 3 * place]
        rms = sqrt(square / rows) if rows else 0.0
        metrics |= {f"rms_{name}": rms, f"share_{name}": told / all_groups}
        scale = 1 / rms if config.normalise == "batch" and rms else 1.0
        parts[name] = config.objectives[name].weight * scale * part
    advantages = torch.stack([torch.zeros(int(bounds[-1]), dtype=torch.float64), *parts.values()]).sum(0)
    return Composed(advantages.float(), parts, choices, informative, metrics)


def _any(flags: Tensor, bounds: Tensor) -> Tensor:
    """Of each group, whether any is true."""
    sums = torch.zeros(flags.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(flags, 0, out=sums[1:])
    return sums[bounds].diff() > 0
