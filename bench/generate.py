"""Rollouts with log-probabilities: the embedded engine against ``transformers.generate``, same model and prompts.

The quickstart's model (3.2 M parameters), random weights; 8 prompts of one 64×64 image and 12 words, 8 samples each, 32
tokens every sample, temperature 1; the log-probability of every token is part of the call (of transformers: those of
its processed scores). Three ways of asking transformers: all prompts in one batch with ``num_return_sequences``, prompt
by prompt with it, and a call for each sample. First, in fp32, both must decode the same greedy tokens; and what the
engine reports must be, bit by bit, what a packed forward inside ``invariant()`` gives.

The one benchmark of a layer above the operators, which it imports when it runs.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import measure
from m4ov_bench.case import _dtype_name
from m4ov_bench.row import Peer, Row
from m4ov_bench.session import OURS, Session, timing
from m4ov_kernels import invariant, linear_logprob
from m4ov_kernels.dispatch import native_extension
from m4ov_kernels.packing import PackedBatch, Patches, Sample

_VOCABULARY, _WORDS = 512, 500
_IMAGE, _VIDEO, _START, _END = 508, 509, 510, 511
_GRID = (1, 8, 8)  # patches of 8×8 pixels; 16 tokens after merging
_TOLD, _GREEDY = 12, 16  # words of a question, tokens of the gate
BATCH, EACH, ONE = "one batch, num_return_sequences", "prompt by prompt, num_return_sequences", "sample by sample"


@dataclass(frozen=True)
class RolloutCase:
    """``prompts``, ``samples`` of each, ``tokens`` of a sample. ``alone``: one call a sample is measured too."""

    prompts: int
    samples: int
    tokens: int
    dtype: torch.dtype
    alone: bool = True
    quick: bool = False

    def __str__(self) -> str:
        made = f"{self.prompts} prompts × {self.samples} samples × {self.tokens} tokens"
        return f"Qwen3-VL 3 M, {made}, {_dtype_name(self.dtype)}"


CASES = (
    RolloutCase(8, 8, 32, torch.bfloat16, quick=True),
    RolloutCase(8, 8, 32, torch.float32, quick=True),
    RolloutCase(1, 8, 32, torch.bfloat16),
    RolloutCase(1, 8, 32, torch.float32),
    RolloutCase(8, 8, 128, torch.bfloat16, alone=False),
)


def benchmark(session: Session) -> Iterator[Row]:
    if importlib.util.find_spec("transformers") is None:
        yield _row(session, "all", "", note="transformers is not installed")
        return
    session.say("rollouts: gate")
    theirs = build()
    problem = check(theirs)
    for case in filter(session.wants, CASES):
        if problem:
            yield _row(session, str(case), problem)
            continue
        session.say(f"rollouts: {case}")
        yield _measured(session, case, theirs)


def build() -> Any:
    """Transformers' class with the quickstart's sizes, in float32."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1],
        "initializer_range": 0.06,
    }
    marks = {
        "image_token_id": _IMAGE,
        "video_token_id": _VIDEO,
        "vision_start_token_id": _START,
        "vision_end_token_id": _END,
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **marks, tie_word_embeddings=True)
    return Qwen3VLForConditionalGeneration(config).eval()


def ours_of(theirs: Any) -> Any:
    """This package's model with the same weights."""
    from m4ov.models.qwen3_vl import Config, Qwen3VL

    made = Qwen3VL(Config.from_dict(theirs.config.to_dict())).to(theirs.dtype)
    made.load_state_dict(theirs.state_dict())
    return made.eval()


def prompts(count: int) -> list[Sample]:
    """An image between its marks, then words."""
    image = [_START, *[_IMAGE] * (_GRID[1] * _GRID[2] // 4), _END]
    made = []
    for _ in range(count):
        ids = torch.cat([torch.tensor(image), torch.randint(_WORDS, (_TOLD,))])
        pixels = torch.randn(_GRID[1] * _GRID[2], 3 * 2 * 8 * 8)
        made.append(Sample(ids, None, [Patches(pixels, _GRID)]))
    return made


def inputs(asked: list[Sample], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same for transformers: a batch, all of one length."""
    ids = torch.stack([sample.input_ids for sample in asked])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == _IMAGE).int(),
        "pixel_values": torch.cat([sample.images[0].pixel_values for sample in asked]).to(dtype),
        "image_grid_thw": torch.tensor([_GRID] * len(asked)),
    }


def check(theirs: Any) -> str:
    """What is wrong, if anything is; in float32."""
    from m4ov.generate import Engine, SamplingOptions

    ours, asked = ours_of(theirs), prompts(3)
    greedy = SamplingOptions(max_tokens=_GREEDY, temperature=0, ignore_end=True)
    made = [completions[0] for completions in Engine(ours).generate(asked, greedy)]
    with torch.no_grad():
        new = theirs.generate(
            **inputs(asked, theirs.dtype), do_sample=False, max_new_tokens=_GREEDY, eos_token_id=None, pad_token_id=0
        )
    expected = new[:, asked[0].input_ids.shape[0] :].tolist()
    different = sum(a.tokens.tolist() != b for a, b in zip(made, expected, strict=True))
    if different:
        return f"{different} of {len(asked)} greedy completions are not those of transformers"
    samples = [
        Sample(
            torch.cat([sample.input_ids, one.tokens]),
            None,
            sample.images,
            (),
            torch.cat([(sample.input_ids == _IMAGE).long(), torch.zeros_like(one.tokens)]),
        )
        for sample, one in zip(asked, made, strict=True)
    ]
    batch = PackedBatch.from_samples(samples, image_token_id=_IMAGE, video_token_id=_VIDEO, merge_size=2)
    targets = torch.full((batch.tokens,), -100)
    for end, one in zip(batch.cu_seqlens[1:].tolist(), made, strict=True):
        targets[end - 1 - _GREEDY : end - 1] = one.tokens
    with torch.no_grad(), invariant():
        trained = linear_logprob(ours(batch).hidden_states, ours.lm_head.weight, targets).logprob[targets >= 0]
    apart = float((trained - torch.cat([one.logprobs for one in made])).abs().max())
    return f"log-probabilities differ from a packed forward's by up to {apart:.3g}" if apart else ""


def rollout(theirs: Any, asked: dict[str, Tensor], samples: int, tokens: int) -> Tensor:
    """Log-probabilities ``[rows, tokens]`` of what transformers samples."""
    with torch.no_grad():
        made = theirs.generate(
            **asked,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        found: Tensor = theirs.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    return found


def calls(case: RolloutCase, theirs: Any) -> dict[str, measure.Call]:
    """Ours, and the ways of asking transformers; each call takes new seeds, and the same prompts."""
    from m4ov.generate import Engine, SamplingOptions

    theirs = copy.deepcopy(theirs)
    for parameter in theirs.parameters():  # rotary frequencies stay float32
        parameter.data = parameter.data.to(case.dtype)
    asked = prompts(case.prompts)
    engine = Engine(ours_of(theirs))
    together = inputs(asked, case.dtype)
    apart = [inputs([sample], case.dtype) for sample in asked]

    def ours(index: int) -> Any:
        seed = index << 32
        return engine.generate(asked, SamplingOptions(case.tokens, samples=case.samples, seed=seed, ignore_end=True))

    made: dict[str, measure.Call] = {
        OURS: ours,
        BATCH: lambda _: rollout(theirs, together, case.samples, case.tokens),
        EACH: lambda _: [rollout(theirs, one, case.samples, case.tokens) for one in apart],
    }
    if case.alone:
        made[ONE] = lambda _: [rollout(theirs, one, 1, case.tokens) for one in apart for _ in range(case.samples)]
    return made


def _measured(session: Session, case: RolloutCase, theirs: Any) -> Row:
    effort = measure.Effort(12.0, 3.0, 3, 20) if session.quick else measure.Effort(40.0, 12.0, 5, 40)
    times = session.interleaved(calls(case, theirs), effort)
    ours = times.pop(OURS)
    peers = {f"generate, {name}": Peer(taken.seconds, taken.ratio_to(ours)) for name, taken in times.items()}
    made = case.prompts * case.samples * case.tokens
    return _row(
        session, str(case), "", **timing(ours), rate=made / ours.seconds, unit="tokens", tokens=made, peers=peers
    )


def _row(session: Session, case: str, problem: str, **measured: Any) -> Row:
    extension, _ = native_extension()
    return Row(
        family="generate",
        operator="Engine.generate",
        case=case,
        what="rollout with log-probabilities",
        implementation=f"native {extension.isa()}" if extension else "reference",
        machine=session.machine,
        green=not problem,
        errors={"greedy tokens, log-probabilities": float("inf") if problem else 0.0},
        problem=problem,
        **measured,
    )
