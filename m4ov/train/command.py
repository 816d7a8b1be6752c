"""How a command that trains begins and ends: its ranks, who of them talks, its threads."""

from __future__ import annotations

import os

import torch
from rich.console import Console

from m4ov.cores import usable_cores
from m4ov.recipe import TrainConfig
from m4ov.train.metrics import check
from m4ov.train.world import World


def begin(train: TrainConfig, threads: int) -> tuple[World, Console]:
    """Join the ranks that torchrun started. What needs no ranks should have been checked before.

    Args:
        threads: see :func:`set_up`.

    Returns:
        The ranks, and a console that talks on rank 0 alone.

    Raises:
        MetricsError: ``train.wandb`` names a project and its package is not there; before the ranks join.
        RankError: not all ranks came in time.
    """
    check(train.wandb)
    world = World.start(train.timeout_seconds)
    set_up(threads)
    return world, Console(quiet=not world.first)


def end(world: World) -> None:
    """Leave the other ranks. torchrun gives each rank one thread; the others' cores are free now, and rank 0 goes on
    with all of them."""
    world.close()
    if world.first:
        torch.set_num_threads(torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def set_up(threads: int) -> None:
    """PyTorch computes on so many threads, and transformers says nothing but errors.

    Args:
        threads: 0: PyTorch's own number, of physical cores, or as many as the process may run on if they are fewer.
    """
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads or min(usable_cores(), torch.get_num_threads()))
