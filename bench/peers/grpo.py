"""The peer of a step of GRPO: TRL's GRPOTrainer, set up as one who knows it would on a CPU.

What costs it nothing is given: prompts are tokenised and their images made into patches beforehand, and a processor
only looks them up (transformers' own needs torchvision). No reference model (``beta`` 0), fused AdamW, one update for
each rollout, so that the old log-probabilities are those of the loss itself; nothing is saved or reported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m4ov_bench.peers.base import Absent
from m4ov_kernels.packing import Sample

TRL, CHECKPOINTED = "TRL's GRPOTrainer", "TRL's GRPOTrainer, gradient checkpointing"
AUTOCAST, AUTOCAST_CHECKPOINTED = f"{TRL}, bf16 autocast", f"{TRL}, bf16 autocast, gradient checkpointing"
PURE = f"{TRL}, bf16 weights"  # and AdamW in bf16: less work, and updates that round away


def names(dtype: torch.dtype) -> tuple[str, ...]:
    """The ways of running it where the model computes in this dtype; checkpointing is its default, for less memory."""
    return (TRL, CHECKPOINTED) if dtype == torch.float32 else (AUTOCAST, AUTOCAST_CHECKPOINTED, PURE)


def absent() -> Absent | None:
    """Why it cannot run here; ``None``: it can."""
    missing = [package for package in ("accelerate", "datasets", "trl") if importlib.util.find_spec(package) is None]
    return Absent(f"{missing[-1]} is not installed: pip install 'm4ov[trl]'") if missing else None


def prepared(tokenizer: Any, samples: Sequence[Sample], image_token_id: int) -> Any:
    """A processor of conversations that name a sample by its place, as their image; all samples of one length."""
    from transformers import ProcessorMixin

    class Prepared(ProcessorMixin):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tokenizer, self.chat_template = tokenizer, None

        def __call__(self, images: Any = None, **_: Any) -> dict[str, Any]:
            return self._found([place for (place,) in images])

        def apply_chat_template(self, conversation: Any, tokenize: bool = False, **_: Any) -> Any:
            if not tokenize:
                return ""
            found = self._found([_place(messages) for messages in conversation])
            return {**found, "input_ids": found["input_ids"].tolist()}

        def _found(self, places: Sequence[int]) -> dict[str, Tensor]:
            chosen = [samples[place] for place in places]
            ids = torch.stack([sample.input_ids for sample in chosen])
            return {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == image_token_id).long(),
                "pixel_values": torch.cat([sample.images[0].pixel_values for sample in chosen]),
                "image_grid_thw": torch.tensor([sample.images[0].grid_thw for sample in chosen]),
            }

    return Prepared()


def _place(messages: Sequence[Mapping[str, Any]]) -> int:
    return next(part["image"] for part in messages[-1]["content"] if part["type"] == "image")


def trainer(
    name: str,
    model: Any,
    processor: Any,
    reward: Callable[..., list[float]],
    *,
    prompts: int,
    samples: int,
    tokens: int,
    micro: int,
    steps: int,
    before_update: Callable[[Mapping[str, Any]], None],
    callback: Any,
    options: Mapping[str, Any],
) -> Any:
    """One that is ready for ``train()``: every step has all ``prompts``, with ``samples`` answers of exactly ``tokens``
    tokens each, and goes through the model ``micro`` answers at a time.

    Args:
        name: of :func:`names`.
        steps: how many have prompts.
        before_update: called with the inputs of each forward of an update, when all answers are there.
        options: of ``GRPOConfig``: ``output_dir``, learning rate, …
    """
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    class Watched(GRPOTrainer):  # type: ignore[misc]
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            found = super()._prepare_inputs(generation_batch)
            before_update(found)
            return found

    settings: dict[str, Any] = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": prompts * samples // micro,
        "num_generations": samples,
        "max_completion_length": tokens,
        "generation_kwargs": {"min_new_tokens": tokens},
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "grpo",
        "scale_rewards": "group",
        "bf16": "autocast" in name,
        "gradient_checkpointing": "checkpointing" in name,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "logging_steps": 10,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": steps,
        **options,
    }
    rows = [
        {"prompt": [{"role": "user", "content": "?"}], "image": place} for _ in range(steps) for place in range(prompts)
    ]
    made: Any = Watched(
        model,
        reward,
        GRPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[callback],
    )
    made.remove_callback(PrinterCallback)
    return made
