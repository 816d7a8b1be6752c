"""Answers drawn, rewarded and compared: the data of an online run, the same on any number of ranks, and resumable in
the middle of a rollout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.rl.advantages import compose, pass_at_k
from m4ov.rl.algorithms import PolicyBatch
from m4ov.rl.responses import answered, response_logprob
from m4ov.rl.rewards import Answer, Rewards
from m4ov.rl.sampling import informative
from m4ov.rl_recipe import RLConfig
from m4ov.train import TrainingError, World
from m4ov_kernels import invariant
from m4ov_kernels.numerics import certify
from m4ov_kernels.packing import PackedBatch, Sample


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is asked.

    Attributes:
        sample: token ids up to where the answer begins, with images.
        question: its text.
        ground_truth, extra: what rewards need.
    """

    sample: Sample
    question: str = ""
    ground_truth: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Drawn:
    """An answer: int64 ``tokens`` ``[L]``, the sampler's ``logprobs`` ``[L]``, whether it ended by itself, its text."""

    tokens: Tensor
    logprobs: Tensor
    finished: bool
    text: str


class Sampler(Protocol):
    """Draws answers with the trained policy as it is."""

    def draw(self, prompts: Sequence[Sample], seeds: Sequence[int]) -> list[list[Drawn]]:
        """Of each prompt as many answers as a rollout has; what is drawn follows from the weights, the prompt and its
        seed alone."""


@dataclass(frozen=True)
class Group:
    """The answers to a prompt, as JSON has it: what a checkpoint holds of a rollout that is not used up.

    Attributes:
        prompt: its index. ``seed``: of its draws, and of what is masked in its images.
        tokens, logprobs, old_logprobs, finished, texts: of each answer.
        values: component → of each answer. ``correct``: of each answer.
        advantages: of each answer; empty until the rollout is whole.
    """

    prompt: int
    seed: int
    tokens: list[list[int]]
    logprobs: list[list[float]]
    old_logprobs: list[list[float]]
    finished: list[bool]
    texts: list[str]
    values: dict[str, list[float]]
    correct: list[bool]
    failures: dict[str, list[str | None]]
    advantages: list[float] = field(default_factory=list)


class Rollouts:
    """The loop's data: each rollout is drawn when its first step comes, and serves ``config.rollout.updates`` steps.

    With ``delay`` 1 the rollout for the steps after next is drawn before this one is learned from: as a sampler beside
    the trainer does it, one step off, but the same every time.

    Every rank draws and rewards its share of the prompts, then all know all of it; so what a step holds does not depend
    on the ranks, and the state, which has rollouts in flight, is the same on all.

    Args:
        model: that is trained, and with which ``sampler`` draws.
        reward: of the configuration.
    """

    def __init__(
        self,
        model: Qwen3VL,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        reward: Rewards,
        config: RLConfig,
        world: World | None = None,
    ) -> None:
        self.model, self.prompts, self.sampler, self.reward = model, prompts, sampler, reward
        self.config, self.world = config, world or World()
        if len(prompts) < config.rollout.prompts:
            raise ValueError(
                f"rollout.prompts: expected at most {len(prompts)}, the prompts; got {config.rollout.prompts}"
            )
        self.read = 0  # prompts that were taken from the stream
        self.drawn = 0  # rollouts
        self.ahead: list[list[Group]] = []  # that are drawn, the one in use first
        self.metrics: dict[str, float] = {}  # of the newest rollout; emptied by whoever logs them
        self.shown: list[dict[str, Any]] = []

    def batches(self, step: int) -> list[PolicyBatch]:
        """This rank's rows of a step: its share of a minibatch of the rollout in use.

        Raises:
            TrainingError: no prompt of all rounds tells answers apart.
        """
        options = self.config.rollout
        inner = step % options.updates
        if not inner:
            if self.ahead:  # used up
                self.ahead.pop(0)
            while len(self.ahead) <= options.delay:
                self.ahead.append(self._rollout(step))
        groups = self.ahead[0]
        epoch, place = divmod(inner, options.minibatches)
        order = np.random.default_rng([options.seed, step // options.updates, epoch, 7]).permutation(len(groups))
        # Answers to one prompt stay together as far as minibatches of one size, and a short rollout, let them.
        every = [(groups[index], answer) for index in order for answer in range(len(groups[index].tokens))]
        flat = [every[index] for index in np.array_split(np.arange(len(every)), options.minibatches)[place]]
        if len(flat) < self.world.data_size:
            raise TrainingError(f"step {step}: {len(flat)} answers are too few for {self.world.data_size} ranks")
        share = np.array_split(np.arange(len(flat)), self.world.data_size)[self.world.data_rank]
        return [self._batch([flat[index] for index in row]) for row in self._rows(flat, share.tolist())]

    def state_dict(self) -> dict[str, Any]:
        """Place in the stream of prompts, and rollouts that are drawn and not used up."""
        ahead = [[vars(group) for group in groups] for groups in self.ahead]
        return {"read": self.read, "drawn": self.drawn, "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, on any number of ranks."""
        self.read, self.drawn = state["read"], state["drawn"]
        self.ahead = [[Group(**group) for group in groups] for groups in state["ahead"]]

    # A rollout.

    def _rollout(self, step: int) -> list[Group]:
        options = self.config.rollout

        def rounds() -> Iterator[list[Group]]:
            while True:
                yield self._round(self._next_prompts(options.prompts))

        dynamic = options.rounds > 1
        found = informative(
            rounds(), self._tells if dynamic else lambda _: True, wanted=options.prompts, most_rounds=options.rounds
        )
        if not found.kept:
            what = f"no prompt of {found.rounds} rounds has answers that differ in reward"
            raise TrainingError(f"step {step}: {what}")
        groups, self.drawn = found.kept, self.drawn + 1
        values = {name: [value for group in groups for value in group.values[name]] for name in groups[0].values}
        correct = [right for group in groups for right in group.correct]
        sizes = [len(group.tokens) for group in groups]
        composed = compose(values, correct, sizes, self.config.advantages)
        parts = composed.advantages.split(sizes)
        groups = [replace(group, advantages=part.tolist()) for group, part in zip(groups, parts, strict=True)]
        everything = found.kept + found.surplus + found.dropped
        self.metrics = {**composed.metrics, **found.metrics, **self._watched(everything)}
        self.shown = self._examples(groups)
        return groups

    def _tells(self, group: Group) -> bool:
        found = compose(group.values, group.correct, [len(group.tokens)], self.config.advantages)
        return bool(found.informative[0])

    def _next_prompts(self, count: int) -> list[tuple[int, int]]:
        """Indices of the next prompts, and seeds. An epoch visits every prompt once, in a new order."""
        taken = []
        orders: dict[int, np.ndarray] = {}
        for place in range(self.read, self.read + count):
            epoch, inside = divmod(place, len(self.prompts))
            if epoch not in orders:
                random = np.random.default_rng([self.config.rollout.seed, epoch])
                orders[epoch] = random.permutation(len(self.prompts))
            order = orders[epoch]
            seed = np.random.SeedSequence([self.config.rollout.seed, place, 11]).generate_state(1, np.uint64)
            taken.append((int(order[inside]), int(seed[0])))
        self.read += count
        return taken

    def _round(self, visits: Sequence[tuple[int, int]]) -> list[Group]:
        """Drawn, scored and rewarded: this rank its share, then all of them."""
        world = self.world
        own = [place for place in range(len(visits)) if place % world.data_size == world.data_rank]
        made: dict[int, Group] = {}
        if own:
            made = dict(zip(own, self._groups([visits[place] for place in own]), strict=True))
        if world.size > 1:
            parts: list[Any] = [None] * world.size
            with world.collective("gathering rollouts"):
                dist.all_gather_object(parts, made)
            made = {place: group for part in parts for place, group in part.items()}
        return [made[place] for place in range(len(visits))]

    def _groups(self, visits: Sequence[tuple[int, int]]) -> list[Group]:
        prompts = [self.prompts[index] for index, _ in visits]
        was_training = self.model.training
        self.model.eval()  # no dropout of adapters
        try:
            drawn = self.sampler.draw([prompt.sample for prompt in prompts], [seed for _, seed in visits])
        finally:
            self.model.train(was_training)
        scores = self.reward(
            [
                [
                    Answer(
                        one.text, prompt.ground_truth, one.tokens.tolist(), one.finished, prompt.question, prompt.extra
                    )
                    for one in answers
                ]
                for prompt, answers in zip(prompts, drawn, strict=True)
            ]
        )
        groups, place = [], 0
        for (index, seed), answers in zip(visits, drawn, strict=True):
            rows = slice(place, place + len(answers))
            place += len(answers)
            groups.append(
                Group(
                    prompt=index,
                    seed=seed,
                    tokens=[one.tokens.tolist() for one in answers],
                    logprobs=[one.logprobs.tolist() for one in answers],
                    old_logprobs=[one.logprobs.tolist() for one in answers],
                    finished=[one.finished for one in answers],
                    texts=[one.text for one in answers],
                    values={name: values[rows] for name, values in scores.values.items()},
                    correct=scores.correct[rows],
                    failures={name: kinds[rows] for name, kinds in scores.failures.items()},
                )
            )
        return self._rescored(groups) if self.config.rollout.rescore else groups

    def _rescored(self, groups: list[Group]) -> list[Group]:
        """With the trainer's own log-probabilities of the answers."""
        flat = [(group, answer) for group in groups for answer in range(len(group.tokens))]
        found: list[list[float]] = []
        for row in self._rows(flat, range(len(flat))):
            packed = self._packed([flat[index] for index in row])[0]
            with invariant() if self.config.rollout.shared else nullcontext():
                values = response_logprob(self.model, packed, temperature=self.config.rollout.temperature)
            found += [part.tolist() for part in values.split(list(packed.labelled))]
        rescored, place = [], 0
        for group in groups:
            rescored.append(replace(group, old_logprobs=found[place : place + len(group.tokens)]))
            place += len(group.tokens)
        return rescored

    # Rows.

    def _rows(self, flat: Sequence[tuple[Group, int]], wanted: Sequence[int]) -> list[list[int]]:
        """Answers in rows of about so many tokens, in order, so that answers to one prompt share its images."""
        rows: list[list[int]] = []
        room = 0
        for index in wanted:
            group, answer = flat[index]
            length = len(self.prompts[group.prompt].sample.input_ids) + len(group.tokens[answer])
            if not rows or length > room:
                rows.append([])
                room = self.config.rollout.row_tokens
            rows[-1].append(index)
            room -= length
        return rows

    def _packed(self, row: Sequence[tuple[Group, int]]) -> tuple[PackedBatch, tuple[int, ...]]:
        """The row, and a seed for each of its images."""
        config = self.model.config
        samples: list[Sample] = []
        seeds: dict[int, int] = {}
        vision: dict[str, Any] = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
        for group, answer in row:
            prompt = self.prompts[group.prompt].sample
            tokens = torch.tensor(group.tokens[answer], dtype=torch.int64)
            samples.append(answered(prompt, tokens, **vision))
            for place, image in enumerate(prompt.images):
                seeds.setdefault(id(image), (group.seed + place) % 2**63)
        packed = PackedBatch.from_samples(
            samples,
            **vision,
            merge_size=config.vision.spatial_merge_size,
        )
        device = self.model.lm_head.weight.device
        return packed.to(device), tuple(seeds.values())

    def _batch(self, row: Sequence[tuple[Group, int]]) -> PolicyBatch:
        packed, seeds = self._packed(row)
        device = packed.input_ids.device

        def joined(name: str) -> Tensor:
            values = [value for group, answer in row for value in getattr(group, name)[answer]]
            return torch.tensor(values, dtype=torch.float32, device=device)

        advantages = torch.tensor([group.advantages[answer] for group, answer in row], device=device)
        return PolicyBatch(packed, advantages, joined("old_logprobs"), joined("logprobs"), image_seeds=seeds)

    # What is watched.

    def _watched(self, groups: Sequence[Group]) -> dict[str, float]:
        answers = [(group, answer) for group in groups for answer in range(len(group.tokens))]
        lengths = [len(group.tokens[answer]) for group, answer in answers]
        found = {
            "length_mean": float(np.mean(lengths)),
            "length_max": float(max(lengths)),
            "unfinished": float(np.mean([not group.finished[answer] for group, answer in answers])),
        }
        for name in groups[0].values:
            values = [value for group in groups for value in group.values[name]]
            found[f"reward_{name}"] = float(np.mean(values))
            found[f"reward_{name}_std"] = float(np.std(values))
            failed = [kind is not None for group in groups for kind in group.failures[name]]
            found[f"reward_{name}_failed"] = float(np.mean(failed))
        counts = [(len(group.correct), sum(group.correct)) for group in groups]
        for k in sorted({1, min(self.config.advantages.k, self.config.rollout.samples), self.config.rollout.samples}):
            found[f"pass@{k}"] = float(np.mean([pass_at_k(size, right, k) for size, right in counts]))
        ours = torch.tensor([value for group in groups for part in group.old_logprobs for value in part])
        theirs = torch.tensor([value for group in groups for part in group.logprobs for value in part])
        if len(ours):
            total = certify(theirs, ours).total
            found |= {"mismatch_max_abs": float(total.max_abs), "mismatch_mean_abs": float(total.mean_abs)}
        return found

    def _examples(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """The first answers of the first prompts, for the report."""
        return [
            {
                "rollout": self.drawn,
                "prompt": group.prompt,
                "question": self.prompts[group.prompt].question,
                "ground_truth": self.prompts[group.prompt].ground_truth,
                "text": group.texts[0],
                "tokens": len(group.tokens[0]),
                "finished": group.finished[0],
                "correct": group.correct[0],
                "solved": sum(group.correct) / len(group.correct),
                "advantage": group.advantages[0],
                "values": {name: values[0] for name, values in group.values.items()},
            }
            for group in groups[: self.config.rollout.shown]
        ]
