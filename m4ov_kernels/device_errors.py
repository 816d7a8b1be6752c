"""Errors that only the device sees, found without a host synchronisation and reported when the host looks.

A GPU kernel that meets a bad value (a target outside the vocabulary) writes NaN for its row and lowers one 64-bit slot
of its device's flag tensor to the first bad position. :func:`check` reads the flags and raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What a slot of the flag tensor reports: the operator, the argument, and what is wrong with element `position` of it.
# Those of one operator stand together.
SLOTS = (
    ("linear_cross_entropy", "target", "is neither ignore_index nor in [0, vocabulary size)"),
    ("linear_logprob", "targets", "is neither ignore_index nor in [0, vocabulary size)"),
    ("mrope_positions", "cu_seqlens", "is not 0 at the start, below the bound before it, or not T at the end"),
    ("mrope_positions", "mm_token_type_ids", "is not 0 (text), 1 (image) or 2 (video)"),
    ("mrope_positions", "image_grid_thw", "is not from 1 to 2^20, height and width multiples of merge_size"),
    ("mrope_positions", "video_grid_thw", "is not from 1 to 2^20, height and width multiples of merge_size"),
    ("mrope_positions", "image_grid_thw: sample", "has other image tokens than the grids say"),
    ("mrope_positions", "video_grid_thw: sample", "has other video tokens than the grids say"),
    ("mrope_positions", "second_per_grid_ts", "is not a finite number from 0, or too large"),
    ("scatter_vision", "positions", "is not in [0, rows), or is there twice"),
    ("deepstack_add", "positions", "is not in [0, rows), or is there twice"),
    (
        "interpolate_position_embeddings",
        "grid_thw",
        "is not positive, or not a multiple of merge_size, or the grids do not have as many patches as there are",
    ),
    ("permute", "experts", "is not in [0, num_experts)"),
    ("unpermute", "order", "is no row, or is there twice"),
    ("grouped_linear", "offsets", "is not 0 at the start, below the offset before it, or not S at the end"),
    ("head.losses", "cu_seqlens or groups", "is not 0 at the start, below the bound before it, or not T at the end"),
    ("vision_rope", "grid_thw", "is not positive, is no multiple of merge_size, or ends beside the number of patches"),
)
_NO_ERROR = torch.iinfo(torch.int64).max
_flags: dict[torch.device, Tensor] = {}


def flag(device: torch.device, operator: str) -> Tensor:
    """The slots of ``operator``, int64, in the order of ``SLOTS`` and two elements apart (mostly there is one), which
    its kernels lower with an atomic minimum to a bad position."""
    if device not in _flags:
        # A slot every 16 bytes: Triton compiles a kernel for each alignment of its pointers.
        _flags[device] = torch.full((len(SLOTS), 2), _NO_ERROR, dtype=torch.int64, device=device)
    places = [i for i, slot in enumerate(SLOTS) if slot[0] == operator]
    return _flags[device][places[0] : places[-1] + 1].view(-1)[:-1]


def check() -> None:
    """Raise the first error that a kernel recorded on any device since the last call, and clear it.

    Reads one small tensor per device, so it waits for the work queued there: call it where metrics are read anyway.

    Raises:
        ValueError: naming operator, argument and the first offending position.
    """
    for device, slots in _flags.items():
        for (operator, argument, problem), position in zip(SLOTS, slots[:, 0].tolist(), strict=True):
            if position != _NO_ERROR:
                slots.fill_(_NO_ERROR)
                raise ValueError(f"{operator}: {argument}[{position}] {problem} (found on {device})")
