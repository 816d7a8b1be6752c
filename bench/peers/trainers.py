"""Peers of a step of SFT: transformers' Trainer and TRL's SFTTrainer, set up as one who knows them would on a CPU.

What costs them nothing is given: samples are tokenised and made into patches beforehand, and one worker pads them ahead
of the step. AdamW is the fused one; gradients are not checkpointed; every tenth step is logged, to nowhere; nothing is
saved.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from m4ov_bench.peers.base import Absent
from m4ov_kernels.packing import PackedBatch

TRAINER = "Trainer, bf16 autocast"  # float32 weights, as ours keeps beside those that it computes with
PURE = "Trainer, bf16 weights"  # and AdamW in bf16: less work, and updates that round away
TRL = "TRL's SFTTrainer, bf16 autocast"
NAMES = (TRAINER, PURE, TRL)
_NEEDS = {TRAINER: ("accelerate",), PURE: ("accelerate",), TRL: ("accelerate", "datasets", "trl")}


def absent(name: str) -> Absent | None:
    """Why a peer cannot run here; ``None``: it can."""
    missing = [package for package in _NEEDS[name] if importlib.util.find_spec(package) is None]
    return Absent(f"{missing[-1]} is not installed") if missing else None


def weights_dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name == PURE else torch.float32


def samples_of(batch: PackedBatch) -> list[dict[str, Tensor]]:
    """The samples of a packed batch as Hugging Face's model takes them, each with its images."""
    found = []
    for index in range(len(batch)):
        one = batch[index]
        sample = {name: getattr(one, name) for name in ("input_ids", "labels", "mm_token_type_ids")}
        if one.images is not None:
            sample |= {"pixel_values": one.images.pixel_values, "image_grid_thw": one.images.grid_thw}
        found.append(sample)
    return found


@dataclass(frozen=True)
class Padded:
    """A collator: samples side by side, padded on the right to the longest; their images one after the other. It takes
    their places in ``samples``."""

    samples: Sequence[Mapping[str, Tensor]]
    pad_token: int

    def __call__(self, places: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        chosen = [self.samples[item["place"]] for item in places]

        def padded(tensors: list[Tensor], value: int) -> Tensor:
            return pad_sequence(tensors, batch_first=True, padding_value=value)

        values = {"input_ids": self.pad_token, "labels": -100, "mm_token_type_ids": 0}
        made = {name: padded([sample[name] for sample in chosen], value) for name, value in values.items()}
        made["attention_mask"] = padded([torch.ones_like(sample["input_ids"]) for sample in chosen], 0)
        for name in ("pixel_values", "image_grid_thw"):
            made[name] = torch.cat([sample[name] for sample in chosen if name in sample])
        return made


def trainer(
    name: str,
    model: Any,
    samples: Sequence[Mapping[str, Tensor]],
    per_step: int,
    *,
    tokenizer: Any,
    callback: Any,
    options: Mapping[str, Any],
) -> Any:
    """One that is ready for ``train()``: takes the samples in their order, ``per_step`` at a time.

    Args:
        name: of ``NAMES``.
        tokenizer: a transformers tokenizer with a pad token.
        options: of ``TrainingArguments``: ``output_dir``, learning rate, …
    """
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    settings: dict[str, Any] = {
        "per_device_train_batch_size": per_step,
        "bf16": name != PURE,
        "use_cpu": True,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 1,
        "remove_unused_columns": False,
        "logging_first_step": True,
        "logging_steps": 10,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    places = [{"place": place} for place in range(len(samples))]
    given: dict[str, Any] = {"data_collator": Padded(samples, tokenizer.pad_token_id), "callbacks": [callback]}
    if name == TRL:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        # TRL's own collator takes texts and images and would run a processor in every step.
        prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        given |= {"train_dataset": Dataset.from_list(places), "processing_class": tokenizer}
        made: Any = SFTTrainer(model, SFTConfig(**settings, **prepared), **given)
    else:
        made = Trainer(model, TrainingArguments(**settings), train_dataset=places, **given)
    made.remove_callback(PrinterCallback)
    return made
