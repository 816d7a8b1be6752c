"""Why a module must stay as it is: the conditions under which a front computes what the module would."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F


def not_silu(module: Any) -> str | None:
    """For an MLP with ``act_fn``."""
    act_fn = module.act_fn
    if type(act_fn) is nn.SiLU or type(act_fn).__name__ == "SiLUActivation" or act_fn is F.silu:
        return None
    return f"its activation is {getattr(act_fn, '__name__', type(act_fn).__name__)}, not silu"


def not_conv3d(module: Any) -> str | None:
    """For a patch embedding with ``proj``."""
    return None if type(module.proj) is nn.Conv3d else f"its projection is a {type(module.proj).__name__}, not a Conv3d"


def sliding_window(text: Any) -> str | None:
    """For a language model: the operator has no window."""
    sliding = "sliding_attention" in (getattr(text.config, "layer_types", None) or ())
    return "some layers attend within a sliding window" if sliding else None


def not_a(part: Any, kind: type) -> str | None:
    """For half of a model that may be of any kind."""
    return None if isinstance(part, kind) else f"it is a {type(part).__name__}, not a {kind.__name__}"
