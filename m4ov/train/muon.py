"""Muon, for matrices that one rank has, that all ranks have, or of which each rank has a shard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from m4ov.train.world import World

# Quintic Newton-Schulz coefficients of Muon (Keller Jordan, 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_GATHERED = 2**27  # numbers of whole matrices that a rank holds at once, at most (or one matrix of each rank)


def orthogonalised(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: all singular values between about 0.7 and 1.2.

    Args:
        matrices: ``[N, rows, columns]``. One batched product serves them all: on a CPU a loop over matrices costs
            twice as much.
        dtype: that it computes in.

    Returns:
        ``dtype``, same shape.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, matrices of one shape updated together.

    The same update as ``torch.optim.Muon`` with ``adjust_lr_fn="original"``, which takes matrix after matrix. A weight
    of three dimensions is a stack of matrices, as experts are, each of which is taken by itself; one of more counts as
    the matrix of its first by all the others, as a convolution of patches is.

    Momentum, decay and step are element by element, on what a rank has. The orthogonal step needs whole matrices.
    Where an axis of the mesh cuts them (FSDP, tensor parallel), they are gathered, spread over the ranks, each
    orthogonalised by one, and all-gathered; both travel in ``dtype``. Where it deals out the matrices of a stack
    (experts over their ranks), each rank has whole ones, and nothing is sent. No axis changes the result but for
    rounding; ranks that hold the same weights get the same bits.

    Args:
        params: plain tensors or DTensors; gradients stand at their local shards (``to_local()``).
        world: the ranks, which all hold the plain tensors; ``None``: this one alone.
        dtype: that matrices are orthogonalised in.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        world: World | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        shards = [local(parameter) for parameter in params]
        super().__init__(shards, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.world, self.dtype = world or World(), dtype
        self.layouts = dict(zip(shards, params, strict=True))
        for shard in shards:
            self.state[shard]["momentum_buffer"] = torch.zeros_like(shard)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[object, ...], list[Tensor]] = {}
            for shard in group["params"]:
                if shard.grad is not None:
                    whole = self.layouts[shard]
                    key = (whole.device_mesh, whole.placements) if isinstance(whole, DTensor) else ()
                    alike.setdefault((whole.shape, *key), []).append(shard)
            for shards in alike.values():
                self._update(group, shards)

    def _update(self, group: dict, shards: list[Tensor]) -> None:
        buffers = [self.state[shard]["momentum_buffer"] for shard in shards]
        grads = [shard.grad for shard in shards if shard.grad is not None]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = list(torch._foreach_lerp(grads, buffers, group["momentum"]))  # Nesterov
        torch._foreach_mul_(shards, 1 - group["lr"] * group["weight_decay"])
        whole = self.layouts[shards[0]]
        rows, columns = _matrix(whole.shape)
        alpha = -group["lr"] * max(1, rows / columns) ** 0.5
        if isinstance(whole, DTensor):
            steps = self._of_sharded(updates, whole)
        else:
            together = _everyone() if self.world.size > 1 and whole.numel() * len(shards) > rows * columns else None
            steps = iter(self._orthogonalised(updates, together))
        for shard, step in zip(shards, steps, strict=True):
            shard.add_(step.to(shard.dtype).view(shard.shape), alpha=alpha)

    def _of_sharded(self, updates: list[Tensor], like: DTensor) -> Iterator[Tensor]:
        """Of DTensors with the mesh and placements of ``like``: the local shards of their steps."""
        mesh, shape = like.device_mesh, tuple(like.shape)
        placements, same = list(like.placements), list(range(mesh.ndim))  # axes whose ranks can share the work
        if like.ndim == 3:
            for axis, placement in enumerate(like.placements):
                if getattr(placement, "dim", None) == 0:  # deals out whole matrices: these ranks have others
                    placements[axis] = Replicate()
                    same.remove(axis)
            # From here on the stack is what the ranks of those axes have of it, each its own.
            shape = (updates[0].shape[0], *like.shape[1:])
            if shape[0] == 0:
                yield from updates
                return
        # Ranks that share the work: of the longest axis; those of the others do the same work again.
        group = mesh.get_group(max(same, key=mesh.size)) if same else None
        size = 1 if group is None else dist.get_world_size(group)
        stride = torch.empty(shape, device="meta").stride()
        at_once = size * max(1, _GATHERED // (math.prod(shape) * size))
        for begin in range(0, len(updates), at_once):
            whole = []
            for update in updates[begin : begin + at_once]:
                sharded = DTensor.from_local(
                    update.to(self.dtype), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
                )
                with self.world.collective("Muon: gathering the matrices"):
                    whole.append(sharded.full_tensor())
            for step in self._orthogonalised(whole, group):
                yield distribute_tensor(step, mesh, placements, src_data_rank=None).to_local()

    def _orthogonalised(self, updates: list[Tensor], group: ProcessGroup | None) -> list[Tensor]:
        """Of whole weights of one shape, which every rank of a group has: each matrix by one of its ranks."""
        shape = updates[0].shape
        matrices = torch.cat([update.to(self.dtype).reshape(-1, *_matrix(shape)) for update in updates])
        if group is None or dist.get_world_size(group) == 1:
            steps = orthogonalised(matrices, dtype=self.dtype)
        else:
            size, rank = dist.get_world_size(group), dist.get_rank(group)
            each = -(-len(matrices) // size)
            own = matrices.new_zeros(each, *matrices.shape[1:])
            mine = matrices[rank * each : (rank + 1) * each]
            if len(mine):
                own[: len(mine)] = orthogonalised(mine, dtype=self.dtype)
            gathered = own.new_empty(size * each, *own.shape[1:])
            with self.world.collective("Muon: gathering the steps"):
                dist.all_gather(list(gathered.chunk(size)), own, group=group)
            steps = gathered[: len(matrices)]
        return [step.reshape(shape) for step in steps.split(len(matrices) // len(updates))]


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix, or of each matrix of the stack, that a weight is."""
    return (shape[1], shape[2]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))


def _everyone() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def local(tensor: Tensor) -> Tensor:
    """A DTensor's shard on this rank, a view of its storage; a plain tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()
