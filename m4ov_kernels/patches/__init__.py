"""``patch(model)``: the operators in a Hugging Face model, in one line; ``unpatch(model)``: off again."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import FSDPModule

from m4ov_kernels.patches.report import PatchReport, Replacement

if TYPE_CHECKING:  # transformers is imported when a model is patched
    from m4ov_kernels.patches.family import Family

__all__ = ["SUPPORTED", "PatchReport", "Replacement", "patch", "unpatch"]

#: Class name of a supported model → module here that has its ``FAMILY``.
SUPPORTED = {
    "Qwen3VLForConditionalGeneration": "m4ov_kernels.patches.qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "m4ov_kernels.patches.qwen3_vl_moe",
    "Qwen2_5_VLForConditionalGeneration": "m4ov_kernels.patches.qwen2_5_vl",
    "LlavaOnevisionForConditionalGeneration": "m4ov_kernels.patches.llava_onevision",
}


def patch(model: nn.Module, *, operators: Collection[str] | None = None) -> PatchReport:
    """Put the operators of ``m4ov_kernels`` into a Hugging Face model, in place.

    Args:
        model: one of those in :data:`SUPPORTED`, of transformers 5.14 or newer, or a wrapper that holds exactly one
            (PEFT, ``DistributedDataParallel``, ``torch.compile``). Patch before ``fully_shard`` and before anything
            else that replaces forwards.
        operators: names of operators, such as ``{"rms_norm", "swiglu"}``: only these are put in. ``None``: all that
            serve the model's family. ``m4ov_kernels/patches/README.md`` has the table of what each replaces, and how
            to call a patched model with packed rows.

    Returns:
        A :class:`PatchReport`: what was replaced, what already was, what was left and why. ``print`` it.

    A patched model may be patched again: what is in place stays. Weights, state dict and configuration files are
    untouched.

    Raises:
        TypeError: no supported model in ``model`` (lists those supported), or ``operators`` is no collection of names.
        ValueError: an operator that does not serve the family (lists those that do); a module was already replaced by
            something else, or sharded; or ``model`` holds several supported models.
    """
    if isinstance(operators, str):
        raise TypeError(f"patch: operators must be a collection of names; got the string {operators!r}")
    target, family = _find(model)
    unknown = sorted(set(operators or ()) - set(family.operators))
    if unknown:
        raise ValueError(
            f"patch: operators: {', '.join(map(repr, unknown))} does not serve {family.name}; those that do are "
            f"{', '.join(family.operators)}"
        )
    _refuse_sharded(target)
    return family.patch(target, frozenset(family.operators if operators is None else operators))


def unpatch(model: nn.Module) -> PatchReport:
    """Take off what :func:`patch` put on: the same classes, attributes and bits as before.

    Works on copies and unpickled copies of a patched model too, since a patch leaves no state outside the model. An
    unpatched model is left as it is.

    Returns:
        A :class:`PatchReport` of what was restored.

    Raises:
        TypeError: no supported model in ``model``.
        ValueError: ``fully_shard`` was applied after the patch; it cannot be taken off below it.
    """
    target, family = _find(model)
    return family.unpatch(target)


def _refuse_sharded(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise ValueError(
                f"patch: fully_shard was applied to {path or 'the model'} already; patch before fully_shard"
            )


def _find(model: nn.Module) -> tuple[nn.Module, Family]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module; got {type(model).__name__}")
    found = [(part, name) for part in model.modules() if (name := _supported_name(type(part))) is not None]
    if not found:
        raise TypeError(
            f"patch: there is no supported model in {type(model).__name__}; supported: {', '.join(SUPPORTED)} "
            "(the whole model, not its .model)"
        )
    if len(found) > 1:
        raise ValueError(f"patch: {type(model).__name__} holds {len(found)} supported models; patch each by itself")
    (target, name) = found[0]
    return target, import_module(SUPPORTED[name]).FAMILY


def _supported_name(kind: type) -> str | None:
    """The name under which a class is supported: it, or a class that it extends, from transformers."""
    for base in kind.__mro__:
        if base.__name__ in SUPPORTED and base.__module__.split(".")[0] == "transformers":
            return base.__name__
    return None
