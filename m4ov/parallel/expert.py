"""Expert parallelism: each rank holds some of the experts, and tokens travel to theirs and back by all-to-all.

The axis ``ep`` is folded over dp_shard, cp and tp, whose ranks all hold different tokens: under sequence parallelism a
mixture of experts works on the rank's own rows, so nothing is computed twice. The router stays whole on every rank; its
gradient is the sum over all of them, like that of every weight that met only some of the tokens
(:mod:`m4ov.parallel.tensor`). Nothing is dropped and nothing padded: splits are as uneven as the routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard, distribute_tensor

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.parallel import collectives, tensor
from m4ov.parallel.mesh import Mesh
from m4ov_kernels.moe import ExpertLoad, permute, unpermute
from m4ov_kernels.nn import MoEExperts

#: All axes whose ranks hold different tokens.
TOKENS = ("dp_replicate", "dp_shard", "cp", "tp")
#: Over which tokens the experts are to be balanced.
BALANCE = {"world": TOKENS, "replica": ("dp_shard", "cp", "tp"), "sequences": ("cp", "tp")}


@dataclass(frozen=True)
class ExpertParallel:
    """How the experts are kept busy.

    Attributes:
        balance: over which tokens the balance loss asks the experts to be chosen equally often: ``"world"``: those of
            all ranks, as one process with the whole batch would; ``"replica"``: those of one replica of the model;
            ``"sequences"``: those of the ranks that share samples.
    """

    balance: str = "world"

    def __post_init__(self) -> None:
        if self.balance not in BALANCE:
            raise ValueError(f"expert parallel: balance must be one of {', '.join(BALANCE)}; got {self.balance!r}")


def spread(model: Qwen3VL, mesh: Mesh) -> Qwen3VL:
    """Spread the experts of a model over the axis ``ep``, in place; nothing where it has one rank. Before
    :func:`m4ov.parallel.data.shard`. Every rank must hold the same weights (or be on meta); nothing is sent."""
    group = mesh.group("ep")
    if group is None:
        return model
    axis = mesh.submesh("ep")
    for module in model.modules():
        if isinstance(module, MoEExperts):
            for name, parameter in list(module.named_parameters()):
                made = distribute_tensor(parameter.detach(), axis, [Shard(0)], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(made, parameter.requires_grad))
            tensor.localize(module)
            module.forward = partial(_forward, module, group)  # type: ignore[method-assign]
    return model


def _forward(
    module: MoEExperts, group: ProcessGroup, hidden_states: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """As :meth:`m4ov_kernels.nn.MoEExperts.forward`, of this rank's tokens."""
    rows, order, offsets = permute(hidden_states, experts, module.num_experts)
    ranks = dist.get_world_size(group)
    sent = offsets.diff().view(ranks, -1)  # [ranks, E / ranks]: experts are in order of rank
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    to, of = torch.stack([sent.sum(1), received.sum(1)]).tolist()  # on a GPU the host waits here
    arrived = collectives.exchange_rows(rows, to, of, group)  # ordered by rank, then by expert
    each = sent.shape[1]
    owner = torch.arange(each, dtype=torch.int32, device=rows.device).repeat(ranks)
    owner = owner.repeat_interleave(received.flatten(), output_size=sum(of))
    own, place, bounds = permute(arrived, owner[:, None], each)
    done = unpermute(module.grouped(own, bounds), place)
    back = collectives.exchange_rows(done, of, to, group)
    return unpermute(back, order, weights).to(hidden_states.dtype)


def balance_loss(
    loads: Sequence[ExpertLoad], mesh: Mesh, *, top_k: int, config: ExpertParallel | None = None
) -> Tensor:
    """This rank's part of :func:`m4ov_kernels.nn.load_balancing_loss` over the tokens of all ranks: the parts add up to
    it over the axes :data:`TOKENS`, and so do their gradients. With another :attr:`ExpertParallel.balance` they add up
    to the mean of the groups' losses, weighted by their tokens.

    Args:
        loads: of each layer, from this rank's tokens.
        top_k: experts of a token.
    """
    axes = BALANCE[(config or ExpertParallel()).balance]
    counts = torch.stack([load.counts for load in loads]).sum(0)
    probability = torch.stack([load.probability for load in loads]).mean(0)
    tokens = counts.sum() // (len(loads) * top_k)
    within = mesh.all_reduce(counts.clone(), axes)
    # Of the tokens of every layer, how many chose an expert; adds up to K.
    share = within.to(probability.dtype) / (within.sum() // top_k).clamp_min(1)
    everyone = mesh.all_reduce(tokens.clone(), TOKENS).clamp_min(1)
    return share.shape[0] * (share * probability).sum() * (tokens.to(probability.dtype) / everyone)
