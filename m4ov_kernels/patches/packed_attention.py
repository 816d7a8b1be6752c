"""Packed rows and packed images through transformers' attention seams, for any model that passes keywords through.

The samples of a row are found once, in a hook before the language model, and handed down to every layer as the keyword
``packing``; the images likewise before the vision tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from m4ov_kernels.nn import PackedSequences, packed_attention
from m4ov_kernels.patches.report import Replacement

# transformers hands an implementation with "flash" in its name all images at once with their cumulative lengths, and
# calls any other once for each image.
TEXT_ATTENTION, VISION_ATTENTION = "m4ov", "m4ov_flash"
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def text_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``, but for packed rows."""
    packing = kwargs.pop("packing", None)
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale, dropout = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
    return packed_attention(query, key, value, packing, is_causal=True, scale=scale, dropout=dropout), None


def vision_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Full attention inside each image (frame of a video)."""
    packing = kwargs.get("packing")
    if packing is None:  # a model that shares the configuration of a patched one
        packing = PackedSequences.from_cu_seqlens(kwargs["cu_seq_lens_q"])
    scale, dropout = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
    return packed_attention(query, key, value, packing, is_causal=False, scale=scale, dropout=dropout), None


AttentionInterface.register(TEXT_ATTENTION, text_attention)
AttentionInterface.register(VISION_ATTENTION, vision_attention)
AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)


def pack_text(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Before the language model: finds the samples of packed rows and asks for no mask."""
    if module.config._attn_implementation != TEXT_ATTENTION:
        return args, kwargs
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    kwargs = {name: value for name, value in kwargs.items() if name not in _VARLEN}
    position_ids, embeds = kwargs.get("position_ids"), kwargs.get("inputs_embeds")
    packing = None
    if cu_seqlens is not None and embeds is not None:
        packing = _from_cu_seqlens(cu_seqlens, embeds)
    elif position_ids is not None and _says_text_positions(position_ids, kwargs):
        packing = PackedSequences.from_position_ids(position_ids[0])
    if packing is not None:
        for name in ("past_key_values", "attention_mask"):
            if kwargs.get(name) is not None:
                raise ValueError(f"packed rows (cu_seq_lens_q): {name} must be None")
        if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4:
            kwargs["position_ids"] = position_ids[1:]
        kwargs.update(packing=packing, use_cache=False)
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


@torch.compiler.disable
def _from_images(grid_thw: Tensor, cu_seqlens: Tensor | None, device: torch.device) -> PackedSequences:
    if cu_seqlens is not None:  # transformers 5.17 and newer take it from the caller
        return PackedSequences.from_cu_seqlens(cu_seqlens, device=device)
    frames = [height * width for t, height, width in grid_thw.tolist() for _ in range(t)]
    return PackedSequences.from_lengths(frames, device)


@torch.compiler.disable
def _from_cu_seqlens(cu_seqlens: Tensor, embeds: Tensor) -> PackedSequences:
    return PackedSequences.from_cu_seqlens(cu_seqlens, tokens=embeds.shape[:2].numel(), device=embeds.device)


def pack_images(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Before the vision tower: the images, once for all its layers; the text's packing is none of its business."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _VARLEN}
    if module.config._attn_implementation == VISION_ATTENTION:
        pixels = args[0] if args else kwargs["hidden_states"]
        grid_thw = args[1] if len(args) > 1 else kwargs["grid_thw"]
        kwargs["packing"] = _from_images(grid_thw, kwargs.get("cu_seqlens"), pixels.device)
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
