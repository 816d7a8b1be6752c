"""The optimizer: Muon for weight matrices, AdamW for everything else, float32 weights under a bfloat16 model.

Weights may be replicated or sharded (DTensors of any placement): everything but Muon's orthogonal step is element by
element, on the shard that a rank has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from m4ov.recipe import OptimConfig
from m4ov.train.muon import Muon, local
from m4ov.train.world import World


def learning_rate_scale(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rates at ``step`` (from 0): a line up to 1 over ``warmup`` steps times a cosine to 0."""
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Optimizer:
    """Float32 weights, their optimizers and schedule, and the copy in the model's dtype.

    Args:
        model: its parameters that require gradients, in float32 or bfloat16, are what gradients are computed for: of
            the sum of the losses of all tokens, which :meth:`step` divides. Plain parameters are the same on every
            rank, and their gradients are summed here; a DTensor's gradient comes summed already (FSDP with a divide
            factor of 1). The other parameters are left as they are.
        world: the ranks; ``None``: this one alone.
        muon_dtype: that Muon orthogonalises in. bfloat16 is enough for training, but tells layouts apart that differ in
            the last bit of float32: a run in float32 should take float32.
        schedule: step (from 0) → factor on the learning rates; ``None``: :func:`learning_rate_scale`.

    Attributes:
        weights: float32, laid out as the parameters; the very storage of a parameter that is float32.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        steps: int,
        world: World | None = None,
        *,
        muon_dtype: torch.dtype = torch.bfloat16,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.config, self.steps, self.world = config, steps, world or World()
        self.schedule = schedule or (lambda step: learning_rate_scale(step, steps, config.warmup_steps))
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("no parameter of the model requires gradients")
        self.names = [name for name, _ in trained]
        self.parameters = [parameter for _, parameter in trained]
        self.weights = [parameter.detach().float() for parameter in self.parameters]
        self.used = [local(parameter.detach()) for parameter in self.parameters]
        self.shards = [local(weight) for weight in self.weights]
        plain = [not isinstance(weight, DTensor) for weight in self.weights]
        if any(plain) and self.world.data_size != self.world.size:
            name = self.names[plain.index(True)]
            raise ValueError(f"weight {name}: expected a DTensor, as ranks share samples; got a plain tensor")
        self._replicated = [shard for shard, same in zip(self.shards, plain, strict=True) if same]
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, weight, shard in zip(self.names, self.weights, self.shards, strict=True):
            if _for_muon(name, weight):
                matrices.append(weight)
            else:
                others.append(shard)
        first, second = config.betas
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            decay = config.weight_decay
            self.parts.append(Muon(matrices, config.muon_lr, weight_decay=decay, world=self.world, dtype=muon_dtype))
        if others:
            adamw = torch.optim.AdamW(others, lr=config.lr, betas=(first, second), weight_decay=0.0, fused=True)
            for shard in others:  # at once, so that a checkpoint has the same names at every step
                moments = {name: torch.zeros_like(shard) for name in ("exp_avg", "exp_avg_sq")}
                adamw.state[shard] = {"step": torch.zeros((), device=shard.device), **moments}
            self.parts.append(adamw)
        self.base_lr = [part.param_groups[0]["lr"] for part in self.parts]

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of the model's parameters, which it takes away, to the weights' own, in float32."""
        for shard, parameter in zip(self.shards, self.parameters, strict=True):
            if parameter.grad is not None:
                grad = local(parameter.grad).float()
                shard.grad = grad if shard.grad is None else shard.grad.add_(grad)
                parameter.grad = None

    @torch.no_grad()
    def step(self, step: int, count: float = 1.0) -> Tensor:
        """One update from the gradients so far.

        Args:
            count: tokens that the loss is the mean of, on all ranks; gradients are divided by it.

        Returns:
            The norm of the whole gradient before clipping, a scalar.
        """
        self.accumulate()
        self.world.sum_gradients(f"step {step}: sum of the gradients", self._replicated)
        norm = self._norm() / count
        grads = [shard.grad for shard in self.shards if shard.grad is not None]
        if grads:
            torch._foreach_mul_(grads, (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / count)
        scale = self.schedule(step)
        for part, rate in zip(self.parts, self.base_lr, strict=True):
            part.param_groups[0]["lr"] = rate * scale
            part.step()
        for shard in self.shards:
            shard.grad = None
        self.publish()
        return norm

    @torch.no_grad()
    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Float32 weights to begin with, by name, instead of the model's, which are rounded; not all need be there."""
        for name, weight in zip(self.names, self.weights, strict=True):
            if name in weights:
                weight.copy_(weights[name])

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the float32 weights into the model, rounded to its dtype."""
        pairs = [(used, shard) for used, shard in zip(self.used, self.shards, strict=True) if used.dtype != shard.dtype]
        if pairs:
            torch._foreach_copy_([used for used, _ in pairs], [shard for _, shard in pairs])

    def _norm(self) -> Tensor:
        """Of all gradients on all ranks. Ranks of a mesh along which a weight is sharded hold parts of its gradient."""
        parts: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, list[Tensor]] = {}
        for weight, shard in zip(self.weights, self.shards, strict=True):
            if shard.grad is not None:
                key = (weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else None
                parts.setdefault(key, []).append(shard.grad)
        squares = []
        for sharding, grads in parts.items():
            square = torch.stack(torch._foreach_norm(grads)).square().sum()
            mesh, placements = sharding or (None, ())
            for axis, placement in enumerate(placements):
                if mesh is not None and not placement.is_replicate():
                    with self.world.collective("norm of the gradient"):
                        dist.all_reduce(square, group=mesh.get_group(axis))
            squares.append(square)
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    def named(self) -> dict[str, Tensor]:
        """The float32 weights by the names of their parameters."""
        return dict(zip(self.names, self.weights, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name, laid out as the weights; the tensors themselves.

        A checkpoint is loaded into them; then :meth:`publish`.
        """
        state = {f"weight.{name}": weight for name, weight in zip(self.names, self.weights, strict=True)}
        weights = {shard: (name, weight) for name, weight, shard in self._rows()}
        for part in self.parts:
            for shard, values in part.state.items():
                name, weight = weights[shard]
                for key, value in values.items():
                    state[f"{type(part).__name__}.{key}.{name}"] = _as(weight, value)
        return state

    def _rows(self) -> Sequence[tuple[str, Tensor, Tensor]]:
        return list(zip(self.names, self.weights, self.shards, strict=True))


def _as(weight: Tensor, value: Tensor) -> Tensor:
    """A shard of an optimizer's state as the DTensor that its weight is."""
    if value.ndim == 0 or not isinstance(weight, DTensor):
        return value
    return DTensor.from_local(
        value, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _for_muon(name: str, weight: Tensor) -> bool:
    """Weight matrices of the blocks, and the patch embedding, which is one too (a convolution whose patches do not
    overlap); not token embeddings, nor the mergers: their square matrix would cost the most. Nor the factors of LoRA:
    the update that would be orthogonal is that of their product."""
    inside = ".layers." in name or ".blocks." in name or ".patch_embed." in name
    return weight.ndim >= 2 and inside and ".lora_" not in name
