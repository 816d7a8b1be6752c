"""The loss of a Hugging Face model from hidden states: ``linear_cross_entropy`` instead of logits.

In training mode, a call with ``labels`` computes the loss without logits: ``outputs.logits`` is ``None``. In eval mode,
or without labels, logits are as they were. ``num_items_in_batch`` and ``shift_labels`` are honoured on every version of
transformers (5.14 drops both for some models). ``num_valid=`` says how many shifted labels count, if the host knows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from m4ov_kernels.nn import CausalLMHead
from m4ov_kernels.patches.classes import Part, parameters
from m4ov_kernels.patches.report import Replacement

OPERATOR = "linear_cross_entropy"
ENTRY = Replacement(OPERATOR, "loss_function", "transformers.ForCausalLMLoss", "m4ov_kernels.linear_cross_entropy")


class _Request(threading.local):
    """What the model's forward, on this thread, asks of its head."""

    arguments: dict[str, Any] | None = None
    loss: Tensor | None = None  # what the head made of it


_request = _Request()


class LMHead(CausalLMHead):
    """The head; inside a forward that wants only the loss it returns that.

    Here, not in ``loss_function``, because FSDP gathers a module's weight for its own forward and no longer.
    """

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        arguments, _request.arguments = _request.arguments, None
        if arguments is None:
            return super().forward(input)
        _request.loss = super().forward(input, **arguments)
        return _request.loss


def causal_lm_loss_function(logits: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """transformers' loss; passes on what :class:`LMHead` already made a loss of."""
    return logits if logits.ndim == 0 else ForCausalLMLoss(logits, labels, *args, **kwargs)


def untouched_causal_lm_loss_function(
    logits: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """The same for a model that nobody has looked at: refuses a loss that it has scaled or capped, as logits."""
    if logits.ndim == 0 and logits is not _request.loss:
        raise RuntimeError(
            "linear_cross_entropy: this model changes its logits between head and loss; its loss cannot be computed "
            "without them (m4ov_kernels.integrations.transformers.remove(model) takes this off)"
        )
    return causal_lm_loss_function(logits, labels, *args, **kwargs)


FUNCTIONS = (causal_lm_loss_function, untouched_causal_lm_loss_function)


class LossWithoutLogits:
    """Front of a ``…ForConditionalGeneration``: in training, with labels, the loss is computed without logits."""

    keeps_signature = True
    original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(parameters(self.original.forward), args, strict=False))
        num_valid = kwargs.pop("num_valid", None)
        model: Any = self
        forward = super().forward  # type: ignore[misc]
        wanted = model.training and kwargs.get("labels") is not None
        if not wanted or not isinstance(model.lm_head, LMHead) or model.loss_function not in FUNCTIONS:
            return forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        _request.arguments = {
            "labels": kwargs["labels"],
            "num_valid": num_valid,
            **{name: kwargs[name] for name in ("shift_labels", "num_items_in_batch", "ignore_index") if name in kwargs},
        }
        try:
            outputs = forward(**kwargs, return_dict=True)
        finally:
            _request.arguments = _request.loss = None
        outputs = type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})
        return outputs if (model.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()


def parts(model_class: type[nn.Module]) -> tuple[Part, ...]:
    """The parts of a family whose model is ``model_class``."""
    return Part(OPERATOR, model_class, LossWithoutLogits, where=""), Part(OPERATOR, nn.Linear, LMHead, where="lm_head")


def unfit(model: Any) -> str | None:
    """Why the loss cannot be replaced in this model, if so."""
    if not isinstance(model.lm_head, LMHead) and type(model.lm_head) is not nn.Linear:
        return f"lm_head is a {type(model.lm_head).__name__}, not a Linear"
    if model.loss_function not in (ForCausalLMLoss, *FUNCTIONS):
        return (
            f"loss_function is {getattr(model.loss_function, '__name__', model.loss_function)!r}, not transformers' own"
        )
    return None


def install(model: Any, function: Callable[..., Tensor] = causal_lm_loss_function) -> bool:
    """Set the loss function; whether one of ours already was."""
    if model.loss_function in FUNCTIONS:
        return True
    model.loss_function = function
    return False


def remove(model: Any) -> bool:
    """Restore the default; whether there was something to restore."""
    if model.loss_function not in FUNCTIONS:
        return False
    del model._loss_function  # `loss_function` has no deleter; only the default was ever replaced
    return True
