"""The responses in a packed batch: which rows predict their tokens, and what the head says of those."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov_kernels import linear_logprob
from m4ov_kernels.head import LogprobOutput
from m4ov_kernels.packing import PackedBatch, Sample

IGNORE = -100


@dataclass(frozen=True)
class Responses:
    """The R tokens with labels of a packed batch of n samples; prompts and images are not among them.

    Attributes:
        rows: int64 ``[R]``: the row of the batch whose hidden state predicts each, the one before it.
        targets: int64 ``[R]``: the tokens themselves.
        cu_seqlens: int32 ``[n + 1]``: sample ``i`` has the tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
        lengths: of each sample, on the host; 0 where nothing counts.
    """

    rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, batch: PackedBatch) -> Responses:
        """Of a batch's labels. The first token of a sample is never one: nothing predicts it."""
        count = batch.num_labels
        # Sorted out on the device; how many there are the host knows.
        places = torch.argsort((batch.labels == IGNORE).to(torch.uint8), stable=True)[:count]
        bounds = torch.tensor([0, *accumulate(batch.labelled)], dtype=torch.int32, device=batch.labels.device)
        return cls(places - 1, batch.labels[places], bounds, batch.labelled)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def sequences(self) -> int:
        """Samples of which any token counts."""
        return sum(length > 0 for length in self.lengths)


def head_logprob(
    head: nn.Linear, hidden_states: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> LogprobOutput:
    """Log-probabilities of targets ``[R]`` by a model's head from hidden states ``[R, D]``; logits never in memory.

    Args:
        head: of a Qwen3-VL; its weight may be sharded over the ranks of its ``group_name``.
    """
    return linear_logprob(
        hidden_states,
        head.weight,
        targets,
        bias=head.bias,
        temperature=temperature,
        entropy=entropy,
        num_valid=targets.shape[0],
        group_name=getattr(head, "group_name", None),
    )


@torch.no_grad()
def response_logprob(model: Qwen3VL, batch: PackedBatch, *, temperature: float = 1.0) -> Tensor:
    """Log-probabilities ``[R]`` of a batch's responses under a model, detached: of the policy before a step, or of a
    reference. In evaluation mode, and back in its own."""
    responses = Responses.of(batch)
    was_training = model.training
    model.eval()
    try:
        hidden_states, _ = model(batch)
    finally:
        model.train(was_training)
    found = head_logprob(model.lm_head, hidden_states[responses.rows], responses.targets, temperature=temperature)
    return found.logprob


def answered(prompt: Sample, tokens: Tensor, *, image_token_id: int, video_token_id: int) -> Sample:
    """A prompt with a completion behind it, of which alone the tokens count. An image or video token that a policy drew
    is text, as no image belongs to it.

    Args:
        prompt: its labels are left out; images and videos stay.
        tokens: int64 ``[L]``, may be empty.
        image_token_id, video_token_id: that stand for images and videos in the prompt.
    """
    types = prompt.mm_token_type_ids
    if types is None:
        types = (prompt.input_ids == image_token_id).long() + 2 * (prompt.input_ids == video_token_id).long()
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, tokens]),
        labels=torch.cat([torch.full_like(prompt.input_ids, IGNORE), tokens]),
        mm_token_type_ids=torch.cat([types, torch.zeros_like(tokens)]),
    )
