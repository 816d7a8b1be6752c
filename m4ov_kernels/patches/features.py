"""Fronts that put vision features into the language model by position: ``scatter_vision`` and ``deepstack_add``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m4ov_kernels.patches.classes import parameters
from m4ov_kernels.vision import deepstack_add, scatter_vision


class Placed(NamedTuple):
    """Features of deeper layers and the rows of the batch that they go to."""

    positions: Tensor  # [N]
    layers: Sequence[Tensor]  # each [N, D]


class ScatteredFeatures:
    """Front of an inner model: features go to their rows without a mask over all elements.

    ``vision_positions [N]`` (images', then videos') may be given, from where the batch was packed; else they are found
    on the device, without a synchronisation, since there is one for each row of features.
    """

    keeps_signature = True
    original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(parameters(self.original.forward), args, strict=False))
        model, call = self, super().forward  # type: ignore[misc]
        positions = kwargs.pop("vision_positions", None)
        pixels = any(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        made_before = kwargs.get("mm_encoder_outputs")
        if kwargs.get("input_ids") is None or pixels == bool(made_before):  # nothing to place, or refused
            return call(**kwargs)
        return model._scattered(call, kwargs, positions)

    def _scattered(self, call: Any, kwargs: dict[str, Any], positions: Tensor | None) -> Any:
        model: Any = self
        input_ids = kwargs.pop("input_ids")
        embeds = kwargs.get("inputs_embeds")
        embeds = model.get_input_embeddings()(input_ids) if embeds is None else embeds
        made_before = kwargs.pop("mm_encoder_outputs", None) or {}
        outputs = {name: made_before.get(name) or self.features(name, kwargs) for name in ("image", "video")}
        outputs = {name: made for name, made in outputs.items() if made is not None}
        if not outputs:
            return call(**kwargs, input_ids=input_ids)
        features = [_joined(made.pooler_output, embeds) for made in outputs.values()]
        if positions is None:
            positions = torch.cat(
                [
                    positions_of(input_ids, getattr(model.config, f"{name}_token_id"), rows.shape[0], name)
                    for name, rows in zip(outputs, features, strict=True)
                ]
            )
        else:
            positions = positions.to(embeds.device, non_blocking=True)
        embeds = scatter_vision(embeds, _cat(features), positions)
        if kwargs.get("position_ids") is None and hasattr(model, "compute_3d_position_ids"):
            kwargs["position_ids"] = self._position_ids(input_ids, embeds, kwargs)
        deeper = [made.deepstack_features for made in outputs.values() if getattr(made, "deepstack_features", None)]
        if deeper:
            layers = [_cat([_joined(x, embeds) for x in layer]) for layer in zip(*deeper, strict=True)]
            kwargs["placed"] = Placed(positions, layers)
        for name in _CONSUMED:
            kwargs.pop(name, None)
        made = call(**{**kwargs, "inputs_embeds": embeds})
        for (name, output), rows in zip(outputs.items(), features, strict=True):  # handed on, as transformers does
            for field, value in ((f"{name}_outputs", output), (f"{name}_hidden_states", rows)):
                if field in getattr(made, "__dataclass_fields__", {}):
                    made[field] = value
        return made

    def _position_ids(self, input_ids: Tensor, embeds: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """As the model itself computes them, or as its language model would."""
        model: Any = self
        names = parameters(type(model).compute_3d_position_ids)
        known = {name: kwargs.get(name) for name in names}
        made = model.compute_3d_position_ids(**{**known, "input_ids": input_ids, "inputs_embeds": embeds})
        if made is not None:
            return made
        cache = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        return (torch.arange(embeds.shape[1], device=embeds.device) + past).expand(3, embeds.shape[0], -1)

    def features(self, name: str, kwargs: dict[str, Any]) -> Any:
        """The tower's outputs for ``"image"`` or ``"video"``; ``None`` where there are none."""
        model: Any = self
        pixels = kwargs.get("pixel_values" if name == "image" else "pixel_values_videos")
        if pixels is None:
            return None
        own = (*parameters(self.original.forward), "past_key_values", "cache")
        rest = {key: value for key, value in kwargs.items() if key not in own}
        call = model.get_image_features if name == "image" else model.get_video_features
        return call(pixels, kwargs.get(f"{name}_grid_thw"), return_dict=True, **rest)


_CONSUMED = (
    *("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "mm_token_type_ids"),
    *("second_per_grid_ts", "image_sizes", "image_sizes_videos", "batch_num_images"),
)


class PlacedFeatures:
    """Front of Qwen3-VL's language model: takes what :class:`ScatteredFeatures` placed."""

    keeps_signature = True

    def forward(self, *args: Any, placed: Placed | None = None, **kwargs: Any) -> Any:
        if placed is not None:
            embeds = kwargs["inputs_embeds"]
            positions, layers = placed
            where: Tensor = positions
            if not isinstance(self, DeepStack):  # transformers' own addition wants a mask, and rows in its order
                where = positions.new_zeros(embeds.shape[:-1].numel()).scatter(0, positions, 1).bool()
                where = where.view(embeds.shape[:-1])
                order = positions.argsort()
                layers = [layer[order] for layer in layers]
            kwargs.update(visual_pos_masks=where, deepstack_visual_embeds=layers)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class DeepStack:
    """Front of Qwen3-VL's language model: features are added to their rows alone."""

    def _deepstack_process(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        """``visual_pos_masks``: as transformers has it, a mask ``[B, T]``, or positions ``[N]``."""
        positions = visual_pos_masks.to(hidden_states.device, non_blocking=True)
        if positions.dtype is torch.bool:
            positions = torch.nonzero_static(positions.flatten(), size=visual_embeds.shape[0])[:, 0]
        visual_embeds = visual_embeds.to(hidden_states.device, hidden_states.dtype, non_blocking=True)
        return deepstack_add(hidden_states, visual_embeds, positions)


def positions_of(input_ids: Tensor, token_id: int, count: int, name: str) -> Tensor:
    """The rows of ``input_ids`` (flat) with a token that stands for a feature, of which there are ``count``.

    Raises:
        ValueError: there are more or fewer (CPU). On a GPU the positions are -1 then, which operators report.
    """
    mask = (input_ids == token_id).flatten()
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        positions = mask.nonzero()[:, 0]
        if len(positions) != count:
            rows = (input_ids == token_id).sum(-1).tolist()
            raise ValueError(
                f"{name} features and {name} tokens do not match: {count} features, {len(positions)} tokens "
                f"({rows} in each row)"
            )
        return positions
    positions = torch.nonzero_static(mask, size=count)[:, 0]
    return torch.where(mask.sum() == count, positions, -1)


def _joined(features: Tensor | Sequence[Tensor], embeds: Tensor) -> Tensor:
    made = features if isinstance(features, Tensor) else _cat(list(features))
    return made.flatten(0, -2).to(embeds.device, embeds.dtype)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
