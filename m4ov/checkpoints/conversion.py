"""A quantised checkpoint in another format, weight by weight: codes and scales stay what they are, or it is said
where not. All is read twice: once to learn what the format cannot hold and how large files become, once to write."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m4ov.checkpoints import fold
from m4ov.checkpoints.config import MODELOPT_FILE, copy_rest, edited, experts_of, leave_out
from m4ov.checkpoints.folder import Checkpoint, Weight, open_checkpoint
from m4ov.checkpoints.names import fused
from m4ov.checkpoints.values import dequantized, even_zeros
from m4ov.models.sharded import WeightsError, some, whole, write
from m4ov_kernels.gemm import weights as formats
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight
from m4ov_kernels.gemm.weights.fp8 import GRANULARITIES

PLAIN = "plain"
TARGETS = (*formats.FORMATS, PLAIN)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNFIT = ("refuse", "plain")
_WITH_INPUT_SCALE = "modelopt-w4a16-awq"  # the format that has a pre_quant_scale


@dataclass(frozen=True)
class Options:
    """Attributes:
    out: the folder to write.
    format: one of ``TARGETS``.
    dtype: of dequantised weights; ``None``: the configuration's, or bfloat16.
    scale_dtype: to which int4's scales are rounded; ``None``: they stay as they are.
    granularity: "channel" or "block" writes fp8's one scale of a tensor out for each; ``None``: as it is.
    unfit: "refuse", or "plain": a weight that the format cannot hold is dequantised, and with it what a server would
        join it with.
    shard_bytes: of a file, at most, unless one tensor is larger.
    """

    out: Path
    format: str
    dtype: torch.dtype | None = None
    scale_dtype: torch.dtype | None = None
    granularity: str | None = None
    unfit: str = "refuse"
    shard_bytes: int = 5 * 2**30


@dataclass
class Result:
    """What became of the weights.

    Attributes:
        exact: modules whose every value is what it was.
        rounded: what was rounded → the largest relative error of a value (of a scale, where the codes stayed).
        plain: module that was dequantised → why.
        notes: in words.
        nbytes: of the tensors that were written.
    """

    out: str
    format: str
    exact: list[str] = field(default_factory=list)
    rounded: dict[str, float] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0


@dataclass
class _Plan:
    folding: fold.Folding
    symmetric: bool
    dtype: torch.dtype
    plain: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def convert(checkpoint: Checkpoint, options: Options, advance: Callable[[int], object] = lambda done: None) -> Result:
    """Write ``options.out``, which appears whole or not at all.

    Args:
        advance: called with the bytes of the source that were gone through; twice all of them.

    Raises:
        WeightsError: a weight is damaged; the format cannot hold some (every one is named, before anything is written);
            the folder is there already or cannot be written, or the disk is too small.
    """
    _check(checkpoint, options)
    folds = options.format not in (_WITH_INPUT_SCALE, PLAIN)
    folding = fold.plan(checkpoint) if folds else fold.Folding()
    plan = _Plan(folding, even_zeros(checkpoint), _dtype(checkpoint, options))
    _survey(checkpoint, options, plan, advance)
    config = _configuration(checkpoint, options, plan)
    result = Result(str(options.out), options.format, plain=plan.plain)
    result.nbytes = sum(torch.Size(shape).numel() * plan.dtypes[key].itemsize for key, shape in plan.shapes.items())
    free = shutil.disk_usage(options.out.absolute().parent).free
    if free < result.nbytes:
        needs = f"it needs {result.nbytes / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free"
        raise WeightsError(f"{options.out}: cannot be written: {needs}")
    with whole(options.out) as temporary:
        copy_rest(checkpoint.folder, temporary)
        tensors = _tensors(checkpoint, options, plan, result, advance)
        write(temporary, plan.shapes, tensors, plan.dtypes, options.shard_bytes)
        for file, content in config.items():
            (temporary / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _hold(open_checkpoint(temporary), set(plan.configs))
    for name, off in plan.folding.rounding.items():
        result.rounded[name] = result.rounded.get(name, 0.0) + off
    if plan.folding.folded:
        what = f"the pre_quant_scale of {len(plan.folding.folded)} weights"
        result.notes.append(f"{what} is folded into {some(sorted(plan.folding.rounding))}; codes are as they were")
    return result


def _check(checkpoint: Checkpoint, options: Options) -> None:
    where = checkpoint.folder
    for name, value, known in (
        ("format", options.format, TARGETS),
        ("unfit", options.unfit, UNFIT),
        ("granularity", options.granularity, (None, *GRANULARITIES[1:])),
    ):
        if value not in known:
            raise WeightsError(f"{name}: expected one of {', '.join(map(str, known))}; got {value!r}")
    if options.out.exists():
        raise WeightsError(f"{options.out}: exists already; remove it, or choose another")
    if not options.out.absolute().parent.is_dir():
        raise WeightsError(f"{options.out}: {options.out.parent}: no such folder")
    if not checkpoint.config:
        raise WeightsError(f"{where}: there is no config.json to write for the new format")
    if not checkpoint.modules:
        raise WeightsError(f"{where}: nothing in it is quantised; `m4ov quantize` does that")
    inner = checkpoint.quantization.get("quantization")
    for part in (checkpoint.quantization, inner if isinstance(inner, dict) else {}):
        for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
            if part.get(key) and options.format != PLAIN:
                raise WeightsError(f"{where}: {key} is {part[key]!r}; scales of a KV cache are not converted")


def _dtype(checkpoint: Checkpoint, options: Options) -> torch.dtype:
    if options.dtype is not None:
        return options.dtype
    text = checkpoint.config.get("text_config")
    for part in (checkpoint.config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in DTYPES:
                return DTYPES[part[key]]
    return torch.bfloat16


def _survey(checkpoint: Checkpoint, options: Options, plan: _Plan, advance: Callable[[int], object]) -> None:
    """Go through all weights once: what fits, under which configuration, and as which tensors."""
    refused: dict[str, str] = {}
    made: dict[str, dict[str, Tensor]] = {}
    for module, tensors in checkpoint.modules.items():
        weight = plan.folding.weight(module, checkpoint.read(module))
        if options.format == PLAIN:
            plan.plain[module] = "asked for"
        try:
            if options.format != PLAIN:
                written, plan.configs[module] = formats.write(_as(weight, options, plan), options.format, module)
                made[module] = {key: torch.empty_like(value, device="meta") for key, value in written.items()}
        except ValueError as error:
            stuck = plan.folding.stuck.get(module)
            refused[module] = f"{error}" + (f" ({stuck})" if stuck else "")
        made.setdefault(module, {})
        plan.shapes[f"{module}.weight"] = tuple(weight.shape)
        advance(sum(tensor.nbytes for tensor in tensors.values()))
    shapes, plan.shapes = plan.shapes, {}
    if refused and options.unfit == "refuse":
        told = "; ".join(f"{module}: {reason}" for module, reason in list(refused.items())[:4])
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        hint = "; --unfit plain dequantises these"
        raise WeightsError(
            f"{checkpoint.folder}: {len(refused)} of {len(checkpoint.modules)} weights cannot be written as "
            f"{options.format}: {told}{more}{hint}"
        )
    plan.plain |= refused
    for names in fused(checkpoint.modules).values():
        unfit = [name for name in names if name in refused]
        if unfit:
            with_it = [name for name in names if name not in refused]
            plan.plain |= dict.fromkeys(with_it, f"{unfit[0]} is, and a server joins them")
    for module in plan.plain:
        plan.configs.pop(module, None)
    for key, tensor in checkpoint.tensors.items():
        module = key.rpartition(".")[0]
        if key in checkpoint.plain:
            plan.shapes[key], plan.dtypes[key] = tensor.shape, tensor.dtype
        elif module in plan.plain:
            plan.shapes[f"{module}.weight"], plan.dtypes[f"{module}.weight"] = shapes[f"{module}.weight"], plan.dtype
        else:
            for name, value in made[module].items():
                plan.shapes[name], plan.dtypes[name] = tuple(value.shape), value.dtype


def _as(weight: Weight, options: Options, plan: _Plan) -> Weight:
    """The weight in the form in which all of them are to be written."""
    if isinstance(weight, Int4Weight):
        if options.scale_dtype is not None:
            scales = weight.scales.to(options.scale_dtype)
            if bool(((scales == 0) & (weight.scales != 0)).any()):
                kind = str(options.scale_dtype).removeprefix("torch.")
                raise ValueError(f"scales that {kind} would round to 0")
            weight = replace(weight, scales=scales)
        return weight.without_zeros() if plan.symmetric else weight.with_zeros()
    if isinstance(weight, Fp8Weight) and options.granularity is not None:
        return weight.repeated(options.granularity)
    return weight


def _tensors(
    checkpoint: Checkpoint, options: Options, plan: _Plan, result: Result, advance: Callable[[int], object]
) -> Iterator[Tensor]:
    """Every tensor to write, in the order of ``plan.shapes``."""
    module, waiting = "", dict[str, Tensor]()
    for key in plan.shapes:
        if key in checkpoint.plain:
            stored = checkpoint.plain[key]
            yield plan.folding.tensor(key, stored.read())
            advance(2 * stored.nbytes)
            continue
        if key not in waiting:
            module = _module_of(key, checkpoint)
            waiting = _written(checkpoint, module, options, plan, result)
            advance(sum(tensor.nbytes for tensor in checkpoint.modules[module].values()))
        yield waiting.pop(key)


def _module_of(key: str, checkpoint: Checkpoint) -> str:
    module = key.rpartition(".")[0]
    assert module in checkpoint.modules, key
    return module


def _written(checkpoint: Checkpoint, module: str, options: Options, plan: _Plan, result: Result) -> dict[str, Tensor]:
    weight = plan.folding.weight(module, checkpoint.read(module))
    if module in plan.plain:
        values, off = dequantized(weight, plan.dtype)
        if not math.isfinite(off):
            kind = str(plan.dtype).removeprefix("torch.")
            raise WeightsError(f"{module}: dequantised it is past the end of {kind}; choose another --dtype")
        made = {f"{module}.weight": values}
    else:
        form = _as(weight, options, plan)
        made, _ = formats.write(form, options.format, module)
        off = _scales_off(weight, form) if isinstance(form, Int4Weight) else 0.0
    if off:
        result.rounded[module] = off
    elif module not in plan.folding.rows:
        result.exact.append(module)
    return made


def _scales_off(before: Weight, after: Weight) -> float:
    """The largest relative error of a scale; what is written has it too, widened or not."""
    exact, made = before.scales.double(), after.scales.double()
    return float(((made - exact).abs() / exact.abs().clamp_min(torch.finfo(torch.float64).tiny)).max())


def _configuration(checkpoint: Checkpoint, options: Options, plan: _Plan) -> dict[str, Any]:
    """File → what stands in it."""
    model = edited(checkpoint.config, plan.dtype if options.format == PLAIN else None)
    if not plan.configs:
        return {"config.json": model}
    merged = _merged(plan.configs, options.format)
    left = sorted({*checkpoint.left(), *plan.plain} - set(plan.configs))
    experts = experts_of({name: tensor.shape for name, tensor in checkpoint.plain.items()})
    merged = leave_out(merged, plan.configs, left, experts)
    if "quantization" not in merged:
        return {"config.json": model | {"quantization_config": merged}}
    inner = merged["quantization"]
    flat = {key: value for key, value in inner.items() if key not in ("exclude_modules", "group_size")}
    flat |= {"quant_method": "modelopt", "ignore": inner["exclude_modules"], "producer": merged["producer"]}
    return {"config.json": model | {"quantization_config": flat}, MODELOPT_FILE: merged}


def _merged(configs: dict[str, dict[str, Any]], format: str) -> dict[str, Any]:
    """One configuration of the modules' own."""
    kinds = Counter(json.dumps(config, sort_keys=True) for config in configs.values())
    (most, _), *others = kinds.most_common()
    config: dict[str, Any] = json.loads(most)
    if not others:
        return config
    if "config_groups" in config:  # compressed-tensors has a group for each
        for place, (other, _) in enumerate(others, 1):
            group = json.loads(other)["config_groups"]["group_0"]
            group["targets"] = [module for module, own in configs.items() if json.dumps(own, sort_keys=True) == other]
            config["config_groups"][f"group_{place}"] = group
        return config
    if format.startswith("gptq"):
        order = any(own["desc_act"] for own in configs.values())
        configs = {module: own | {"desc_act": order} for module, own in configs.items()}
    first_name, first = next(iter(configs.items()))
    for module, own in configs.items():
        if own != first:
            raise WeightsError(
                f"{format} has one configuration for all weights, and {first_name} asks for {first}, {module} for {own}"
            )
    return first


def _hold(written: Checkpoint, quantised: set[str]) -> None:
    """What was written against its own configuration, by headers."""
    if set(written.modules) != quantised:
        wrong = some(sorted(set(written.modules) ^ quantised))
        raise WeightsError(f"{wrong}: quantised in the files and not by plan, or the other way round")
    if not quantised:
        return
    rules = formats.exclusions(written.quantization)
    for name in written.modules:
        written.format_of(name)
    for name in written.left():
        if not any(excludes(name) for excludes in rules.values()):
            raise WeightsError(f"{name} is not quantised, and the written configuration does not leave it out")
