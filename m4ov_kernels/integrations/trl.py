"""TRL's fused head by ``linear_logprob``: for SFT, GRPO, RLOO, KTO and DPO trainers, which all score tokens with it.

These trainers call ``model(..., labels=labels, fused_lm_head=True)``, and that calls one function of hidden states,
head and targets (``trl.kernels.ChunkedLogProbFunction``). :func:`install` puts another in its place, for all trainers
of the process; everything around it stays TRL's: shifting, masks, PEFT, autocast, gathering of a sharded head, the
losses and the metrics.
"""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.head.logprob import NUMERICS, raw

_OP = "linear_logprob for TRL"
_FUNCTION, _COMPACT = "_ChunkedLogProbFunction", "_use_triton"  # in trl.trainer.utils
_theirs: dict[str, Any] = {}

#: log-probabilities, entropies, log Σp², mean logits, whether the target is the likeliest
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def install(*, numerics: str = "fp32", invariant: bool = False) -> None:
    """Have TRL's trainers compute log-probabilities and entropies with ``linear_logprob``.

    Before or after a trainer is made; in a process where it is in place already, the options change.

    Args:
        numerics: ``"fp32"``: logits are never rounded; ``"hf"``: to the dtype of the hidden states, as TRL rounds them.
        invariant: whether a row's bits may not depend on the rest of the batch (see :func:`linear_logprob`).

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this TRL (before 1.16, or a later one that changed) does not compute log-probabilities so.
    """
    checks.one_of(_OP, "numerics", numerics, NUMERICS)
    if not isinstance(invariant, bool):
        checks.refuse(TypeError, _OP, "invariant", "a bool", checks.describe(invariant))
    from trl.trainer import utils

    if not _theirs:
        found = {name: getattr(utils, name, None) for name in (_FUNCTION, _COMPACT)}
        forward = getattr(found[_FUNCTION], "forward", None)
        taken = tuple(inspect.signature(forward).parameters)[1:] if forward is not None else ()  # the first is ctx
        if found[_COMPACT] is None or taken != tuple(inspect.signature(Logprobs.apply).parameters)[1:]:
            raise RuntimeError(
                f"{_OP}: trl {metadata.version('trl')} does not compute log-probabilities as 1.16 does, for which this "
                "was made; a newer m4ov may know it"
            )
        _theirs.update(found)
    theirs = _theirs[_COMPACT]
    setattr(utils, _FUNCTION, Logprobs(rounded=numerics == "hf", invariant=invariant))
    # On the CPU, too, tokens that are not scored are dropped first.
    setattr(utils, _COMPACT, lambda device: device.type == "cpu" or theirs(device))


def remove() -> None:
    """Give TRL its own function back; without :func:`install` before, nothing."""
    if _theirs:
        from trl.trainer import utils

        for name, value in _theirs.items():
            setattr(utils, name, value)
        _theirs.clear()


class Logprobs:
    """Stands where TRL has ``ChunkedLogProbFunction``."""

    def __init__(self, *, rounded: bool, invariant: bool) -> None:
        self.options: dict[str, Any] = {"rounded": rounded, "invariant": invariant}

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> Outputs:
        """``hidden`` ``[N, H]``, ``weight`` ``[V, H]``, ``bias`` ``[V]``, ``targets`` ``[N]`` → float32 ``[N]`` each,
        ``None`` for what is not among ``outputs``. ``chunk_size`` is TRL's own business: the operator's chunks follow
        its memory budget.

        Raises:
            RuntimeError: under DeepSpeed's ZeRO-3, which shards the head away before the backward reads it.
            ValueError: ``temperature`` or ``logit_scale`` is not above 0.
        """
        _refuse_zero3()
        for name, value in (("temperature", temperature), ("logit_scale", logit_scale)):
            if not value > 0:
                checks.refuse(ValueError, _OP, name, "above 0", repr(value))
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wanted: dict[str, Any] = {"entropy": "entropy" in outputs, "total": "mean_logits" in outputs}
        # logits = softcap · tanh(scale · x / softcap) / temperature, with scale and temperature taken into one
        softcap = (final_logit_softcapping or 0.0) / temperature
        temperature = temperature / logit_scale
        # The dtype is chosen; inside, nothing is to be rounded again.
        with torch.autocast(kind, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            given: dict[str, Any] = {"bias": None if bias is None else bias.to(dtype), "num_valid": targets.numel()}
            given |= self.options | {"top_k": int("is_top1" in outputs or "log_sum_sq_probs" in outputs)}
            found = raw(hidden, weight, targets, temperature=temperature, softcap=softcap, **given, **wanted)
            log_sum_sq_probs = None
            if "log_sum_sq_probs" in outputs:
                # Σp² is exp(logsumexp of twice the logits) over the square of their own; by the likeliest word's
                # probabilities, because two logsumexps would cancel.
                with torch.no_grad():
                    twice = raw(hidden, weight, targets, temperature=temperature / 2, softcap=softcap * 2, **given)
                log_sum_sq_probs = (2 * found.top_logprobs - twice.top_logprobs)[:, 0]
        return (
            found.logprob,
            found.entropy if "entropy" in outputs else None,
            log_sum_sq_probs,
            (found.total / weight.shape[0]).detach() if "mean_logits" in outputs else None,
            found.top_indices[:, 0] == targets if "is_top1" in outputs else None,
        )


def _refuse_zero3() -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise RuntimeError(f"{_OP}: DeepSpeed ZeRO-3 is not served; remove() gives TRL's own function back")
