"""A training step of a whole model: Hugging Face's Qwen3-VL with 55 M parameters, patched against unpatched.

Hidden 512, 4 layers of 4 heads of 128 (2 for keys) as Qwen3-VL has them, MLP 1536, 32,000 words, a vision tower of 4
layers 256 wide, two 512×512 images, 1,024 tokens of which a quarter has a label, bf16, AdamW. Same weights, same batch,
the steps by turns, each allocator setting in a process of its own. In the full run ``torch.compile`` of Hugging Face's
model (``model.compile()``, with graph breaks where the model reads values) is a third.

Where the time goes (profile on two Zen 4 cores, allocator set up, a variant with 8 text heads of 64): unpatched: matrix
products 48%, attention 21%, the head's softmax 12%, zero fills 5%; patched, with PyTorch's attention: 52%, attention
33%, our passes 2%.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from m4ov_bench import cases, gate, measure
from m4ov_bench.row import Peer, Row
from m4ov_bench.session import OURS, Session
from m4ov_kernels import patch
from m4ov_kernels.dispatch import native_extension

HUGGING_FACE, COMPILED = "Hugging Face", "torch.compile"
CASE = cases.HeadCase(1024, 512, 32000, labelled=0.25)
_IMAGE, _VIDEO, _START, _END = 31990, 31991, 31992, 31993
_GRID = (1, 32, 32)  # patches of one 512×512 image; 256 tokens after merging
_SAMPLED = 2048  # elements of each parameter's gradient that the gate compares
_THRESHOLD, _EVERY_BLOCK_MAPPED = "4294967296", "65536"
_ALLOCATORS = {  # of glibc; what m4ov's own commands set up, and what a library user has
    "allocator set up": {"MALLOC_MMAP_THRESHOLD_": _THRESHOLD, "MALLOC_TRIM_THRESHOLD_": _THRESHOLD},
    "allocator as it comes": {},
}


def benchmark(session: Session) -> Iterator[Row]:
    """One row for each allocator setting: seconds of a patched step, and the unpatched steps as its peers."""
    if importlib.util.find_spec("transformers") is None:
        yield _row(session, "not measured", gate.Gate({}), note="transformers is not installed")
        return
    session.say("training step: gate")
    checked = check()
    if not checked.green:
        yield _row(session, "not measured", checked)
        return
    session.say("training step: memory")
    memory = _child("memory", {name: _EVERY_BLOCK_MAPPED for name in _ALLOCATORS["allocator set up"]})
    for what, variables in _ALLOCATORS.items():
        session.say(f"training step: {what}")
        measured = _child("quick" if session.quick else "full", variables)
        timing = {name: value for name, value in measured.pop(OURS).items() if name != "ratio"}
        peers = {
            name: Peer(absent=theirs)
            if isinstance(theirs, str)
            else Peer(theirs["seconds"], theirs["ratio"], memory.get(name))
            for name, theirs in measured.items()
        }
        yield _row(session, what, checked, **timing, memory_mib=memory[OURS], peers=peers)


def run() -> list[Row]:
    """The rows, measured now (two minutes), without a progress line."""
    from m4ov_bench import runner

    return runner.run(["step"])


def _row(session: Session, what: str, checked: gate.Gate, **measured: Any) -> Row:
    extension, _ = native_extension()
    return Row(
        family="step",
        operator="training step",
        case="Qwen3-VL 55 M, 1,024 tokens, 25% labelled, bf16",
        what=f"forward + backward + AdamW, {what}",
        implementation=f"native {extension.isa()}" if extension else "reference",
        machine=session.machine,
        green=checked.green,
        errors=dict(checked.errors),
        problem=checked.problem,
        **measured,
    )


def build() -> nn.Module:
    """Random weights, in bf16 and in training mode."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "vocab_size": CASE.vocabulary,
        "hidden_size": CASE.width,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_heads": 4,
        "out_hidden_size": CASE.width,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    tokens = {"image_token_id": _IMAGE, "video_token_id": _VIDEO}
    marks = {"vision_start_token_id": _START, "vision_end_token_id": _END}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **tokens, **marks, tie_word_embeddings=False)
    return Qwen3VLForConditionalGeneration(config).to(torch.bfloat16).train()


def batch() -> dict[str, Any]:
    """One row: two images between marks, then words; a quarter of all positions has a label, none of them an image."""
    image = [_START, *[_IMAGE] * (_GRID[1] * _GRID[2] // 4), _END]
    images = torch.tensor(image * 2)
    words = torch.randint(_IMAGE - 1, (CASE.rows - len(images),))
    input_ids = torch.cat([images, words])[None]
    labels = torch.full_like(input_ids, -100)
    labelled = len(images) + torch.randperm(len(words))[: round(CASE.rows * CASE.labelled)]
    labels[0, labelled] = input_ids[0, labelled]
    return {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == _IMAGE).int(),
        "pixel_values": torch.randn(2 * _GRID[1] * _GRID[2], 3 * 2 * 16 * 16).to(torch.bfloat16),
        "image_grid_thw": torch.tensor([_GRID, _GRID]),
        "labels": labels,
        "use_cache": False,
    }


def check() -> gate.Gate:
    return agreement(build(), batch())


def agreement(plain: nn.Module, data: dict[str, Any]) -> gate.Gate:
    """Patched against unpatched, by float64. Works on copies of ``plain``; leaves gradients in it."""
    patched = copy.deepcopy(plain)
    patch(patched)
    exact = copy.deepcopy(plain).double()
    doubled = {name: value.double() if _is_float(value) else value for name, value in data.items()}
    results = [(model(**inputs).loss, model) for model, inputs in ((patched, data), (plain, data), (exact, doubled))]
    return judged(*results)


Loss = tuple[Tensor, nn.Module]  # and the model that it is of


def judged(ours: Loss, plain: Loss, exact: Loss) -> gate.Gate:
    """The rule for a bf16 model; the three models' parameters have the same names. Of the losses, which it
    differentiates, and of a sample of every parameter's gradient, scaled to its largest value."""
    results = (ours, plain, exact)
    for loss, _ in results:
        loss.backward()
    # The loss is float32, but of bf16 hidden states: bf16's rounding is what the rule should allow for.
    our_loss, plain_loss, exact_loss = (loss.detach() for loss, _ in results)
    losses = gate.compare("loss", our_loss.bfloat16(), plain_loss.bfloat16(), exact_loss.double())
    parameters = [dict(model.named_parameters()) for _, model in results]
    samples: list[list[Tensor]] = [[], [], []]
    for name in parameters[2]:
        scale = parameters[2][name].grad.abs().max()
        index = torch.randint(parameters[2][name].numel(), (_SAMPLED,))
        for sample, owner in zip(samples, parameters, strict=True):
            sample.append(owner[name].grad.flatten()[index].double() / scale)
    together = [torch.cat(sample) for sample in samples]
    return losses + gate.compare("gradients", together[0].bfloat16(), together[1].bfloat16(), together[2])


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _child(mode: str, variables: dict[str, str]) -> dict[str, Any]:
    """Both steps in a new process, whose allocator has these variables and no others."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    arguments = [sys.executable, "-W", "ignore", "-m", "m4ov_bench.step", mode]
    child = subprocess.run(arguments, capture_output=True, text=True, env=environment | variables)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring the training step failed: {last}")
    return json.loads(child.stdout.strip().splitlines()[-1])


def _measure(mode: str) -> dict[str, Any]:
    """Times of the steps, or (``"memory"``) the MiB that each needs beyond weights and optimizer state."""
    data, plain = batch(), build()
    patched = copy.deepcopy(plain)
    patch(patched)
    calls = {OURS: _training(patched, data), HUGGING_FACE: _training(plain, data)}
    if mode == "memory":
        return {name: _peak_mib(call) for name, call in calls.items()}
    effort = measure.Effort(8.0, 4.0, 3, 5) if mode == "quick" else measure.Effort(21.0, 7.0, 7, 12)
    absent: dict[str, Any] = {}
    if mode == "quick":
        absent[COMPILED] = "left out of the short run"
    else:
        compiled = copy.deepcopy(plain)
        compiled.compile()
        calls[COMPILED] = _training(compiled, data)
        try:
            calls[COMPILED](0)
        except Exception as error:  # a peer that fails is a row that says so
            absent[COMPILED] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            del calls[COMPILED]
    times = measure.interleaved(calls, effort)
    return absent | {
        name: {
            "seconds": taken.seconds,
            "ratio": taken.ratio_to(times[OURS]),
            "faults": taken.faults,
            "disturbed": taken.disturbed,
        }
        for name, taken in times.items()
    }


def _training(model: nn.Module, data: dict[str, Any]) -> measure.Call:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(_: int) -> None:
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peak_mib(call: Callable[[int], object]) -> float | None:
    """MiB of a step beyond weights and optimizer state (gradients count); ``None`` where the system cannot tell."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    call(0)  # loads code, starts threads, makes the optimizer's state
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    before = _resident("VmRSS")
    call(0)
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
