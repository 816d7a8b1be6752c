"""The values of a target tensor, as far as the host can see them."""

from __future__ import annotations

import torch
from torch import Tensor

# What each operator calls its targets.
ARGUMENTS = {"linear_logprob": "targets", "linear_cross_entropy": "target"}


def check_target_values(operator: str, argument: str, target: Tensor, vocab_size: int, ignore_index: int) -> bool:
    """Refuse CPU targets outside the vocabulary, naming the first position. Returns whether any may be ignored.

    Raises:
        ValueError: an element of ``target`` (int64 ``[T]``, on the CPU) is neither ``ignore_index`` nor in
            ``[0, vocab_size)``.
    """
    if target.numel() == 0:
        return False
    low, high = (int(bound) for bound in torch.aminmax(target))
    if low >= 0 and high < vocab_size:
        return low <= ignore_index <= high
    bad = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bool(bad.any()):
        position = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{operator}: {argument}[{position}] is {int(target[position])}: expected ignore_index "
            f"({ignore_index}) or 0 ≤ target < {vocab_size}"
        )
    return True
