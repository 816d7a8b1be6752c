"""``sampler``: who draws the answers of a run, as its configuration says."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m4ov.generate import Engine, SamplingOptions
from m4ov.generate.weights import check
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.rl.rollouts import Sampler
from m4ov.rl.trainer import EngineSampler
from m4ov.rl_recipe import RolloutConfig
from m4ov_kernels.gemm.invariant import unavailable


@contextmanager
def sampler(
    model: Qwen3VL,
    tokenizer: Any,
    rollout: RolloutConfig,
    *,
    end_token_ids: Iterable[int] | None = None,
    task_folder: Path,
) -> Iterator[Sampler]:
    """A sampler for ``with``, which draws with the weights as they are when it is asked; closed at the end.

    With ``rollout.engines`` 0 it is the embedded engine, on the model's own parameters; above that, so many engines in
    processes of their own, whose answers have the same bits where numerics are shared. They are where the compiled
    kernels can keep them (:func:`m4ov_kernels.gemm.invariant.unavailable` says where not), else PyTorch's matrix
    products are used; ``rollout.shared`` needs them.

    Args:
        model: that is trained, whole on one device.
        tokenizer: with ``decode(list of ids) → str``; where engines have processes of their own, one that can be
            pickled.
        end_token_ids: that end an answer; ``None``: those of the model's configuration.
        task_folder: of the run; where engines are in other processes (on a cluster: on a file system that all machines
            see), weights are handed over in a folder in it, which is removed at the end.

    Raises:
        TypeError, ValueError, RuntimeError: the engine cannot be made of these; see :class:`m4ov.generate.Engine`.
    """
    parameter = model.lm_head.weight
    reason = unavailable(parameter.device.type, parameter.dtype)
    settings: dict[str, Any] = {
        "end_token_ids": None if end_token_ids is None else tuple(end_token_ids),
        "numerics": "shared" if rollout.shared or reason is None else "fast",
        "weights": rollout.weights,
        "max_running": max(256, rollout.samples),
    }
    options = SamplingOptions(rollout.max_tokens, rollout.temperature, samples=rollout.samples)
    if not rollout.engines:
        yield EngineSampler(Engine(model, tokenizer=tokenizer, **settings), options)
        return
    from m4ov.rl.engines import engines

    check(model, settings["numerics"], rollout.weights)  # here, not in every process
    made, folder = engines(
        model, tokenizer, options, settings, count=rollout.engines, kind=rollout.engine_kind, folder=task_folder
    )
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)
