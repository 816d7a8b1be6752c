"""Tiny models of Hugging Face's, of every family that is patched, and batches for them: several samples, each with no,
one or several images or videos, packed in one row or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "llava_onevision")
QWEN = FAMILIES[:3]
VOCABULARY, WORDS = 320, 290
IMAGE, VIDEO, VISION_START, VISION_END = 300, 301, 302, 303
PATCH = 3 * 2 * 4 * 4  # values in one patch of Qwen's
SIDE, SIGLIP_PATCH = 12, 4  # pixels of LLaVA-OneVision's tiles and patches
_CLASSES = {
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
    "llava_onevision": ("LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration"),
}
_MARKS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def model(
    family: str = "qwen3_vl",
    *,
    tie: bool = False,
    attention: str = "sdpa",
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    layers: int = 3,
    vision: dict[str, Any] | None = None,
    **text: Any,
) -> Any:
    """About 170,000 parameters; weights large enough that attention is not uniform; in training mode.

    ``heads``: of queries, of keys and values; ``vision``, ``text``: more of the configurations.
    """
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        **text,
    }
    options: dict[str, Any] = {"tie_word_embeddings": tie, "attn_implementation": attention}
    if family == "llava_onevision":
        text |= {"model_type": "qwen2", "hidden_size": heads[0] * head_dim, "bos_token_id": None, "eos_token_id": None}
        vision = {**_siglip(), **(vision or {})}
        options |= {"image_token_index": IMAGE, "video_token_index": VIDEO, "vision_feature_layer": -1}
        options["image_grid_pinpoints"] = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    else:
        half = head_dim // 2
        section = [half - 2 * (half // 4), half // 4, half // 4]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
        if family == "qwen2_5_vl":
            text |= {"hidden_size": heads[0] * head_dim, "bos_token_id": None, "eos_token_id": None}
        else:
            text["head_dim"] = head_dim
        if family == "qwen3_vl_moe":
            text = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, **text}
            text = {"mlp_only_layers": [0], **text}
        vision = {**_qwen_vision(family, text["hidden_size"]), **(vision or {})}
        options |= _MARKS
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[family])
    made = model_class(config_class(text_config=text, vision_config=vision, **options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
                parameter.normal_(std=0.02 if "embed_tokens" in name else fan_in**-0.5)
            elif "norm" in name and "weight" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return made.train()


def _qwen_vision(family: str, width: int) -> dict[str, Any]:
    own = (
        {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        if family == "qwen2_5_vl"
        else {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    )
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": width,
        **own,
    }


def _siglip() -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": SIGLIP_PATCH,
        "image_size": SIDE,
        "vision_use_head": False,
    }


@dataclass(frozen=True)
class Sample:
    """One question. ``positions``: ``[4, 1, T]``, text positions and M-RoPE's (LLaVA: ``[1, T]``); ``vision``: pixels,
    grids or sizes, which batches put one after the other."""

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    vision: dict[str, Tensor]


def sample(
    owner: Any,
    words: int,
    images: Sequence[tuple[int, int]] = ((4, 4),),
    videos: Sequence[tuple[int, int, int]] = (),
) -> Sample:
    """``words`` random words after images and videos; labels on half of the words.

    ``images``: height and width of each in patches (LLaVA: of one tile and its newline, whatever they say);
    ``videos``: frames, height and width (LLaVA: two frames each).
    """
    family = owner.config.model_type
    tokens: list[int] = []
    vision: dict[str, Tensor] = {}
    if family == "llava_onevision":
        _llava_vision(len(images), len(videos), tokens, vision)
    else:
        for height, width in images:
            tokens += [VISION_START, *[IMAGE] * (height * width // 4), VISION_END]
        for frames, height, width in videos:
            count = height * width // 4
            if family == "qwen2_5_vl":
                tokens += [VISION_START, *[VIDEO] * (frames * count), VISION_END]
            else:  # each frame has its own marks, as Qwen3-VL's processor writes them
                tokens += [VISION_START, *[VIDEO] * count, VISION_END] * frames
        if images:
            vision["image_grid_thw"] = torch.tensor([[1, *image] for image in images])
            vision["pixel_values"] = torch.randn(sum(h * w for h, w in images), PATCH)
        if videos:
            vision["video_grid_thw"] = torch.tensor(videos)
            vision["pixel_values_videos"] = torch.randn(sum(t * h * w for t, h, w in videos), PATCH)
    input_ids = torch.cat([torch.tensor(tokens, dtype=torch.int64), torch.randint(WORDS, (words,))])[None]
    labels = torch.full_like(input_ids, -100)
    if words > 1:
        labels[:, -(words // 2) :] = input_ids[:, -(words // 2) :]
    return Sample(input_ids, _positions(owner, input_ids, vision), labels, vision)


def _llava_vision(images: int, videos: int, tokens: list[int], vision: dict[str, Tensor]) -> None:
    """One tile an image (as where a sample has several), two pooled frames a video; then a newline."""
    side = SIDE // SIGLIP_PATCH
    tokens += [IMAGE] * (images * (side**2 + 1))
    tokens += [VIDEO] * (videos * (2 * ((side + 1) // 2) ** 2 + 1))
    if images:
        vision["pixel_values"] = torch.randn(images, 1, 3, SIDE, SIDE)
        vision["image_sizes"] = torch.full((images, 2), SIDE)
        vision["batch_num_images"] = torch.full((images,), 2)  # more than 1: one tile an image
    if videos:
        vision["pixel_values_videos"] = torch.randn(videos, 2, 3, SIDE, SIDE)


def _positions(owner: Any, input_ids: Tensor, vision: dict[str, Tensor]) -> Tensor:
    text = torch.arange(input_ids.shape[1])[None]
    if owner.config.model_type == "llava_onevision":
        return text
    grids = {name: value for name, value in vision.items() if "grid" in name}
    if not grids:
        return text[None].expand(4, -1, -1)
    mrope, _ = owner.model.get_rope_index(input_ids, mm_token_type_ids=token_types(input_ids), **grids)
    return torch.cat([text[None], mrope])


def samples(owner: Any) -> list[Sample]:
    return [sample(owner, 7), sample(owner, 12, [(4, 8)]), sample(owner, 9)]


def mixed_samples(owner: Any) -> list[Sample]:
    """Odd sizes, several images, a video, text alone, an image alone."""
    return [
        sample(owner, 6, [(2, 6), (6, 4)]),
        sample(owner, 11, []),
        sample(owner, 5, [(4, 2)], [(2, 2, 6)]),
        sample(owner, 0, [(6, 10)]),
        sample(owner, 3, [], [(3, 4, 4)]),
    ]


def token_types(input_ids: Tensor) -> Tensor:
    return (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()


def _vision(parts: Sequence[Sample]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for part in parts for name in part.vision)
    return {name: torch.cat([part.vision[name] for part in parts if name in part.vision]) for name in names}


def _types(owner: Any, input_ids: Tensor) -> dict[str, Tensor]:
    return {} if owner.config.model_type == "llava_onevision" else {"mm_token_type_ids": token_types(input_ids)}


def packed(owner: Any, parts: Sequence[Sample]) -> dict[str, Tensor]:
    """One row ``[1, T]`` with the positions of each sample for itself."""
    input_ids = torch.cat([part.input_ids for part in parts], 1)
    return {
        "input_ids": input_ids,
        "position_ids": torch.cat([part.positions for part in parts], -1),
        "labels": torch.cat([part.labels for part in parts], 1),
        **_types(owner, input_ids),
        **_vision(parts),
    }


def padded(owner: Any, parts: Sequence[Sample]) -> dict[str, Tensor]:
    """One row for each sample, padded on the right."""
    longest = max(part.input_ids.shape[1] for part in parts)

    def rows(name: str, fill: int) -> Tensor:
        values = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(value, (0, longest - value.shape[1]), value=fill) for value in values])

    input_ids = rows("input_ids", 0)
    attention = [F.pad(torch.ones_like(part.input_ids), (0, longest - part.input_ids.shape[1])) for part in parts]
    return {
        "input_ids": input_ids,
        "attention_mask": torch.cat(attention),
        "labels": rows("labels", -100),
        **_types(owner, input_ids),
        **_vision(parts),
    }


def cu_seqlens(parts: Sequence[Sample]) -> Tensor:
    lengths = torch.tensor([0, *(part.input_ids.shape[1] for part in parts)])
    return lengths.cumsum(0, dtype=torch.int32)
