"""Packed rows and packed images through transformers' attention seams, for any model that passes keywords through.

Implementation ``sdpa`` only (another that was chosen stays): ``varlen_attention`` inside the samples of a packed row
and inside the images of the vision tower, without a mask over all pairs of tokens and without a loop over images; on
the CPU in unpacked rows without mask and cache too. What has a mask, a cache or dropout takes PyTorch's attention.

The samples of a row are found once, in a hook before the language model (:mod:`m4ov_kernels.patches.packing`), and
handed down to every layer as the keyword ``sequences``; the images likewise before the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from m4ov_kernels.attention import varlen_attention
from m4ov_kernels.patches.report import Replacement

# transformers hands an implementation with "flash" in its name all images at once with their cumulative lengths, and
# calls any other once for each image.
TEXT_ATTENTION, VISION_ATTENTION = "m4ov", "m4ov_flash"


class Sequences(NamedTuple):
    """The sequences of all tokens, row after row. ``longest``: an upper bound, for GPU kernels; ``None``: unknown."""

    cu_seqlens: Tensor
    longest: int | None


def text_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention inside the samples of packed rows and, on the CPU, inside rows that are one sample each;
    transformers' ``sdpa`` for what has a mask, a cache, or dropout without packing."""
    sequences = kwargs.pop("sequences", None)
    if sequences is None:
        if not _whole_rows(module, query, key, attention_mask, kwargs):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        rows, length = query.shape[0], query.shape[2]
        sequences = Sequences(torch.arange(rows + 1) * length, length)
    return _attention(query, key, value, sequences, True, kwargs), None


def _whole_rows(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether transformers' ``sdpa`` would attend causally within whole rows; on a GPU its own is as good."""
    is_causal = kwargs.get("is_causal")
    return (
        query.device.type == "cpu"
        and attention_mask is None
        and query.shape[2] == key.shape[2]
        and not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and kwargs.get("cache") is None
        and kwargs.get("softcap") is None
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    )


def vision_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Full attention inside each image (frame of a video, window), or inside each row of a batch of images."""
    sequences = kwargs.get("sequences")
    if sequences is None and "cu_seq_lens_q" in kwargs:
        longest = kwargs.get("max_length_q")
        if isinstance(longest, Tensor):  # transformers 5.14
            longest = int(longest) if longest.device.type == "cpu" else None
        sequences = Sequences(kwargs["cu_seq_lens_q"], longest)
    elif sequences is None:
        rows, length = query.shape[0], query.shape[2]
        sequences = Sequences(torch.arange(rows + 1, device=query.device) * length, length)
    return _attention(query, key, value, sequences, False, kwargs), None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, causal: bool, kwargs: dict[str, Any]
) -> Tensor:
    """``[B, H, T, D]`` → ``[B, T, H, D]``, contiguous."""
    rows, heads, length, head_dim = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B·T, H | KV, D]
    if torch.is_autocast_enabled(q.device.type):  # as autocast does for scaled_dot_product_attention
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale, dropout = kwargs.get("scaling"), kwargs.get("dropout") or 0.0
    if dropout:
        output = _with_dropout(q, k, v, sequences.cu_seqlens, causal, scale, dropout)
    else:
        output = varlen_attention(
            q, k, v, sequences.cu_seqlens, max_seqlen=sequences.longest, causal=causal, scale=scale
        )
    return output.view(rows, length, heads, head_dim)


def _with_dropout(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    """Sequence by sequence, by PyTorch: the operator has no dropout."""
    grouped = q.shape[1] != k.shape[1]
    outputs = [q[:0]]
    for begin, end in pairwise(cu_seqlens.tolist()):
        query, key, value = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))  # [1, H | KV, L, D]
        output = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


AttentionInterface.register(TEXT_ATTENTION, text_attention)
AttentionInterface.register(VISION_ATTENTION, vision_attention)
AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)


class Hook(NamedTuple):
    """One half of a model, of which the attention is replaced.

    Attributes:
        part: the half, a model with a configuration.
        key: of that configuration in the model's.
        implementation: its new attention implementation.
        hook: what to call before its forward with ``(module, args, kwargs)``, if anything.
        unfit: why its attention must stay as it is, if so.
    """

    part: Any
    key: str
    implementation: str
    hook: Callable[..., Any] | None = None
    unfit: str | None = None

    def entry(self) -> Replacement:
        return Replacement("varlen_attention", f"config.{self.key}", "sdpa", self.implementation)


def install(
    model: Any,
    hooks: Iterable[Hook],
    replaced: list[Replacement],
    already: list[Replacement],
    skipped: list[tuple[str, str]],
) -> None:
    """Put the attention functions and hooks in place of ``sdpa``, and say so in the lists of the report."""
    wanted: dict[str, str] = {}
    for hook in hooks:
        current = hook.part.config._attn_implementation
        reason = hook.unfit
        if current not in ("sdpa", hook.implementation):
            reason = f"its implementation is {current!r}, not 'sdpa'"
        if reason is not None:
            skipped.append((f"varlen_attention of {hook.key}", reason))
            continue
        (already if current == hook.implementation else replaced).append(hook.entry())
        wanted[hook.key] = hook.implementation
        if hook.hook is not None and hook.hook not in hook.part._forward_pre_hooks.values():
            hook.part.register_forward_pre_hook(hook.hook, with_kwargs=True)
    model.set_attn_implementation(wanted)


def remove(model: Any, hooks: Iterable[Hook]) -> list[Replacement]:
    """Put ``sdpa`` back, and take the hooks off."""
    restored, wanted = [], {}
    for hook in hooks:
        part, entry = hook.part, hook.entry()
        if part.config._attn_implementation == hook.implementation:
            restored.append(Replacement(entry.operator, entry.path, entry.now, entry.was))
            wanted[hook.key] = "sdpa"
        # Not by a handle: a copy of a patched model has the hook, but no handle to it.
        for number in [number for number, found in part._forward_pre_hooks.items() if found is hook.hook]:
            del part._forward_pre_hooks[number], part._forward_pre_hooks_with_kwargs[number]
    model.set_attn_implementation(wanted)
    return restored
