"""AWQ's scales by nvidia-modelopt instead of our own search: its calibration, our folding, our file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m4ov.quantize.calibration import Batch, run
from m4ov.quantize.linears import Group


def available() -> str | None:
    """Why ModelOpt cannot calibrate here; ``None`` if it can. Imports it."""
    try:
        import modelopt.torch.quantization  # noqa: F401
    except ImportError as error:
        missing = error.name or "nvidia-modelopt"
        return f"{missing} is not installed; pip install nvidia-modelopt requests (or --calibrator own)"
    return None


@torch.no_grad()
def scales(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    group_size: Callable[[str], int],
    *,
    advance: Callable[[], object] = lambda: None,
) -> dict[Group, Tensor]:
    """The scale of each feature of each group's fold, as ModelOpt's ``awq_lite`` finds them for four-bit weights.

    ModelOpt searches a scale for each linear. Linears that share an input get the mean of theirs, as its own export
    does; features that share a scale (:class:`Fold`) likewise. Groups without a fold are left out. The model is not
    changed: ModelOpt works on a copy.

    Args:
        group_size: of a linear, by its name.

    Raises:
        RuntimeError: ModelOpt is not installed, or gave a linear no scale.
    """
    reason = available()
    if reason is not None:
        raise RuntimeError(f"--calibrator modelopt: {reason}")
    import modelopt.torch.quantization as mtq

    wanted = {name: group for group in groups if group.fold is not None for name in group.names}
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    rules += [
        {
            "quantizer_name": f"*{name}.weight_quantizer",
            "cfg": {"num_bits": 4, "block_sizes": {-1: group_size(name), "type": "static"}},
            "enable": True,
        }
        for name in wanted
    ]
    config = {"quant_cfg": rules, "algorithm": {"method": "awq_lite", "alpha_step": 0.05}}

    def calibrate(copied: nn.Module) -> None:
        for batch in batches:
            run(copied, batch)
            advance()

    copied = mtq.quantize(copy.deepcopy(model), config, forward_loop=calibrate)
    found: dict[Group, Tensor] = {}
    for group in dict.fromkeys(wanted.values()):
        quantizers: list[Any] = [copied.get_submodule(name).input_quantizer for name in group.names]
        own: list[Any] = [getattr(quantizer, "_pre_quant_scale", None) for quantizer in quantizers]
        if any(scale is None for scale in own):
            raise RuntimeError(f"--calibrator modelopt: ModelOpt gave {group.names[0]} no scale; was it reached?")
        assert group.fold is not None
        index = group.fold.index
        mean = torch.stack([scale.float().flatten() for scale in own]).mean(0)  # multiplies the input: 1/s
        shared = torch.zeros(group.fold.features).index_add_(0, index, mean)
        found[group] = torch.bincount(index, minlength=group.fold.features) / shared
    return found
