"""What goes to an engine in another process, and what it does there: the model as files, prompts as bytes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m4ov.generate import Engine, SamplingOptions
from m4ov.generate.weights import Seen
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.rl.rollouts import Drawn
from m4ov.rl.trainer import EngineSampler
from m4ov_kernels.packing import Patches, Sample


@dataclass(frozen=True)
class Order:
    """What an engine is to draw: ``weights``: the file with those of ``version``, ``None``: those it began with."""

    version: int
    weights: str | None
    prompts: list[Sample]
    seeds: list[int]


class Hosted:
    """An engine with a model of its own: what runs in the other process.

    Args:
        start: the file that :class:`Handover` wrote.
        pulse: called after every step of the engine.
    """

    def __init__(self, start: str, pulse: Callable[[], None] | None = None) -> None:
        given = torch.load(start, weights_only=False)
        self.model: Qwen3VL = given["model"].eval().requires_grad_(False)
        engine = _Pulsing(self.model, tokenizer=given["tokenizer"], **given["settings"])
        engine.pulse = pulse
        self.engine, self.version = engine, 0
        self.sampler = EngineSampler(engine, given["options"])

    def draw(self, order: bytes) -> list[list[Drawn]]:
        """The answers to a pickled :class:`Order`."""
        wanted: Order = pickle.loads(order)
        if wanted.version != self.version:
            from safetensors.torch import load_file

            assert wanted.weights is not None
            self.engine.update_weights(load_file(wanted.weights))
            self.version = wanted.version
        return self.sampler.draw(wanted.prompts, wanted.seeds)


class _Pulsing(Engine):
    """Says after each step that there was one, so that slow and stuck can be told apart."""

    pulse: Callable[[], None] | None = None

    def step(self) -> int:
        made = super().step()
        if self.pulse is not None:
            self.pulse()
        return made


class Handover:
    """The trained model as files: once as it is at first, with all that an engine is made of; then its weights,
    whenever they have changed, under a temporary name until they are whole. Bits are kept.

    A change is seen as the embedded engine sees it: by PyTorch's counter of writes.
    """

    def __init__(
        self, model: Qwen3VL, tokenizer: Any, options: SamplingOptions, settings: dict[str, Any], folder: Path
    ) -> None:
        self.model, self.folder, self.version = model, folder, 0
        self.start = str(folder / "start.pt")
        self.weights: str | None = None
        self._seen = Seen(model)
        given = {"model": model, "tokenizer": tokenizer, "options": options, "settings": settings}
        try:
            torch.save(given, f"{self.start}.part")
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            expected = "a model and a tokenizer that can be pickled, for rollout.engines above 0"
            raise TypeError(f"sampler: expected {expected}; {error}") from error
        Path(f"{self.start}.part").replace(self.start)

    def newest(self) -> tuple[int, str | None]:
        """Version and file of the weights as they are."""
        if not (self._seen.same() and self._seen.holds(self.model)):
            from safetensors.torch import save_file

            tensors = {name: weight.detach().contiguous() for name, weight in self.model.named_parameters()}
            path, old = self.folder / f"weights-{self.version + 1}.safetensors", self.weights
            save_file(tensors, f"{path}.part")
            Path(f"{path}.part").replace(path)
            self.version, self.weights, self._seen = self.version + 1, str(path), Seen(self.model)
            if old is not None:  # nobody draws now, and whoever does next has the new ones
                Path(old).unlink(missing_ok=True)
        return self.version, self.weights


def portable(prompts: Sequence[Sample]) -> list[Sample]:
    """Prompts as they are sent: tensors with storage of their own, as a view is pickled with all that it is a view of;
    an image that several hold is one still."""
    images: dict[int, Patches] = {}

    def image(patches: Patches) -> Patches:
        return images.setdefault(id(patches), replace(patches, pixel_values=_own(patches.pixel_values)))

    return [
        Sample(
            _own(prompt.input_ids),
            images=tuple(map(image, prompt.images)),
            videos=tuple(map(image, prompt.videos)),
            mm_token_type_ids=None if prompt.mm_token_type_ids is None else _own(prompt.mm_token_type_ids),
        )
        for prompt in prompts
    ]


def _own(tensor: Tensor) -> Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
