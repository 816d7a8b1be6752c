"""LoRA by PEFT on our own model: adapters beside linears, and merged into them again."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from m4ov.manifest import LoraConfig
from m4ov.sft.parts import part_of


def targets(model: nn.Module, config: LoraConfig, frozen: Collection[str]) -> list[str]:
    """Full names of the linears that get adapters: named by ``config.targets``, outside the frozen parts, not the head.

    Raises:
        ValueError: a name is that of no such linear; names the nearest.
    """
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) != "embeddings" and part_of(name) not in frozen
    ]
    for target in config.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            last = sorted({name.rpartition(".")[2] for name in linears if not name.rpartition(".")[2].isdigit()})
            close = difflib.get_close_matches(target, last, n=1)
            hint = f"did you mean {close[0]}?" if close else f"linears: {', '.join(last)}"
            raise ValueError(f"lora.targets: no linear that is trained is named {target!r}; {hint}")
    wanted = tuple(f".{target}" for target in config.targets)
    return [name for name in linears if f".{name}".endswith(wanted)]


def attach(model: nn.Module, config: LoraConfig, frozen: Collection[str], *, seed: int) -> None:
    """Put adapters beside the linears, in place; they alone require gradients then.

    Args:
        seed: of the adapters' first weights; with it alone they are determined.

    Raises:
        ValueError: PEFT is not installed; and see :func:`targets`.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora.rank: LoRA needs the package peft; pip install peft") from error
    names = targets(model, config, frozen)
    options = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(options, model)


@torch.no_grad()
def merged(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights of a model without adapters: W + alpha / rank · B A.

    Args:
        model: with adapters and float32 weights; it loses its adapters.
        trained: their float32 weights, by name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    parameters = dict(model.named_parameters())
    for name, weight in trained.items():
        parameters[name].copy_(weight)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
