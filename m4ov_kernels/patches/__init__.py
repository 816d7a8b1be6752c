"""``patch(model)``: the operators in a Hugging Face model, in one line; ``unpatch(model)``: off again."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import nn

from m4ov_kernels.patches.report import PatchReport, Replacement

__all__ = ["SUPPORTED", "PatchReport", "Replacement", "patch", "unpatch"]

#: Class name of a supported model → module here that patches it.
SUPPORTED = {"Qwen3VLForConditionalGeneration": "m4ov_kernels.patches.qwen3_vl"}


def patch(model: nn.Module, **groups: bool) -> PatchReport:
    """Put the operators of ``m4ov_kernels`` into a Hugging Face model, in place.

    Args:
        model: ``Qwen3VLForConditionalGeneration`` of transformers 5.14 or newer, or a wrapper that holds exactly one
            (PEFT, ``DistributedDataParallel``, ``torch.compile``). Patch before ``fully_shard`` and before anything
            else that replaces forwards.
        groups: a group's name with ``False`` leaves that group as it is. Groups of Qwen3-VL: ``norm``, ``mlp``,
            ``loss``, ``patch_embed``, ``attention``; see :mod:`m4ov_kernels.patches.qwen3_vl` for what each does and
            for how to call the patched model with packed rows.

    Returns:
        A :class:`PatchReport`: what was replaced, what already was, what was left and why. ``print`` it.

    A patched model may be patched again: what is in place stays. Weights, state dict and configuration files are
    untouched.

    Raises:
        TypeError: no supported model in ``model`` (lists those supported), or an unknown group (lists the valid ones).
        ValueError: a module was already replaced by something else, or ``model`` holds several supported models.
    """
    target, module = _find(model)
    unknown = sorted(set(groups) - set(module.GROUPS))
    if unknown:
        raise TypeError(f"patch: unknown group {', '.join(map(repr, unknown))}; groups are {', '.join(module.GROUPS)}")
    return module.patch(target, tuple(name for name in module.GROUPS if groups.get(name, True)))


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
    target, module = _find(model)
    return module.unpatch(target)


def _find(model: nn.Module) -> tuple[nn.Module, ModuleType]:
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
    return target, import_module(SUPPORTED[name])


def _supported_name(kind: type) -> str | None:
    """The name under which a class is supported: it, or a class that it extends, from transformers."""
    for base in kind.__mro__:
        if base.__name__ in SUPPORTED and base.__module__.split(".")[0] == "transformers":
            return base.__name__
    return None
