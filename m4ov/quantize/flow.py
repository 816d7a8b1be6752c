"""From a checkpoint to a quantised one: find, calibrate, scale, pack, judge, keep, write."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from m4ov.models.qwen3_vl import cast_parameters
from m4ov.quantize import awq, checkpoint, modelopt, sensitivity
from m4ov.quantize.calibration import Inputs, collect
from m4ov.quantize.data import Calibration
from m4ov.quantize.linears import Group, linear
from m4ov.quantize.plan import Layer, Options, Plan
from m4ov.quantize.progress import Stages
from m4ov.quantize.schemes import SCHEMES
from m4ov.quantize.sensitivity import Keep
from m4ov_kernels.patches import SUPPORTED, patch

METHODS = ("rtn", "awq")
CALIBRATORS = ("own", "modelopt")
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Result:
    """What was done: each linear, the loss on the calibration batches before (``None``: no data), notes in words."""

    layers: tuple[Layer, ...]
    loss: float | None
    notes: tuple[str, ...]


def model_class(folder: Path) -> Any:
    """transformers' class of a checkpoint.

    Raises:
        ValueError: it is none of those that are supported here.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ValueError(f"{folder}: MODEL is quantised already; give the checkpoint it was made from")
    name = (config.get("architectures") or ["nothing"])[0]
    if name not in SUPPORTED:
        raise ValueError(f"{folder}: MODEL: expected one of {', '.join(SUPPORTED)}; its config.json names {name}")
    return getattr(transformers, name)


def load_source(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The unquantised model in eval mode, patched."""
    model = model_class(folder).from_pretrained(folder, dtype=dtype).eval()
    patch(model)
    return model


def half_dtype(folder: Path) -> torch.dtype:
    """Of what is not quantised: the checkpoint's, or bfloat16 where that is wider than 16 bits."""
    dtype = transformers.AutoConfig.from_pretrained(folder).dtype
    return dtype if dtype in _HALF else torch.bfloat16


@torch.no_grad()
def quantize(options: Options, calibration: Calibration | None, stages: Stages) -> Result:
    """Write ``options.out``.

    Raises:
        ValueError: the model, the data or a choice does not fit; the message names the argument.
        FileExistsError: ``options.out`` is there.
    """
    scheme, dtype = SCHEMES[options.scheme], half_dtype(options.model)
    # Scales are folded in float32, so that only what is written is rounded.
    model = load_source(options.model, torch.float32 if options.method == "awq" else "auto")
    plan = Plan(model, options, scheme)
    if "lm_head" in options.parts and model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        plan.notes.append("lm_head was tied to the embeddings: untied, they keep 16 bits and it is quantised")
    elif model.lm_head.weight is model.get_input_embeddings().weight:
        plan.notes.append("lm_head is tied to the embeddings and stays in 16 bits with them (--lm-head unties it)")
    inputs: dict[Group, Inputs] = {}
    if calibration is not None:
        batches = calibration.batches(model.dtype)
        advance = stages.stage("calibrating", len(batches))
        inputs = collect(model, plan.groups, batches, advance=advance)
        if options.method == "awq":
            _scale(model, plan, inputs, batches, options, dtype, stages)
    _pack(model, plan, inputs, options, dtype, stages)
    cast_parameters(model, dtype)
    gc.collect()
    loss = None
    if calibration is not None:
        loss = _judge(model, plan, inputs, calibration, options.keep, dtype, stages)
    quantized = {name: weight for name, weight in plan.weights.items() if name not in plan.kept}
    if not quantized:
        raise ValueError("--keep: nothing would be quantised; keep less")
    for part in sorted(options.parts):
        if not any(plan.part[name] == part for name in quantized):
            plan.notes.append(f"the {part} part was asked for, and all of it is kept in 16 bits (--keep)")
    done = stages.stage("writing", 1)
    checkpoint.write(model, quantized, scheme, options.model, options.out, dtype)
    done()
    return Result(tuple(plan.layers(scheme)), loss, tuple(plan.notes))


def _scale(
    model: nn.Module,
    plan: Plan,
    inputs: dict[Group, Inputs],
    batches: list[Any],
    options: Options,
    dtype: torch.dtype,
    stages: Stages,
) -> None:
    """Find AWQ's scales, fold them, and let the sampled inputs say what comes now."""
    foldable = [group for group in plan.groups if group.fold is not None]
    found: dict[Group, Tensor | None] = {}
    if options.calibrator == "modelopt":
        advance = stages.stage("scales by ModelOpt", 2 * len(batches))  # it caches, then searches
        found |= modelopt.scales(model, foldable, batches, plan.size.__getitem__, advance=advance)
    else:
        advance = stages.stage("searching scales", len(foldable))
        for group in foldable:
            assert group.fold is not None
            weights = [linear(model, name).weight for name in group.names]
            size = plan.size[group.names[0]]
            found[group] = awq.search(weights, inputs[group], group.fold, SCHEMES[options.scheme], size, dtype)
            advance()
    for group, scale in found.items():
        if scale is None or group.fold is None:
            continue
        awq.apply(model, group, scale)
        plan.scaled |= set(group.names)
        columns, at = scale[group.fold.index], inputs[group]
        inputs[group] = Inputs(at.rows / columns.to(at.rows.dtype), at.mean / columns, at.count)


def _pack(
    model: nn.Module,
    plan: Plan,
    inputs: dict[Group, Inputs],
    options: Options,
    dtype: torch.dtype,
    stages: Stages,
) -> None:
    scheme = SCHEMES[options.scheme]
    advance = stages.stage("packing", len(plan.size))
    for group in plan.groups:
        for name in group.names:
            size, exact = plan.size[name], linear(model, name).weight.detach().float()
            weight = exact
            if options.method == "awq":
                weight = awq.clip(name, exact, inputs[group], scheme, size, dtype)
            plan.weights[name] = packed = scheme.pack(weight, size, dtype)
            off = packed.dequantize(torch.float32) - exact
            plan.weight_error[name] = float(off.norm() / exact.norm().clamp_min(1e-30))
            advance()


def _judge(
    model: nn.Module,
    plan: Plan,
    inputs: dict[Group, Inputs],
    calibration: Calibration,
    keep: Keep,
    dtype: torch.dtype,
    stages: Stages,
) -> float:
    """Measure every linear alone and settle what stays in 16 bits; the loss before."""
    batches = calibration.batches(dtype)
    rows = {name: inputs[group].rows.to(dtype) for group in plan.groups for name in group.names}

    def maker(name: str) -> Callable[[], nn.Module]:
        return lambda: checkpoint.module_of(plan.weights[name], linear(model, name))

    advance = stages.stage("sensitivity, each alone", len(rows))
    loss, plan.found = sensitivity.measure(model, {n: maker(n) for n in rows}, rows, batches, advance=advance)
    sizes = {name: shape[0] * shape[1] for name, shape in plan.shapes.items()}
    for group, reason in sensitivity.choose(plan.groups, sizes, plan.found, loss, keep).items():
        plan.kept |= dict.fromkeys(group.names, reason)
    return loss
