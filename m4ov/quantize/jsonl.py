"""Calibration batches from lines of JSON: ``{"text": "…", "images": ["a.png", …]}``, for models of Qwen's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer


class Lines:
    """A file of such lines; paths of images are relative to it. ``images`` may be missing.

    Raises:
        ValueError: a line is not one, or the model has no tokens for images where a line has some.
    """

    def __init__(self, model: Path, path: Path, count: int) -> None:
        self.model, self.path = model, path
        self._lines = [self._checked(n, text) for n, text in self._read() if text.strip()][:count]
        if not self._lines:
            raise ValueError(f"--calibrate: {path}: no lines")

    def _read(self) -> list[tuple[int, str]]:
        try:
            return list(enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--calibrate: {self.path}: cannot be read ({error})") from error

    def _checked(self, number: int, text: str) -> tuple[str, list[Path]]:
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--calibrate: {self.path}, line {number}: not JSON ({error})") from error
        line = line if isinstance(line, dict) else {}
        words, images = line.get("text"), line.get("images", [])
        right = isinstance(words, str) and words and isinstance(images, list)
        if not right or not all(isinstance(image, str) for image in images):
            raise ValueError(
                f'--calibrate: {self.path}, line {number}: expected {{"text": "…", "images": ["…"]}}, got {text[:80]}'
            )
        paths = [self.path.parent / image for image in images]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"--calibrate: {self.path}, line {number}: no image {path}")
        return str(words), paths

    def batches(self, dtype: torch.dtype) -> list[dict[str, Any]]:
        """One a line: its images, then its text, whose tokens have labels."""
        config, tokenizer = AutoConfig.from_pretrained(self.model), AutoTokenizer.from_pretrained(self.model)
        made = []
        for text, paths in self._lines:
            ids: list[int] = []
            vision: dict[str, Any] = {}
            if paths:
                vision, counts = self._images(paths, config)
                for count in counts:
                    ids += [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
            words = tokenizer(text, add_special_tokens=False)["input_ids"]
            input_ids = torch.tensor([[*ids, *words]])
            labels = torch.tensor([[-100] * len(ids) + words])
            batch = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}
            if paths:
                batch["mm_token_type_ids"] = (input_ids == config.image_token_id).int()
            batch |= {name: value.to(dtype) if value.is_floating_point() else value for name, value in vision.items()}
            made.append(batch)
        return made

    def _images(self, paths: list[Path], config: Any) -> tuple[dict[str, Any], list[int]]:
        from PIL import Image, UnidentifiedImageError

        if not all(hasattr(config, f"{name}_token_id") for name in ("vision_start", "image", "vision_end")):
            raise ValueError(f"--calibrate: {self.path}: images for a {config.model_type}; give .safetensors batches")
        try:
            images = [Image.open(path).convert("RGB") for path in paths]
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"--calibrate: {self.path}: {error}") from error
        found = AutoImageProcessor.from_pretrained(self.model)(images=images, return_tensors="pt")
        merged = config.vision_config.spatial_merge_size**2
        grid = found["image_grid_thw"]
        counts = [int(count) // merged for count in grid.prod(1)]
        return {"pixel_values": found["pixel_values"], "image_grid_thw": grid}, counts
