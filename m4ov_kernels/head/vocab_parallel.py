"""A head whose rows are spread evenly over a group: what each rank found of its part, merged.

Each rank knows the log-sum-exp of its own part, in two numbers, and the log-probability of the targets that are there
within it. These three numbers a row are gathered (one more for the entropy, one for the total, and the likeliest
words), never logits; the rest is arithmetic on rows, which every rank does alike. Nothing is sent in the backward:
every rank has the gradients of the merged results, and takes from them those of its own numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from m4ov_kernels import checks


class Found(NamedTuple):
    """Of flat rows: see ``state.Results`` and ``reference.Logprob``."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    total: Tensor
    top_logprobs: Tensor
    top_indices: Tensor
    normalizer: Tensor


@dataclass(frozen=True)
class Shards:
    """This rank's rows among those of the group; ``group`` is ``None`` where they are all here."""

    rows: int
    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> int:
        return self.rank * self.rows

    @property
    def vocab_size(self) -> int:
        return self.size * self.rows


def shards(operator: str, weight: Tensor, group_name: str | None) -> Shards:
    if group_name is None:
        return Shards(weight.shape[0])
    if not isinstance(group_name, str):
        checks.refuse(TypeError, operator, "group_name", "the name of a process group", checks.describe(group_name))
    try:
        group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError):
        checks.refuse(ValueError, operator, "group_name", "the name of a process group", repr(group_name))
    return Shards(weight.shape[0], dist.get_rank(group), dist.get_world_size(group), group)


def merge(
    operator: str, found: Found, targets: Tensor, kept: Tensor, shards: Shards, top_k: int, argument: str = "weight"
) -> Found:
    """The whole vocabulary's results from each rank's. ``targets``, ``kept``: flat rows; which have a target.
    ``argument``: what the operator calls the weight.

    Raises:
        ValueError: (CPU) the ranks do not have the same number of rows of the weight.
    """
    if shards.group is None:
        return found
    owner = torch.where(kept, targets // shards.rows, 0)
    own = [*found.normalizer, torch.where(owner == shards.rank, found.logprob.detach(), 0.0)]
    own += [extra.detach() for extra in (found.entropy, found.total) if extra.numel()]
    own.append(torch.full_like(own[0], shards.rows))
    parts = _gather(torch.stack(own), shards)  # [ranks, 4 to 6, T]
    if parts.device.type == "cpu" and bool((parts[:, -1] != shards.rows).any()):
        expected = f"of as many rows on every rank of the group, {shards.rows} as here"
        checks.refuse(ValueError, operator, argument, expected, parts[:, -1].amax(1).int().tolist())
    logprob, logsumexp, entropy, total = _Merge.apply(*found[:4], parts, owner, kept, shards.rank)
    back = torch.where(kept, found.logsumexp.detach() - logsumexp.detach(), 0.0)
    top_logprobs, top_indices = found.top_logprobs, found.top_indices
    if top_k:
        values = (
            _gather(top_logprobs + back[:, None], shards).transpose(0, 1).flatten(1)
        )  # by rank: smaller words first
        indices = _gather(top_indices, shards).transpose(0, 1).flatten(1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        top_logprobs, top_indices = values.gather(1, order), indices.gather(1, order)
    return found._replace(
        logprob=logprob,
        logsumexp=logsumexp,
        entropy=entropy,
        total=total,
        top_logprobs=top_logprobs,
        top_indices=top_indices,
    )


def _gather(own: Tensor, shards: Shards) -> Tensor:
    parts = own.new_empty(shards.size, *own.shape)
    dist.all_gather(list(parts.unbind()), own.contiguous(), group=shards.group)
    return parts


class _Merge(torch.autograd.Function):
    """With P a rank's share of the probability: log p is log p within the owner's part, plus log P of the owner; the
    entropy is the mean, by P, of each part's entropy less its log P; the total is the sum of the parts'."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logprob: Tensor,
        logsumexp: Tensor,
        entropy: Tensor,
        total: Tensor,
        parts: Tensor,
        owner: Tensor,
        kept: Tensor,
        rank: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        largest = parts[:, 0].amax(0)
        log_share = (parts[:, 0] - largest) + parts[:, 1]  # [ranks, T]
        log_sum = log_share.logsumexp(0)
        log_share = log_share - log_sum
        share = log_share.exp()
        within = parts[:, 2].gather(0, owner[None])[0]
        whole = torch.where(kept, within + log_share.gather(0, owner[None])[0], 0.0)
        mean = entropy
        if entropy.numel():
            mean = torch.where(kept, (share * parts[:, 3] - torch.xlogy(share, share)).sum(0), 0.0)
        ctx.save_for_backward(owner == rank, kept, share[rank], entropy, mean)
        ctx.set_materialize_grads(False)
        sums = parts[:, -2].sum(0) if total.numel() else total
        return whole, torch.where(kept, largest + log_sum, 0.0), mean, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        owned, kept, share, entropy, mean = ctx.saved_tensors
        of_logprob, of_logsumexp, of_entropy, of_total = grads
        grad_logprob, grad_logsumexp, grad_entropy = None, torch.zeros_like(share), None
        if of_logprob is not None:
            grad_logprob = torch.where(owned, of_logprob, 0.0)
            grad_logsumexp += grad_logprob - of_logprob * share
        if of_logsumexp is not None:
            grad_logsumexp += of_logsumexp * share
        if of_entropy is not None and entropy.numel():
            grad_entropy = of_entropy * share
            grad_logsumexp += of_entropy * (share * (entropy - mean) - torch.xlogy(share, share))
        return grad_logprob, torch.where(kept, grad_logsumexp, 0.0), grad_entropy, of_total, None, None, None, None
