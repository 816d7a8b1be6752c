"""Hooks before a language model and before a vision tower: what is packed, found once for all layers.

How to call a patched model with packed rows stands in this folder's README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m4ov_kernels.patches.attention import TEXT_ATTENTION, VISION_ATTENTION, Sequences

_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_CACHE = ("past_key_values", "cache")  # transformers up to 5.17 and later


def pack_text(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Before a language model with M-RoPE: finds the samples of packed rows and asks for no mask."""
    position_ids: Any = kwargs.get("position_ids")
    four = position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4
    sequences, kwargs = _packed(module, kwargs, position_ids[0] if four else None)
    if sequences is not None:
        kwargs.update(sequences=sequences, use_cache=False)
        if four:
            kwargs["position_ids"] = position_ids[1:]
    return args, kwargs


def pack_plain_text(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """As :func:`pack_text`, before a language model with RoPE: its positions are ``[B, T]``."""
    position_ids = kwargs.get("position_ids")
    two = position_ids is not None and position_ids.ndim == 2
    sequences, kwargs = _packed(module, kwargs, position_ids if two else None)
    if sequences is not None:
        # transformers takes the mask that it is given as a mapping, and else makes one from the positions.
        masks = dict.fromkeys(["full_attention", *module.config.layer_types])
        kwargs.update(sequences=sequences, use_cache=False, attention_mask=masks)
    return args, kwargs


def _packed(
    module: Any, kwargs: dict[str, Any], text_positions: Tensor | None
) -> tuple[Sequences | None, dict[str, Any]]:
    """The samples of packed rows, if they are packed, and the keywords without those that say so."""
    if module.config._attn_implementation != TEXT_ATTENTION:
        return None, kwargs
    cu_seqlens, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    kwargs = {name: value for name, value in kwargs.items() if name not in _VARLEN}
    embeds, sequences = kwargs.get("inputs_embeds"), None
    if cu_seqlens is not None and embeds is not None:
        sequences = sequences_of(cu_seqlens, embeds.device, longest)
    elif text_positions is not None and _says_text_positions(kwargs):
        sequences = sequences_of_positions(text_positions)
    if sequences is not None:
        for name in ("attention_mask", *_CACHE):
            if kwargs.get(name) is not None:
                raise ValueError(f"packed rows (cu_seq_lens_q): {name} must be None")
    return sequences, kwargs


def _says_text_positions(kwargs: dict[str, Any]) -> bool:
    # The same condition under which transformers looks for packed rows, except that it is met when `use_cache` comes
    # from the configuration. When compiling, transformers' mask serves: what the positions say is not known.
    return all(kwargs.get(name) is None for name in ("attention_mask", *_CACHE)) and not torch.compiler.is_compiling()


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


def sequences_of(cu_seqlens: Tensor, device: torch.device, longest: int | None) -> Sequences:
    """Of given bounds, on the device; the host's know the longest."""
    if longest is None and cu_seqlens.device.type == "cpu" and device.type != "cpu":
        longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    return Sequences(cu_seqlens.to(device, non_blocking=True), longest)


@torch.compiler.disable
def of_images(grid_thw: Tensor, cu_seqlens: Tensor | None, device: torch.device) -> Sequences:
    """From grids: each frame is a sequence."""
    if cu_seqlens is None:  # a caller may give them, precomputed
        frames = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
        cu_seqlens = F.pad(frames.cumsum(0), (1, 0))
    return sequences_of(cu_seqlens, device, None)


def pack_images(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Before a vision tower: the images, once for all its layers; the text's packing is none of its business."""
    args, kwargs = drop_text_packing(module, args, kwargs)
    if module.config._attn_implementation == VISION_ATTENTION:
        pixels = args[0] if args else kwargs["hidden_states"]
        grid_thw = args[1] if len(args) > 1 else kwargs["grid_thw"]
        kwargs["sequences"] = of_images(grid_thw, kwargs.get("cu_seqlens"), pixels.device)
    return args, kwargs


def drop_text_packing(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Before a vision tower of which the layers differ in what they attend to."""
    return args, {name: value for name, value in kwargs.items() if name not in _VARLEN}
