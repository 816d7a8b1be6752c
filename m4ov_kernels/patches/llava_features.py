"""Front of LLaVA-OneVision's inner model: how it makes features of images and videos."""

from __future__ import annotations

from typing import Any

import torch

from m4ov_kernels.patches.classes import parameters
from m4ov_kernels.patches.features import ScatteredFeatures


class LlavaFeatures(ScatteredFeatures):
    """Features go to their rows without a mask over all elements."""

    def features(self, name: str, kwargs: dict[str, Any]) -> Any:
        model: Any = self
        pixels = kwargs.get("pixel_values" if name == "image" else "pixel_values_videos")
        if pixels is None:
            return None
        options = {key: kwargs.get(key) for key in ("vision_feature_layer", "vision_feature_select_strategy")}
        if name == "image":
            count = kwargs.get("batch_num_images")
            return model.get_image_features(
                pixels, kwargs.get("image_sizes"), batch_num_images=count, return_dict=True, **options
            )
        made = model.get_video_features(pixels, return_dict=True, **options)
        if "pixel_values_videos" not in parameters(type(model).get_video_features):  # transformers before 5.23
            newline = model.image_newline.to(made.pooler_output.device).expand(len(made.pooler_output), 1, -1)
            made.pooler_output = torch.cat((made.pooler_output, newline), dim=1)
        return made
