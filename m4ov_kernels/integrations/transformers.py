"""The loss of any causal language model of transformers by ``linear_cross_entropy``, without logits, in one line.

``m4ov_kernels.patch`` does this, and more, for the vision-language models that it knows. This is for the others
(``Qwen3ForCausalLM``, ``LlamaForCausalLM``, …), and changes nothing but the loss.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from m4ov_kernels.patches import PatchReport, Replacement

_REWRITES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def install(model: nn.Module) -> PatchReport:
    """In training mode, a call with ``labels`` computes the loss from hidden states; ``outputs.logits`` is ``None``.

    In eval mode, or without labels, all is as before. ``num_items_in_batch``, ``shift_labels`` and ``ignore_index`` are
    honoured; ``num_valid=`` says how many shifted labels count, if the host knows. transformers' ``Trainer`` needs no
    change.

    Args:
        model: a model with a linear ``lm_head`` and transformers' own loss for causal models, or a wrapper that holds
            exactly one (PEFT). Before ``fully_shard``.

    Returns:
        A report of what was replaced, and what already was.

    Raises:
        TypeError: there is no such model in ``model``, or there are several.
        ValueError: the model's loss or head is not transformers' own, or its configuration says that it scales or caps
            its logits. One that does so unsaid raises a ``RuntimeError`` in the first step.
    """
    from m4ov_kernels.patches import loss
    from m4ov_kernels.patches.classes import find_swaps

    target = _find(model)
    reason = loss.unfit(target) or _rewrites(target)
    if isinstance(target, FSDPModule):
        reason = "fully_shard was applied already; install before it"
    if reason is not None:
        raise ValueError(f"{type(target).__name__}: {reason}")
    kind = getattr(type(target), "original", type(target))
    modules = [("", target), ("lm_head", target.lm_head)]
    found = find_swaps(loss.parts(kind), modules)
    for module, new_class in found.swaps:
        module.__class__ = new_class
    replaced, already = found.replaced, found.already
    (already if loss.install(target, loss.untouched_causal_lm_loss_function) else replaced).append(loss.ENTRY)
    return PatchReport(type(target).__name__, tuple(replaced), tuple(already))


def remove(model: nn.Module) -> PatchReport:
    """The model's own classes and loss function again; a model without :func:`install` is left as it is.

    Raises:
        TypeError: as :func:`install`.
        ValueError: the model is one that ``m4ov_kernels.patch`` patched: ``unpatch`` it.
    """
    from m4ov_kernels.patches import loss
    from m4ov_kernels.patches.classes import compose, is_composed, name_of

    target = _find(model)
    if target.loss_function is loss.causal_lm_loss_function:
        raise ValueError(f"{type(target).__name__} was patched; m4ov_kernels.unpatch takes that off")
    restored = []
    for path, module in (("", target), ("lm_head", target.lm_head)):
        kind: Any = type(module)
        for front in (loss.LossWithoutLogits, loss.LMHead):
            if is_composed(module) and front in kind.fronts:
                others = tuple(other for other in kind.fronts if other is not front)
                module.__class__ = compose(kind.original, others) if others else kind.original
                names = (f"m4ov_kernels.{front.__name__}", name_of(kind.original))
                restored.append(Replacement(loss.OPERATOR, path, *names))
    if loss.remove(target):
        restored.append(Replacement(loss.OPERATOR, loss.ENTRY.path, loss.ENTRY.now, loss.ENTRY.was))
    return PatchReport(type(target).__name__, tuple(restored), restored=True)


def _find(model: nn.Module) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    from transformers import PreTrainedModel

    found = [part for part in model.modules() if isinstance(part, PreTrainedModel) and hasattr(part, "lm_head")]
    if len(found) != 1:
        raise TypeError(
            f"{type(model).__name__} holds {len(found)} models of transformers with an lm_head; expected one"
        )
    return found[0]


def _rewrites(model: Any) -> str | None:
    config = model.config.get_text_config()
    for name in _REWRITES:
        if getattr(config, name, None) not in (None, 1.0):
            return f"{name} = {getattr(config, name)}: the model changes its logits before the loss"
    return None
