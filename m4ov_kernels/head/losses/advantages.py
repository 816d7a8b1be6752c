"""Advantages from the rewards of a group of rollouts of one prompt, and reward shaping by length."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.head.losses.rows import Segments, float_rows, option, segments

KINDS = ("grpo", "dr_grpo")


class GroupAdvantages(NamedTuple):
    """``advantages``: ``[n]``. Of each of the G groups: ``mean``, ``std`` (of its rewards) and ``zero_std`` (bool: all
    rewards are equal, so there is nothing to learn; DAPO samples such prompts again)."""

    advantages: Tensor
    mean: Tensor
    std: Tensor
    zero_std: Tensor


def group_advantages(
    rewards: Tensor, groups: int | Tensor, *, kind: str = "grpo", unbiased: bool = True, eps: float = 1e-6
) -> GroupAdvantages:
    """Rewards relative to those of the same prompt: ``(r − mean) / (std + eps)``, or ``r − mean``.

    Args:
        rewards: ``[n]`` float32 or float64, group after group.
        groups: how many rollouts each group has, or their bounds: ``[G + 1]`` int32 or int64, from 0 to ``n``.
        kind: ``"grpo"`` (also for DAPO, GSPO, CISPO) divides by the standard deviation, ``"dr_grpo"`` does not.
        unbiased: whether the variance divides by one less than the group's size, as ``torch.std`` and TRL do.
        eps: added to the standard deviation.

    Returns:
        :class:`GroupAdvantages` of the dtype of ``rewards``, detached. Where all rewards of a group are equal, as those
        of one rollout are, advantages are exactly 0.

    Raises:
        TypeError, ValueError: naming argument, what was expected and what came.

    Source: GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783; dynamic sampling: DAPO, arXiv 2503.14476.
    """
    operator = "group_advantages"
    checks.one_of(operator, "kind", kind, KINDS)
    option(operator, "eps", eps)
    _vector(operator, "rewards", rewards)
    rewards = rewards.detach()
    found = _groups(operator, groups, rewards)
    size = found.bounds.diff()
    mean = found.sums(rewards) / size.clamp(min=1)
    centred = rewards.double() - found.spread(mean)
    std = (found.sums(centred.square()) / (size - int(unbiased)).clamp(min=1)).sqrt()
    least, greatest = found.extremes(rewards)
    zero_std = least >= greatest  # of an empty group inf and −inf; the mean of equal numbers may be a rounding away
    std = torch.where(zero_std, 0.0, std)
    advantages = centred / (found.spread(std) + eps) if kind == "grpo" else centred
    advantages = found.or_nan(torch.where(found.spread(zero_std), 0.0, advantages))
    return GroupAdvantages(advantages.to(rewards.dtype), mean.to(rewards.dtype), std.to(rewards.dtype), zero_std)


def pass_at_k_advantages(correct: Tensor, groups: int | Tensor, *, k: int) -> Tensor:
    """Advantages of the reward "at least one of k rollouts is right", averaged over all choices of k from the group.

    With N rollouts, c of them right and ``n = N − c``: ``R̄ = 1 − C(n, k)/C(N, k)``, ``σ = √(R̄(1 − R̄))``; a right one
    has ``(1 − R̄)/σ``, a wrong one ``(1 − R̄ − C(n − 1, k − 1)/C(N − 1, k − 1))/σ``; 0 where σ = 0, so where ``n < k``:
    mix with :func:`group_advantages` there.

    Args:
        correct: bool ``[n]``, group after group.
        groups: as :func:`group_advantages`.
        k: from 1 to the size of the smallest group.

    Returns:
        float32 ``[n]``.

    Raises:
        TypeError, ValueError: naming argument, what was expected and what came. On a GPU, where group sizes are not
        seen, the advantages of a smaller group are NaN.

    Source: "Pass@k training", arXiv 2508.10751.
    """
    operator = "pass_at_k_advantages"
    if not isinstance(correct, Tensor) or correct.dtype is not torch.bool or correct.ndim != 1:
        checks.refuse(TypeError, operator, "correct", "a bool tensor [n]", checks.describe(correct))
    found = _groups(operator, groups, correct)
    if isinstance(k, bool) or not isinstance(k, int):
        checks.refuse(TypeError, operator, "k", "an int", checks.describe(k))
    size = found.bounds.diff().double()
    if k < 1 or (isinstance(groups, int) and k > groups):
        checks.refuse(ValueError, operator, "k", "from 1 to the size of the smallest group", repr(k))
    if size.device.type == "cpu" and not torch.compiler.is_compiling() and bool((size < k).any()):
        expected = f"from 1 to {int(size.min())}, the size of the smallest group"
        checks.refuse(ValueError, operator, "k", expected, repr(k))
    wrong = size - found.sums(correct)
    steps = torch.arange(k, device=size.device)

    def chance(n: Tensor, of: Tensor, draws: Tensor) -> Tensor:  # C(n, k) / C(of, k), as a product
        return ((n[:, None] - draws).clamp(min=0) / (of[:, None] - draws).clamp(min=1)).prod(1)

    none_right = chance(wrong, size, steps)  # 1 − R̄
    sigma = (none_right * (1 - none_right)).sqrt()
    safe = torch.where(sigma > 0, sigma, 1.0)
    of_right = torch.where(sigma > 0, none_right / safe, 0.0)
    of_wrong = torch.where(sigma > 0, (none_right - chance(wrong - 1, size - 1, steps[:-1])) / safe, 0.0)
    nan = torch.where(size < k, float("nan"), 0.0)
    advantages = torch.where(correct, found.spread(of_right + nan), found.spread(of_wrong + nan))
    return found.or_nan(advantages).float()


def overlong_penalty(lengths: Tensor, *, max_length: int, cache_length: int) -> Tensor:
    """What to add to the reward of a response that is nearly, or altogether, too long; from 0 to −1.

    0 up to ``max_length − cache_length`` tokens, from there in a straight line to −1 at ``max_length`` and beyond.

    Args:
        lengths: integers of any shape, in tokens.
        max_length: of a response.
        cache_length: the last so many tokens before it are punished; from 1 to ``max_length``.

    Returns:
        float32, shaped as ``lengths``.

    Raises:
        TypeError, ValueError: naming argument, what was expected and what came.

    Source: soft overlong punishment, DAPO, arXiv 2503.14476.
    """
    operator = "overlong_penalty"
    checks.index_tensor(operator, "lengths", lengths, (torch.int32, torch.int64))
    for name, value, high in (("max_length", max_length, None), ("cache_length", cache_length, max_length)):
        if isinstance(value, bool) or not isinstance(value, int):
            checks.refuse(TypeError, operator, name, "an int", checks.describe(value))
        if value < 1 or (high is not None and value > high):
            expected = "1 or greater" if high is None else f"between 1 and {high}, max_length"
            checks.refuse(ValueError, operator, name, expected, repr(value))
    return ((max_length - cache_length - lengths).float() / cache_length).clamp(-1.0, 0.0)


def _vector(operator: str, argument: str, value: Any) -> None:
    float_rows(operator, argument, value)
    if value.ndim != 1:
        checks.refuse(ValueError, operator, argument, "[n]", list(value.shape))


def _groups(operator: str, groups: Any, rows: Tensor) -> Segments:
    count = rows.shape[0]
    if isinstance(groups, Tensor):
        return segments(operator, "groups", groups, rows)
    if isinstance(groups, bool) or not isinstance(groups, int):
        checks.refuse(TypeError, operator, "groups", "an int or an int32 or int64 tensor", checks.describe(groups))
    if groups < 1 or count % groups:
        checks.refuse(
            ValueError, operator, "groups", f"1 or greater, and a divisor of the {count} rollouts", repr(groups)
        )
    bounds = torch.arange(0, count + 1, groups, device=rows.device)
    return Segments(bounds, torch.arange(count, device=rows.device) // groups, None)
