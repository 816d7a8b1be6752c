"""Qwen3-VL on one device, packed throughout: nothing is padded anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from m4ov.models.qwen3_vl.config import Config
from m4ov.models.qwen3_vl.text import Packing, Placed, TextModel
from m4ov.models.qwen3_vl.vision import VisionFeatures, VisionTower
from m4ov_kernels.moe import ExpertLoad
from m4ov_kernels.nn import CausalLMHead
from m4ov_kernels.packing import PackedBatch, VisionInputs
from m4ov_kernels.vision import scatter_vision


class Output(NamedTuple):
    """What the model makes of T tokens.

    Attributes:
        hidden_states: ``[T, D]``, normalised; ``lm_head`` makes logits of them.
        loads: of each layer with experts, how tokens were spread over them.
    """

    hidden_states: Tensor
    loads: tuple[ExpertLoad, ...]


class TokenLoss(NamedTuple):
    """The loss of a batch, to be divided by the labels of all batches and ranks that make up a step.

    Attributes:
        total: sum of the cross entropy over all tokens that count, float32.
        num_labels: how many these are; known on the host.
        loads: see :class:`Output`; :func:`m4ov_kernels.nn.load_balancing_loss` makes a loss of them.
    """

    total: Tensor
    num_labels: int
    loads: tuple[ExpertLoad, ...]


class Qwen3VLModel(nn.Module):
    """Vision tower and language model, and what joins them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.language_model = TextModel(config.text)
        self.always_vision = False

    def forward(self, batch: PackedBatch) -> Output:
        """See :meth:`Qwen3VL.forward`."""
        inputs_embeds = self.language_model.embed_tokens(batch.input_ids)
        packing = Packing(batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        seen = self.see(batch)
        if seen is None:
            return Output(*self.language_model(inputs_embeds, packing))
        features, positions = seen
        inputs_embeds = scatter_vision(inputs_embeds, features.merged.to(inputs_embeds.dtype), positions)
        return Output(*self.language_model(inputs_embeds, packing, Placed(positions, features.deepstack)))

    def see(self, batch: PackedBatch) -> tuple[VisionFeatures, Tensor] | None:
        """The features of a batch's images and videos, one for each vision token, and the tokens that take them,
        ``[V]``; ``None`` where there are neither (and ``always_vision`` is not set). The tower runs once."""
        inputs = [part for part in (batch.images, batch.videos) if part is not None]
        if not inputs:
            return self._blind(batch) if self.always_vision else None
        seen = self.visual(
            _cat([part.pixel_values for part in inputs]),
            _cat([part.grid_thw for part in inputs]),
            tuple(grid for part in inputs for grid in part.grids),
        )
        rows = _rows(inputs)
        if rows is not None:
            seen = _each(seen, lambda features: features.index_select(0, rows))
        return seen, _cat([part.positions for part in inputs])

    def _blind(self, batch: PackedBatch) -> tuple[VisionFeatures, Tensor]:
        """No features, from a tower that has run all the same: on one feature's worth of zeros. Its gradients are
        zeros, not ``None``, and whatever happens around its forward and backward happens."""
        vision, device = self.config.vision, batch.input_ids.device
        grid = (1, vision.spatial_merge_size, vision.spatial_merge_size)
        dtype = self.visual.patch_embed.proj.weight.dtype
        pixels = torch.zeros(vision.spatial_merge_size**2, vision.patch_values, dtype=dtype, device=device)
        seen = self.visual(pixels, torch.tensor([grid], device=device), (grid,))
        return _each(seen, lambda features: features[:0]), batch.input_ids.new_empty(0)


class Qwen3VL(nn.Module):
    """The whole model: parameters named and shaped as in Hugging Face's ``…ForConditionalGeneration``.

    Built under ``torch.device("meta")`` it takes no memory; then :func:`m4ov.models.qwen3_vl.load` or ``to_empty`` and
    :meth:`init_weights` make it whole.

    Attributes:
        always_vision: run the vision tower even where a batch has neither images nor videos, without any effect on the
            result: for ranks that must take part in its collectives.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3VLModel(config)
        self.lm_head = CausalLMHead(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie_weights()

    @property
    def always_vision(self) -> bool:
        return self.model.always_vision

    @always_vision.setter
    def always_vision(self, value: bool) -> None:
        self.model.always_vision = value

    def forward(self, batch: PackedBatch) -> Output:
        """The hidden states of a packed batch. The tower sees each image once, however many samples ask about it."""
        return self.model(batch)  # type: ignore[no-any-return]

    def loss(self, batch: PackedBatch) -> TokenLoss:
        """Cross entropy of the next token, summed over the labels of a packed batch; logits are never whole in memory.

        Where there is no label it is 0, with gradients of 0.
        """
        hidden_states, loads = self(batch)
        return TokenLoss(self.head_loss(hidden_states, batch), batch.num_labels, loads)

    def head_loss(self, hidden_states: Tensor, batch: PackedBatch) -> Tensor:
        """The sum of the losses of hidden states ``[T, D]``."""
        total: Tensor = self.lm_head(hidden_states, batch.labels, num_items_in_batch=1, num_valid=batch.num_labels)
        return total

    def tie_weights(self) -> None:
        """Make the head's weight that of the embedding, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> Self:
        """Random weights as Hugging Face draws them: normal, ones in norms, zeros in biases."""
        ranges = {"visual": self.config.vision.initializer_range}
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = ranges.get(name.split(".")[1], self.config.text.initializer_range)
                parameter.normal_(0.0, std, generator=generator)
        pad = self.config.text.pad_token_id
        if pad is not None:
            self.model.language_model.embed_tokens.weight[pad].zero_()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.tie_weights()  # `to_empty` of a meta model makes two of one
        return self


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows(inputs: list[VisionInputs]) -> Tensor | None:
    """Which row of the tower's features each vision token takes; ``None``: the next one."""
    if not any(part.shared for part in inputs):
        return None
    rows, begin = [], 0
    for part in inputs:
        rows.append(part.features + begin)
        begin += sum(map(part.tokens, range(len(part.grids))))
    return _cat(rows)


def _each(features: VisionFeatures, function: Callable[[Tensor], Tensor]) -> VisionFeatures:
    return VisionFeatures(function(features.merged), tuple(map(function, features.deepstack)))


def new(config: Config, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Qwen3VL:
    """A model with random weights that depend on ``seed`` alone; the global random state is left as it was."""
    with torch.device("meta"):
        model = Qwen3VL(config)
    model.to(dtype).to_empty(device=device)
    return model.init_weights(torch.Generator(device).manual_seed(seed))
