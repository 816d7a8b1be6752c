"""The perception loss: the same response with its images, and with them masked, in one packed row of vision tower and
language model; the divergence of the two policies comes from hidden states, without logits. README.md has formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from m4ov.data.images import MEAN, STD
from m4ov.rl.responses import Responses, head_logprob
from m4ov.rl_recipe import PerceptionConfig
from m4ov_kernels import linear_kl
from m4ov_kernels.packing import PackedBatch, VisionInputs

LARGEST = 20.0  # nats of |log π_mask − log π|, beyond which the sampled estimate is a constant
UNITS = ("feature", "patch")


def masked_units(grid_thw: tuple[int, int, int], merge_size: int, share: float, seed: int, unit: str) -> Tensor:
    """Which patches of one image are masked: bool ``[t · h · w]`` in the order of its ``pixel_values``, which is merge
    order: ``merge_size²`` patches that follow each other are one feature, so one token.

    Args:
        share: of the units; at least one is masked, and the nearest whole number of them.
        seed: with which the units alone are determined.
        unit: "feature": whole features; "patch": single patches, of which a feature may keep some.
    """
    if unit not in UNITS:
        raise ValueError(f"mask_patches: unit: expected {' or '.join(UNITS)}; got {unit!r}")
    if not 0 < share <= 1:
        raise ValueError(f"mask_patches: share: expected more than 0, at most 1; got {share!r}")
    each = merge_size**2 if unit == "feature" else 1
    count = prod(grid_thw) // each
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: max(1, round(share * count))]
    units = torch.zeros(count, dtype=torch.bool)
    units[chosen] = True
    return units.repeat_interleave(each)


def mask_patches(
    images: VisionInputs,
    *,
    share: float = 0.6,
    seeds: Sequence[int],
    unit: str = "feature",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> VisionInputs:
    """Images with some of their patches black, as normalised pixels are: ``(0 − mean) / std`` of each channel.

    Args:
        images: of a packed batch; not changed. ``pixel_values`` ``[P, C · T · p · p]``, as
            :func:`m4ov_kernels.pack_patches` lays them out: a row is a patch, channel after channel.
        share, unit: see :func:`masked_units`.
        seeds: one for each image.
        mean, std: of the C channels.

    Raises:
        ValueError: not one seed for each image, or the rows are not of C channels.
    """
    if len(seeds) != len(images.grids):
        expected = f"{len(images.grids)}, one for each image"
        raise ValueError(f"mask_patches: seeds: expected {expected}; got {len(seeds)}")
    pixels = images.pixel_values
    channels = len(mean)
    if len(std) != channels or pixels.shape[1] % channels:
        raise ValueError(f"mask_patches: mean, std: expected one for each channel of {pixels.shape[1]} values a patch")
    black = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=pixels.dtype, device=pixels.device)
    black = black.repeat_interleave(pixels.shape[1] // channels)
    parts = [
        masked_units(grid, images.merge_size, share, seed, unit) for grid, seed in zip(images.grids, seeds, strict=True)
    ]
    mask = torch.cat(parts).to(pixels.device)
    return replace(images, pixel_values=torch.where(mask[:, None], black, pixels))


@dataclass(frozen=True)
class Twin:
    """Samples, and behind them those of them that show an image once more, with it masked.

    Attributes:
        batch: of both; the vision tower and the language model see them in one row.
        responses: of both: first the R tokens of the samples, then the M tokens of the masked ones.
        count: R.
        seen: int64 ``[M]``: which of the R tokens each of the M masked ones is; ``None``: all of them, in order.
        masked_lengths: response tokens of each masked sample.
    """

    batch: PackedBatch
    responses: Responses
    count: int
    seen: Tensor | None
    masked_lengths: tuple[int, ...]

    def of_seen(self, values: Tensor) -> Tensor:
        """Of ``[R, …]`` those that have a masked twin, ``[M, …]``."""
        return values if self.seen is None else values[self.seen]


def twin(
    batch: PackedBatch,
    config: PerceptionConfig,
    seeds: Sequence[int],
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Twin | None:
    """The batch and its masked twin; ``None`` where no sample shows an image.

    Args:
        seeds: one for each image of the batch.
        mean, std: with which pixels were normalised.

    Raises:
        ValueError: see :func:`mask_patches`.
    """
    if batch.images is None:
        return None
    images = mask_patches(batch.images, share=config.share, seeds=seeds, unit=config.unit, mean=mean, std=std)
    samples = [sample for sample, shown in enumerate(batch.images.shown) if shown]
    masked = replace(batch, images=images)
    every = len(samples) == len(batch)
    masked = masked if every else masked[samples]
    seen = None
    if not every:
        bounds = [0, *accumulate(batch.labelled)]
        ranges = [torch.arange(bounds[sample], bounds[sample + 1]) for sample in samples]
        seen = torch.cat(ranges).to(batch.labels.device)
    both = PackedBatch.concatenate([batch, masked])
    return Twin(both, Responses.of(both), batch.num_labels, seen, masked.labelled)


@dataclass(frozen=True)
class Perception:
    """Of M response tokens, float32.

    Attributes:
        loss: ``[M]``: ``−γ KL + η₁ H(π) + η₂ H(π_mask)``, to be minimised.
        kl, entropy, masked_entropy: ``[M]``, in nats, detached; an entropy that was not computed is ``None``.
        capped: bool ``[M]``: beyond the cap.
    """

    loss: Tensor
    kl: Tensor
    entropy: Tensor | None
    masked_entropy: Tensor | None
    capped: Tensor


def perception(
    head: nn.Linear,
    hidden_states: Tensor,
    masked_hidden_states: Tensor,
    targets: Tensor,
    config: PerceptionConfig,
    *,
    temperature: float = 1.0,
    logprob: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Perception:
    """How much the policy depends on its images, as a loss of each token.

    With π the policy that sees the image and π_mask the one that sees it masked: ``"sampled"``: ``e^d − d − 1`` with
    ``d = log π_mask − log π`` of the token (PAPO's); ``"exact"``: ``KL(π ‖ π_mask)`` over the whole vocabulary. The
    gradient reaches both policies, or with ``through="original"`` π alone. Beyond ``cap`` nats a token's divergence is
    a constant: it does not grow without bound by ruining π_mask.

    Args:
        head: a :class:`~m4ov_kernels.nn.CausalLMHead`.
        hidden_states, masked_hidden_states: ``[M, D]``, of the rows that predict the response tokens, of both halves of
            the :class:`Twin`; neither padding nor prompt is there.
        targets: int64 ``[M]``.
        logprob, entropy: ``[M]``, of the original, if they are known (the policy's loss has them): not made twice.

    Raises:
        ValueError: the head's weight is sharded by rows and ``kl`` is "exact", which needs all of it.

    Source: PAPO, arXiv 2507.06448.
    """
    if getattr(head, "group_name", None) is not None and config.kl == "exact":
        raise ValueError("perception.kl: expected sampled where the vocabulary is sharded over ranks; got exact")
    both, sampled, guarded = config.through == "both", config.kl == "sampled", config.masked_entropy > 0
    if (sampled and logprob is None) or (config.entropy and entropy is None):
        found = head_logprob(head, hidden_states, targets, temperature=temperature, entropy=config.entropy > 0)
        logprob, entropy = found.logprob, found.entropy
    masked_logprob = masked_entropy = None
    if sampled or guarded:
        # The entropy is guarded through π_mask in any case; the divergence goes through it only if asked for.
        states = masked_hidden_states if both or guarded else masked_hidden_states.detach()
        masked = head_logprob(head, states, targets, temperature=temperature, entropy=guarded)
        masked_logprob, masked_entropy = masked.logprob, masked.entropy
    if sampled:
        assert masked_logprob is not None
        assert logprob is not None
        d = ((masked_logprob if both else masked_logprob.detach()) - logprob).clamp(-LARGEST, LARGEST)
        kl = torch.expm1(d) - d
    else:
        kl = _exact(head, hidden_states, masked_hidden_states, temperature, both)
    capped = kl.detach() > config.cap if config.cap else torch.zeros_like(kl, dtype=torch.bool)
    loss = -config.weight * torch.where(capped, config.cap, kl)
    if config.entropy:
        assert entropy is not None
        loss = loss + config.entropy * entropy
    if masked_entropy is not None:
        loss = loss + config.masked_entropy * masked_entropy
    return Perception(
        loss,
        kl.detach(),
        None if entropy is None else entropy.detach(),
        None if masked_entropy is None else masked_entropy.detach(),
        capped,
    )


def _exact(head: nn.Linear, hidden: Tensor, masked: Tensor, temperature: float, both: bool) -> Tensor:
    """``KL(π ‖ π_mask)``, ``[R]``. ``linear_kl`` differentiates one side; the same divergence seen from the other side
    adds its gradient, and nothing to the value."""
    weight, bias = head.weight, head.bias
    fixed_weight, fixed_bias = weight.detach(), None if bias is None else bias.detach()
    options: dict[str, Any] = {"temperature": temperature, "bias": bias, "ref_bias": fixed_bias}
    kl = linear_kl(hidden, weight, masked.detach(), fixed_weight, kind="reverse", **options)
    if both and torch.is_grad_enabled():
        other = linear_kl(masked, weight, hidden.detach(), fixed_weight, kind="forward", **options)
        kl = kl + (other - other.detach())
    return kl
