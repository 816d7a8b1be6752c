"""The loops of the GRPO benchmark, each in a process of its own (:mod:`m4ov_bench.turns`): ours, and TRL's.

All begin with the same weights, have the same prompts in every step, draw as many answers of one length, reward them
alike, and update with AdamW at one learning rate.
"""

from __future__ import annotations

import logging
import pickle
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from m4ov_bench import generate, measure, rl_gate
from m4ov_bench.case import _dtype_name
from m4ov_bench.peers import grpo
from m4ov_bench.sft_sides import AllAdamW
from m4ov_bench.turns import Turns

if TYPE_CHECKING:
    from m4ov.rl import PolicyBatch

RATE, BETAS, CLIP_NORM = 1e-5, (0.9, 0.95), 1.0
_MEASURED = 1  # the step whose memory is measured: the second, when the optimizer has its state


@dataclass(frozen=True)
class GrpoCase:
    """``prompts``, ``samples`` of each, ``tokens`` of a sample; ``micro``: samples that go through the model at once in
    the update."""

    prompts: int
    samples: int
    tokens: int
    micro: int
    dtype: torch.dtype
    quick: bool = False

    def __str__(self) -> str:
        made = f"{self.prompts} prompts × {self.samples} samples × {self.tokens} tokens"
        return f"Qwen3-VL 3 M, {made}, update by {self.micro}, {_dtype_name(self.dtype)}"


@dataclass(frozen=True)
class End:
    """What a loop did.

    Attributes:
        tokens, completions: of the first step, prompts and answers, and answers alone, as the model was given them.
        update_mib: the most memory in an update over what the process held at its beginning: activations, gradients,
            scratch space; weights, optimizer and rollout are there before. ``None`` where the system cannot tell.
        found: of TRL: its loss and gradients on the judged answers, a pickled :class:`m4ov_bench.rl_gate.Found`.
    """

    tokens: int
    completions: int
    update_mib: float | None
    found: bytes | None = None


def variety(tokens: list[int]) -> float:
    """The reward: the share of an answer's tokens that it has not had before."""
    return len(set(tokens)) / len(tokens)


def reward(answer: Any) -> float:
    """The same, as ours calls it."""
    return variety(answer.tokens)


reward.reward_range = (0.0, 1.0)  # type: ignore[attr-defined]


def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The same, as TRL calls it."""
    return [variety(tokens) for tokens in completion_ids]


def begin(case: GrpoCase, seed: int) -> tuple[Any, list[Any]]:
    """Transformers' class in float32 with the weights that all begin with, and the prompts."""
    torch.manual_seed(seed)
    return generate.build(), generate.prompts(case.prompts)


def tokenizer() -> Any:
    """Of words apart from each other; transformers'."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = {generate._IMAGE: "<|image_pad|>", generate._VIDEO: "<|video_pad|>"}
    words = [marks.get(number, f"w{number}") for number in range(generate._VOCABULARY)]
    words[generate._WORDS], words[generate._WORDS + 1] = "<pad>", "<eos>"
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


class _Update:
    """The memory of one update."""

    def __init__(self) -> None:
        self.done, self.mib = 0, None
        self._held: float | None = None
        self._begun = False

    def begins(self) -> None:
        """Before each forward of an update; the first of the measured one counts."""
        from m4ov.train.machine import reset_peak_mib

        if self.done == _MEASURED and not self._begun:
            measure.release()  # what is free now is not held
            self._held, self._begun = reset_peak_mib(), True

    def ended(self) -> None:
        from m4ov.train.machine import peak_mib

        peak = peak_mib()
        if self.done == _MEASURED and self._held is not None and peak is not None:
            self.mib = peak - self._held
        self.done += 1


def ours(turns: Turns, case: GrpoCase, seed: int, threads: int) -> End:
    """Rollouts by the embedded engine, the policy loss, the runtime's loop and optimizer."""
    torch.set_num_threads(threads)
    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401  the loop imports it; a library is no update's memory

    from m4ov.generate import Engine, SamplingOptions
    from m4ov.recipe import OptimConfig, TrainConfig
    from m4ov.rl import EngineSampler, PolicyLoss, Prompt, Rewards, Rollouts
    from m4ov.train import train

    theirs, asked = begin(case, seed)
    start = {name: weight.detach().clone() for name, weight in theirs.named_parameters()}
    model = generate.ours_of(theirs).to(case.dtype).train()
    config = configuration(case, asked)
    options = SamplingOptions(case.tokens, samples=case.samples, ignore_end=True)
    sampler = EngineSampler(Engine(model, tokenizer=tokenizer()), options)
    loss, update, first = PolicyLoss(config.algorithm), _Update(), [0, 0]

    class Between:
        """The loop's callback (:class:`m4ov.train.Callback`) that waits between the steps."""

        ended = False

        def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {}

        def begin(self, state: dict[str, Any] | None) -> None:
            self.ended = not turns.begin()

        def after_step(self, done: int) -> None:
            update.ended()
            loss.window.close()
            self.ended = not turns.next()

        def state_dict(self) -> dict[str, Any]:
            return {}

    def loss_of(wrapped: nn.Module, batch: PolicyBatch) -> tuple[Tensor, int]:
        update.begins()
        if not update.done:
            first[0] += batch.tokens
            first[1] += batch.packed.num_labels
        return loss(wrapped.model, batch)  # type: ignore[arg-type]

    with Rewards(config.rewards) as scorer, tempfile.TemporaryDirectory(prefix="m4ov-bench-") as folder:
        train(
            AllAdamW(model),
            Rollouts(model, [Prompt(sample) for sample in asked], sampler, scorer, config),
            loss_of,
            config=TrainConfig(
                steps=10**6,
                checkpoint_seconds=0.0,
                precision="fp32" if case.dtype == torch.float32 else "bf16",
            ),
            optim=OptimConfig(lr=RATE, betas=BETAS, max_grad_norm=CLIP_NORM),
            folder=Path(folder),
            console=Console(quiet=True),
            start=start,
            schedule=lambda step: 1.0,
            callback=Between(),
        )
    return End(*first, update.mib)


def configuration(case: GrpoCase, asked: list[Any]) -> Any:
    """Plain GRPO: one update for each rollout, by the sampler's log-probabilities, which are the trainer's."""
    from m4ov.rl_recipe import (
        AdvantageConfig,
        AlgorithmConfig,
        ObjectiveConfig,
        RewardConfig,
        RewardsConfig,
        RLConfig,
        RolloutConfig,
    )

    length = len(asked[0].input_ids) + case.tokens
    rollout = RolloutConfig(
        prompts=case.prompts,
        samples=case.samples,
        max_tokens=case.tokens,
        row_tokens=case.micro * length,
        rescore=False,
        shown=0,
    )
    return RLConfig(
        rollout=rollout,
        rewards=RewardsConfig({"variety": RewardConfig("m4ov_bench.rl_sides:reward", seconds=0)}, correct="variety"),
        advantages=AdvantageConfig(objectives={"variety": ObjectiveConfig()}, outcome="", normalise="none"),
        algorithm=AlgorithmConfig(name="grpo"),
    )


def theirs(turns: Turns, name: str, case: GrpoCase, seed: int, threads: int, steps: int, file: Path) -> End:
    """TRL's trainer: ``name`` of :func:`m4ov_bench.peers.grpo.names`; ``steps``: how many have prompts; ``file``: the
    judged answers."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import trl.trainer.grpo_trainer  # noqa: F401  before the memory is looked at
    from transformers import TrainerCallback
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    model, asked = begin(case, seed)
    if name == grpo.PURE:
        for parameter in model.parameters():  # rotary frequencies stay float32
            parameter.data = parameter.data.to(case.dtype)
    update, first = _Update(), [0, 0]

    class Between(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if not turns.begin():
                control.should_training_stop = True

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            update.ended()
            if not turns.next():
                control.should_training_stop = True

    def before_update(inputs: Mapping[str, Any]) -> None:
        update.begins()
        if not update.done:
            first[0] += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
            first[1] += int(inputs["completion_mask"].sum())

    with tempfile.TemporaryDirectory(prefix="m4ov-bench-") as folder:
        options = {
            "output_dir": folder,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "weight_decay": 0.0,
            "max_grad_norm": CLIP_NORM,
            "seed": seed % 2**31,
        }
        loop = grpo.trainer(
            name,
            model,
            grpo.prepared(tokenizer(), asked, generate._IMAGE),
            rewards,
            prompts=case.prompts,
            samples=case.samples,
            tokens=case.tokens,
            micro=case.micro,
            steps=steps,
            before_update=before_update,
            callback=Between(),
            options=options,
        )
        found = rl_gate.of_trl(loop, torch.load(file, weights_only=False), seed)
        loop.train()
    return End(*first, update.mib, pickle.dumps(found))  # bytes: a tensor would be shared with a process that ends
