"""Before a step of GRPO is timed: our loss and its gradients against the formula over whole logits of transformers'
class, and TRL's own, all of the same weights, answers and advantages; judged by float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from m4ov_bench import gate, generate

if TYPE_CHECKING:
    from m4ov.rl import PolicyBatch

_PROMPTS, _LENGTHS = 3, (16, 5, 11, 1)  # of each prompt's answers
_SAMPLED = 2048  # elements of each parameter's gradient that are compared
_CLIP = 0.2


@dataclass(frozen=True)
class Judged:
    """Answers of several lengths to a few prompts.

    Attributes:
        samples: their prompts, with images. ``completions``: int64 ``[length]`` each. ``advantages``: float32 ``[n]``.
        old: float32, one after the other: log-probabilities of a policy that is so far from this one that some ratios
            are clipped, on either side, and none is near a bound, where a rounding would decide.
    """

    samples: list[Any]
    completions: list[Tensor]
    advantages: Tensor
    old: Tensor

    def padded(self) -> dict[str, Any]:
        """As TRL's trainer hands them to its loss."""
        from torch.nn.utils.rnn import pad_sequence

        prompt_ids = torch.stack([sample.input_ids for sample in self.samples])
        completion_ids = pad_sequence(self.completions, batch_first=True)
        mask = pad_sequence([torch.ones_like(one) for one in self.completions], batch_first=True)
        old = pad_sequence(list(self.old.split([len(one) for one in self.completions])), batch_first=True)
        types = torch.cat([(prompt_ids == generate._IMAGE).long(), torch.zeros_like(completion_ids)], 1)
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": torch.ones_like(prompt_ids),
            "completion_ids": completion_ids,
            "completion_mask": mask,
            "advantages": self.advantages,
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": old,
            "pixel_values": torch.cat([sample.images[0].pixel_values for sample in self.samples]),
            "image_grid_thw": torch.tensor([sample.images[0].grid_thw for sample in self.samples]),
            "num_images": [1] * len(self.samples),
            "mm_token_type_ids": types,
        }

    def batch(self) -> PolicyBatch:
        """As ours takes them."""
        from m4ov.rl import PolicyBatch
        from m4ov.rl.responses import answered
        from m4ov_kernels.packing import PackedBatch

        vision: dict[str, Any] = {"image_token_id": generate._IMAGE, "video_token_id": generate._VIDEO}
        samples = [answered(*both, **vision) for both in zip(self.samples, self.completions, strict=True)]
        return PolicyBatch(PackedBatch.from_samples(samples, **vision, merge_size=2), self.advantages, self.old)


@dataclass(frozen=True)
class Found:
    """A loss, and of every parameter's gradient the same few elements."""

    loss: Tensor
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, loss: Tensor, model: nn.Module, seed: int) -> Found:
        """Differentiates ``loss``; the model's gradients are taken away again."""
        loss.backward()
        random, found = torch.Generator().manual_seed(seed), {}
        for name, parameter in sorted(model.named_parameters()):
            index = torch.randint(parameter.numel(), (_SAMPLED,), generator=random)
            grad = parameter.grad
            found[name] = torch.zeros(_SAMPLED) if grad is None else grad.flatten()[index].clone()
            parameter.grad = None
        return cls(loss.detach(), found)


@dataclass(frozen=True)
class Truth:
    """By transformers' class and the formula: in float64, and in the dtype in which the case computes.

    ``terms``: the mean size of what the loss is the mean of, and nearly cancels: ratio times advantage, times the
    log-probability whose rounding reaches it through the ratio.
    """

    exact: Found
    plain: Found
    terms: Tensor
    dtype: torch.dtype

    def judge(self, found: Found) -> gate.Gate:
        """The numerics rule; each gradient over its largest value, so that all parameters count."""
        dtype, scale = self.dtype, {name: grad.abs().max() for name, grad in self.exact.gradients.items()}

        def joined(which: Found) -> Tensor:
            return torch.cat([which.gradients[name].double() / scale[name].clamp(min=1e-300) for name in scale])

        losses = (found.loss.to(dtype), self.plain.loss.to(dtype), self.exact.loss.double())
        parts = (joined(found).to(dtype), joined(self.plain).to(dtype), joined(self.exact))
        return gate.compare("loss", *losses, terms=self.terms) + gate.compare("gradients", *parts)


def judged(theirs: Any) -> Judged:
    """Drawn from the global generator; ``theirs``: transformers' class in float32."""
    prompts = generate.prompts(_PROMPTS)
    samples = [sample for sample in prompts for _ in _LENGTHS]
    completions = [torch.randint(generate._WORDS, (length,)) for _ in prompts for length in _LENGTHS]
    advantages = torch.randn(len(samples))
    shift = torch.tensor([0.0, 0.5, -0.5])[torch.randint(3, (sum(map(len, completions)),))]
    made = Judged(samples, completions, advantages, shift)
    with torch.no_grad():
        exact = logprobs(copy.deepcopy(theirs).double(), made)
    return Judged(samples, completions, advantages, (exact + shift).float())


def logprobs(model: Any, given: Judged) -> Tensor:
    """Of the answers' tokens, one after the other, by whole logits in the model's dtype."""
    inputs = given.padded()
    both = [torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask")]
    logits = model(
        input_ids=both[0],
        attention_mask=both[1],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        pixel_values=inputs["pixel_values"].to(next(model.parameters()).dtype),
        image_grid_thw=inputs["image_grid_thw"],
        use_cache=False,
    ).logits
    count = inputs["completion_ids"].shape[1]
    said = logits[:, -count - 1 : -1].log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
    kept: Tensor = said[inputs["completion_mask"].bool()]
    return kept


def formula(model: Any, given: Judged) -> tuple[Tensor, Tensor]:
    """GRPO's loss as it is written down: the mean over answers of the mean over their tokens; and its terms' size."""
    new = logprobs(model, given)
    lengths = [len(one) for one in given.completions]
    advantage = given.advantages.to(new).repeat_interleave(torch.tensor(lengths))
    ratio = (new - given.old.to(new)).exp()
    terms = -torch.minimum(ratio * advantage, ratio.clamp(1 - _CLIP, 1 + _CLIP) * advantage)
    sizes = (ratio * advantage * new).detach().abs()
    loss, size = (torch.stack([part.mean() for part in parts.split(lengths)]).mean() for parts in (terms, sizes))
    return loss, size


def truth(theirs: Any, given: Judged, dtype: torch.dtype, seed: int) -> Truth:
    exact, plain = copy.deepcopy(theirs).double(), copy.deepcopy(theirs)
    for parameter in plain.parameters():  # rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    if dtype != torch.float32:  # of the weights as they are rounded
        exact.load_state_dict(plain.state_dict())
    loss, terms = formula(exact, given)
    return Truth(Found.of(loss, exact, seed), Found.of(formula(plain, given)[0], plain, seed), terms, dtype)


def ours(model: Any, given: Judged, seed: int) -> Found:
    """Our loss of our model."""
    from m4ov.rl import PolicyLoss
    from m4ov.rl_recipe import AlgorithmConfig

    total, count = PolicyLoss(AlgorithmConfig(name="grpo"))(model, given.batch())
    return Found.of(total / count, model, seed)


def of_trl(trainer: Any, given: Judged, seed: int) -> Found:
    """TRL's loss, by its trainer's own code, of the model that it is to train."""
    inputs: Mapping[str, Any] = given.padded()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return Found.of(trainer._compute_loss(trainer.model, inputs), trainer.model, seed)
