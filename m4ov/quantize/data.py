"""Batches to calibrate with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from m4ov.data import DataError, Encoder, Mixture, Pool, digits, easy_vqa, encoder_of
from m4ov.quantize.calibration import Batch
from m4ov.quantize.jsonl import Lines
from m4ov.recipe import DataConfig

QUICKSTART = "quickstart"
_IMAGES, _DIGITS = 48, 12  # of a batch


class Calibration:
    """Where calibration batches come from; each call of :meth:`batches` gives the same ones.

    Args:
        model: the folder of the model.
        data: "quickstart" (its training questions), a folder laid out as easy-vqa's data, a ``.safetensors`` file that
            is a batch (names and tensors are the keyword arguments of the model's forward, ``labels`` among them), a
            folder of such files, or a ``.jsonl`` file (:mod:`m4ov.quantize.jsonl`).
        count: batches at most.

    Raises:
        ValueError: there is no such data, or it is not for this model.
    """

    def __init__(self, model: Path, data: str, count: int) -> None:
        self.data, self.count = data, count
        self._files: list[Path] = []
        self._mixture: dict[str, Any] = {}
        self._lines: Lines | None = None
        path = Path(data)
        if path.suffix == ".jsonl":
            self._lines = Lines(model, path, count)
            return
        if data != QUICKSTART and path.suffix == ".safetensors":
            self._files = [path]
        elif data != QUICKSTART and path.is_dir():
            self._files = sorted(path.glob("*.safetensors"))[:count]
        if self._files:
            return
        if data != QUICKSTART and not (path / "train" / "questions.json").is_file():
            raise ValueError(
                f"--calibrate: expected quickstart, a folder with train/questions.json (as easy-vqa's), or "
                f".safetensors batches, or a .jsonl file; got {data}"
            )
        encoder = encoder_of(model)
        if encoder is None:
            raise ValueError(
                f"--calibrate: {model} is no quickstart's model: its processor and tokenizer are others; "
                f"give batches as .safetensors files, or a .jsonl file of texts and images"
            )
        self._mixture = self._splits("" if data == QUICKSTART else data, encoder)

    def _splits(self, folder: str, encoder: Encoder) -> dict[str, Any]:
        options, size = DataConfig(), encoder.geometry.size
        try:
            general = easy_vqa("train", size, folder=folder)
        except DataError as error:
            raise ValueError(f"--calibrate: {error}") from error
        domain, _ = digits(size, held_out=options.held_out_digits, split_seed=options.split_seed)
        images = min(_IMAGES, len(general.images))
        return {
            "pools": [Pool("general", general, options.questions_per_image), Pool("domain", domain)],
            "counts": {"general": images, "domain": _DIGITS},
            "encoder": encoder,
        }

    def batches(self, dtype: torch.dtype) -> list[Batch]:
        """The batches; ``dtype``: of pixels.

        Raises:
            ValueError: a file is damaged.
        """
        if self._lines is not None:
            return list(self._lines.batches(dtype))
        if self._mixture:
            mixture = Mixture(**self._mixture, seed=0, dtype=dtype)
            return [mixture.batch(step) for step in range(self.count)]
        return [self._read(path, dtype) for path in self._files]

    def _read(self, path: Path, dtype: torch.dtype) -> dict[str, Any]:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--calibrate: {path}: not a safetensors file ({error})") from error
        if "labels" not in tensors:
            raise ValueError(
                f"--calibrate: {path}: expected labels among its tensors; got {', '.join(sorted(tensors))}"
            )
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
