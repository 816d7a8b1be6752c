"""The optimizer: Muon for weight matrices, AdamW for everything else, float32 weights under a bfloat16 model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from m4ov.recipe import OptimConfig

# Quintic Newton-Schulz coefficients of Muon (Keller Jordan, 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def learning_rate_scale(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rates at ``step`` (from 0): a line up to 1 over ``warmup`` steps times a cosine to 0."""
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: all singular values between about 0.7 and 1.2.

    Args:
        matrices: ``[N, rows, columns]``. One batched product serves them all: on a CPU a loop over matrices costs
            twice as much.

    Returns:
        bfloat16, same shape.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16)
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
    of more than two dimensions counts as the matrix of its first by all the others.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                self._update(group, shape, parameters)

    def _update(self, group: dict, shape: torch.Size, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
        steps = orthogonalised(torch.stack(updates).flatten(2)).to(parameters[0].dtype).view(-1, *shape).unbind(0)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(steps), alpha=-group["lr"] * max(1, shape[0] / shape[1:].numel()) ** 0.5)


class Optimizer:
    """Float32 weights, their optimizers and schedule, and the copy in the model's dtype.

    Args:
        model: its parameters, in float32 or bfloat16, are what gradients are computed for.
        weights: name → float32 value to start from (``None``: the model's own).
    """

    def __init__(self, model: nn.Module, config: OptimConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.names = [name for name, _ in model.named_parameters()]
        self.used: list[Tensor] = [parameter for _, parameter in model.named_parameters()]
        self.weights = [parameter.detach().float().clone() for parameter in self.used]
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, weight in zip(self.names, self.weights, strict=True):
            (matrices if _for_muon(name, weight) else others).append(weight)
        first, second = config.betas
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
        if others:
            adamw = torch.optim.AdamW(others, lr=config.lr, betas=(first, second), weight_decay=0.0, fused=True)
            self.parts.append(adamw)
        self.base_lr = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, step: int) -> Tensor:
        """One update from the gradients of the model's parameters, which it takes away.

        Returns:
            The norm of the gradient before clipping, a scalar.
        """
        for weight, used in zip(self.weights, self.used, strict=True):
            weight.grad, used.grad = (None if used.grad is None else used.grad.float()), None
        norm = nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        scale = learning_rate_scale(step, self.steps, self.config.warmup_steps)
        for part, rate in zip(self.parts, self.base_lr, strict=True):
            part.param_groups[0]["lr"] = rate * scale
            part.step()
        for weight in self.weights:
            weight.grad = None
        self.publish()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the float32 weights into the model, rounded to its dtype."""
        torch._foreach_copy_(self.used, self.weights)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name; float32."""
        state = {f"weight.{name}": weight for name, weight in zip(self.names, self.weights, strict=True)}
        names = {id(weight): name for name, weight in zip(self.names, self.weights, strict=True)}
        for part in self.parts:
            for weight, values in part.state.items():
                for key, value in values.items():
                    state[f"{type(part).__name__}.{key}.{names[id(weight)]}"] = value
        return state

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of :meth:`tensors`.

        Raises:
            ValueError: a weight is missing or of another shape.
        """
        by_name = dict(zip(self.names, self.weights, strict=True))
        for name, weight in by_name.items():
            saved = tensors.get(f"weight.{name}")
            if saved is None or saved.shape != weight.shape:
                found = "nothing" if saved is None else list(saved.shape)
                raise ValueError(f"weight {name}: expected {list(weight.shape)}, found {found}")
            with torch.no_grad():
                weight.copy_(saved)
        parts = {type(part).__name__: part for part in self.parts}
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind in parts:
                entry, _, name = rest.partition(".")
                parts[kind].state[by_name[name]][entry] = value.clone()
        self.publish()


def _for_muon(name: str, weight: Tensor) -> bool:
    """Weight matrices of the blocks, and the patch embedding, which is one too (a convolution whose patches do not
    overlap); not token embeddings, nor the mergers: their square matrix would cost the most."""
    return weight.ndim >= 2 and (".layers." in name or ".blocks." in name or ".patch_embed." in name)
