"""Packed rows and packed images through transformers' attention seams, for any model that passes keywords through.

The samples of a row are found once, in a hook before the language model, and handed down to every layer as the keyword
``sequences``; the images likewise before the vision tower.
"""

from __future__ import annotations

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
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


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
    """Full attention inside each image (frame of a video)."""
    sequences = kwargs.get("sequences")
    if sequences is None:  # a model that shares the configuration of a patched one
        sequences = Sequences(kwargs["cu_seq_lens_q"], kwargs.get("max_length_q"))
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


def pack_text(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Before the language model: finds the samples of packed rows and asks for no mask."""
    if module.config._attn_implementation != TEXT_ATTENTION:
        return args, kwargs
    cu_seqlens, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    kwargs = {name: value for name, value in kwargs.items() if name not in _VARLEN}
    position_ids, embeds = kwargs.get("position_ids"), kwargs.get("inputs_embeds")
    sequences = None
    if cu_seqlens is not None and embeds is not None:
        sequences = _sequences(cu_seqlens, embeds.device, longest)
    elif position_ids is not None and _says_text_positions(position_ids, kwargs):
        sequences = sequences_of_positions(position_ids[0])
    if sequences is not None:
        for name in ("past_key_values", "attention_mask"):
            if kwargs.get(name) is not None:
                raise ValueError(f"packed rows (cu_seq_lens_q): {name} must be None")
        if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4:
            kwargs["position_ids"] = position_ids[1:]
        kwargs.update(sequences=sequences, use_cache=False)
    return args, kwargs


def _says_text_positions(position_ids: Tensor, kwargs: dict[str, Any]) -> bool:
    # The same condition under which transformers looks for packed rows, except that it is met when `use_cache` comes
    # from the configuration. When compiling, transformers' mask serves: what the positions say is not known.
    return (
        position_ids.ndim == 3
        and position_ids.shape[0] == 4
        and kwargs.get("attention_mask") is None
        and kwargs.get("past_key_values") is None
        and not torch.compiler.is_compiling()
    )


def sequences_of_positions(position_ids: Tensor) -> Sequences | None:
    """From text positions ``[B, T]``: a sequence begins where a position is not its predecessor plus one.

    This is Hugging Face's rule. ``None`` if each row is one sequence. Costs one synchronisation on a GPU.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    starts = begins.flatten().nonzero()[:, 0]
    if len(starts) == position_ids.shape[0]:
        return None
    return Sequences(F.pad(starts, (0, 1), value=position_ids.numel()), position_ids.shape[1])


def _sequences(cu_seqlens: Tensor, device: torch.device, longest: int | None) -> Sequences:
    if longest is None and cu_seqlens.device.type == "cpu" and device.type != "cpu":
        longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    return Sequences(cu_seqlens.to(device), longest)


@torch.compiler.disable
def _from_images(grid_thw: Tensor, cu_seqlens: Tensor | None, device: torch.device) -> Sequences:
    if cu_seqlens is None:  # transformers 5.17 and newer take it from the caller
        frames = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
        cu_seqlens = F.pad(frames.cumsum(0), (1, 0))
    return _sequences(cu_seqlens, device, None)


def pack_images(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Before the vision tower: the images, once for all its layers; the text's packing is none of its business."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _VARLEN}
    if module.config._attn_implementation == VISION_ATTENTION:
        pixels = args[0] if args else kwargs["hidden_states"]
        grid_thw = args[1] if len(args) > 1 else kwargs["grid_thw"]
        kwargs["sequences"] = _from_images(grid_thw, kwargs.get("cu_seqlens"), pixels.device)
    return args, kwargs


def install(
    model: Any, text: nn.Module, vision: nn.Module
) -> tuple[list[Replacement], list[Replacement], list[tuple[str, str]]]:
    """Put both attention functions and hooks in place of ``sdpa``: what was replaced, what already was, what not."""
    replaced: list[Replacement] = []
    already: list[Replacement] = []
    skipped: list[tuple[str, str]] = []
    wanted: dict[str, str] = {}
    for key, part, name, hook in _parts(text, vision):
        current, path = part.config._attn_implementation, f"config.{key}"
        if current not in ("sdpa", name):
            skipped.append((f"attention of {key}", f"its implementation is {current!r}, not 'sdpa'"))
            continue
        (already if current == name else replaced).append(Replacement("attention", path, "sdpa", name))
        wanted[key] = name
        if hook not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(hook, with_kwargs=True)
    model.set_attn_implementation(wanted)
    return replaced, already, skipped


def remove(model: Any, text: nn.Module, vision: nn.Module) -> list[Replacement]:
    """Put ``sdpa`` back, and take the hooks off."""
    restored, wanted = [], {}
    for key, part, name, hook in _parts(text, vision):
        if part.config._attn_implementation == name:
            restored.append(Replacement("attention", f"config.{key}", name, "sdpa"))
            wanted[key] = "sdpa"
        # Not by a handle: a copy of a patched model has the hook, but no handle to it.
        for number in [number for number, found in part._forward_pre_hooks.items() if found is hook]:
            del part._forward_pre_hooks[number], part._forward_pre_hooks_with_kwargs[number]
    model.set_attn_implementation(wanted)
    return restored


def _parts(text: nn.Module, vision: nn.Module) -> tuple[tuple[str, Any, str, Any], ...]:
    return (
        ("text_config", text, TEXT_ATTENTION, pack_text),
        ("vision_config", vision, VISION_ATTENTION, pack_images),
    )
