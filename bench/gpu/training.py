"""Stage: a training step of a Qwen3-VL of 2B's shape, patched against unpatched (and Liger's patch, if it is there):
loss and gradients against float64, host synchronisations, time, tokens per second, peak memory."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import warnings
from typing import Any

import torch
from torch import nn

from m4ov_bench import step
from m4ov_bench.gpu import device as chip
from m4ov_bench.gpu import qwen3_vl
from m4ov_bench.gpu.context import Context
from m4ov_bench.gpu.part import Part
from m4ov_bench.measure import Sample, Times
from m4ov_bench.session import OURS
from m4ov_kernels import check, patch, unpatch

HUGGING_FACE, LIGER = step.HUGGING_FACE, "Liger"
_SYNCHRONISED = "called a synchronizing CUDA operation"
_ADAMW_BYTES = 8 * 2  # per parameter in bf16: weight, gradient, two moments, and as much again for activations


def run(context: Context) -> None:
    part, device = context.part, context.device
    size = qwen3_vl.TINY if context.tiny else qwen3_vl.QWEN3_VL_2B
    if not _agrees(part, size, device):
        return
    gc.collect()
    model: Any = qwen3_vl.build(size, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    part.facts(model=size.title, parameters=parameters, tokens=size.tokens, samples=size.samples)
    data = {**qwen3_vl.batch(model, size, device), "use_cache": False}
    optimizer = _optimizer(model, device)
    part.facts(optimizer=type(optimizer).__name__)
    with part.check("losses of a step", model=size.title) as found:
        found |= _losses(model, data)
    with part.check("training step measured", model=size.title):
        _measure(part, context, size, model, data, optimizer)
    with part.check("a step without host synchronisation", model=size.title):
        _no_host_synchronisation(model, data, device)
    with part.check("host synchronisations of a step counted", model=size.title) as found:
        found |= _synchronisations(model, data, device)
    _measure_liger(part, context, size, model, data, optimizer)


def _agrees(part: Part, size: qwen3_vl.Size, device: torch.device) -> bool:
    """The gate before any speed."""
    with part.check("loss and gradients against float64", model=size.title) as found:
        plain = qwen3_vl.build(size, device)
        few = {**qwen3_vl.batch(plain, size, device, samples=1), "use_cache": False}
        gate = step.agreement(plain, few)
        check()
        found["error"] = round(max(gate.errors.values()), 4)
        if not gate.green:
            raise AssertionError(gate.problem)
        return True
    return False


def _optimizer(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; SGD where the device has too little memory for its moments."""
    needed = sum(parameter.numel() for parameter in model.parameters()) * _ADAMW_BYTES
    if chip.memory_bytes(device) < needed:
        return torch.optim.SGD(model.parameters(), lr=1e-6)
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def _losses(model: Any, data: dict[str, Any]) -> dict[str, float]:
    """Of the same weights and batch; whether the difference is right is the float64 check's business."""
    unpatched = float(model(**data).loss.detach())
    patch(model)
    patched = float(model(**data).loss.detach())
    unpatch(model)
    check()
    if not abs(patched) < float("inf"):
        raise AssertionError(f"the patched loss is {patched}")
    return {"loss unpatched": unpatched, "loss patched": patched, "difference": patched - unpatched}


def _step(model: Any, data: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    model(**data).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _measure(
    part: Part, context: Context, size: qwen3_vl.Size, model: Any, data: dict[str, Any], optimizer: Any
) -> None:
    """One model, patched and unpatched by turns, so that both see the same weights and the same machine."""
    device, memory = context.device, {}
    samples: dict[str, list[Sample | None]] = {OURS: [], HUGGING_FACE: []}

    def call() -> None:
        _step(model, data, optimizer)

    for index in range(_rounds(context)):
        for name, change in ((OURS, patch), (HUGGING_FACE, unpatch)):
            change(model)
            if index == 0:
                call()  # compiles, chooses algorithms, makes the optimizer's state
                memory[name] = chip.peak_mib(device, call)
            samples[name].append(Sample(chip.seconds_of(device, call), 0, False))
    times = {name: Times(tuple(taken)) for name, taken in samples.items()}
    for name, taken in times.items():
        figures = {"seconds": taken.seconds, "tokens_per_second": size.tokens / taken.seconds}
        ratio = taken.ratio_to(times[OURS])
        part.row(**_row(size, name, green=True, **figures, peak_mib=memory[name], ratio=ratio))


def _rounds(context: Context) -> int:
    return 2 if context.tiny else 10


def _measure_liger(
    part: Part, context: Context, size: qwen3_vl.Size, model: Any, data: dict[str, Any], optimizer: Any
) -> None:
    """Last: Liger's patch cannot be taken off, and changes transformers' classes for every model to come. If it is not
    there or fails, the row says so."""
    if importlib.util.find_spec("liger_kernel") is None:
        part.row(**_row(size, LIGER, green=True, absent="liger_kernel is not installed"))
        return

    def call() -> None:
        _step(model, data, optimizer)

    try:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_vl

        apply_liger_kernel_to_qwen3_vl(model=model, swiglu=True)
        call()
        memory = chip.peak_mib(context.device, call)
        seconds = statistics.median(chip.seconds_of(context.device, call) for _ in range(_rounds(context)))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        part.row(**_row(size, LIGER, green=True, absent=f"fails: {type(error).__name__}: {reason}"))
        return
    rate = size.tokens / seconds
    part.row(**_row(size, LIGER, green=True, seconds=seconds, tokens_per_second=rate, peak_mib=memory))


def _row(size: qwen3_vl.Size, who: str, **figures: Any) -> dict[str, Any]:
    case = f"{size.title}, {size.tokens} tokens in {size.samples} samples with an image each, 25% labelled, bf16"
    return {"family": "step", "operator": "training step", "case": case, "what": who, **figures}


def _no_host_synchronisation(model: Any, data: dict[str, Any], device: torch.device) -> None:
    """A whole patched step, forward and backward, packed; the host knows what it packed: bounds, grids, labels."""
    patch(model)
    try:
        starts = (data["position_ids"][0, 0] == 0).nonzero().flatten().cpu()
        length = data["input_ids"].shape[1]
        known = {
            "cu_seq_lens_q": torch.cat([starts, torch.tensor([length])]).to(torch.int32),
            "max_length_q": int(torch.cat([starts, torch.tensor([length])]).diff().max()),
            "position_ids": data["position_ids"][1:],
            "image_grid_thw": data["image_grid_thw"].cpu(),
            "num_valid": int((data["labels"][:, 1:] != -100).sum()),
        }

        def once() -> None:
            model(**{**data, **known}).loss.backward()

        once()
        with chip.host_synchronisation_raises(device):
            once()
        model.zero_grad()
        check()
        chip.require(device)
    finally:
        unpatch(model)


def _synchronisations(model: Any, data: dict[str, Any], device: torch.device) -> dict[str, int]:
    """How often the host waits in forward and backward of a whole step: a figure, not a rule."""
    counts = {}
    for name, change in (("patched", patch), ("unpatched", unpatch)):
        change(model)
        model(**data).loss.backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with chip.host_synchronisation_warns(device):
                model(**data).loss.backward()
        counts[name] = sum(_SYNCHRONISED in str(warning.message) for warning in caught)
        model.zero_grad()
    unpatch(model)
    chip.require(device)
    return counts
