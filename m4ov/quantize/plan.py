"""What is asked for, which linears that means, and what became of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from m4ov.checkpoints.names import PARTS
from m4ov.quantize.linears import Group, find, linear
from m4ov.quantize.schemes import WHOLE_ROW, Scheme, Weight
from m4ov.quantize.sensitivity import Keep, Sensitivity


@dataclass(frozen=True)
class Options:
    """What is to be done.

    Attributes:
        model, out: folders.
        scheme: a key of ``SCHEMES``.
        parts: of ``PARTS``, those to quantise.
        group_size: of "w4": 128, 64, 32, or −1 (a whole row).
        method: "rtn", or "awq": scales and ranges by the calibration data.
        calibrator: who finds AWQ's scales, "own" or "modelopt".
        keep: what stays in 16 bits.
    """

    model: Path
    out: Path
    scheme: str
    parts: frozenset[str] = frozenset({"text"})
    group_size: int = 128
    method: str = "rtn"
    calibrator: str = "own"
    keep: Keep = Keep()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Layer:
    """One linear of the model.

    Attributes:
        name, part, shape: which; [N, K].
        bits: a weight, scales and all.
        group_size: of a quantised weight's groups, or ``None``.
        kept: why it is in 16 bits; ``None``: it is quantised.
        scaled: a scale of its input was folded into what makes it.
        weight_error: ‖Ŵ − W‖/‖W‖; ``None`` where it was not quantised even to look.
        error, loss_change: see :class:`m4ov.quantize.sensitivity.Sensitivity`; ``None`` without data.
        slow: engines' fast kernels want other sizes.
    """

    name: str
    part: str
    shape: tuple[int, int]
    bits: float
    group_size: int | None = None
    kept: str | None = None
    scaled: bool = False
    weight_error: float | None = None
    error: float | None = None
    loss_change: float | None = None
    slow: bool = False


class Plan:
    """Which linears are quantised, how, and what became of them."""

    def __init__(self, model: nn.Module, options: Options, scheme: Scheme) -> None:
        self.shapes: dict[str, tuple[int, int]] = {}
        self.part: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        self.size: dict[str, int] = {}
        self.scaled: set[str] = set()
        self.weights: dict[str, Weight] = {}
        self.weight_error: dict[str, float] = {}
        self.found: dict[str, Sensitivity] = {}
        self.groups: list[Group] = []
        self.notes: list[str] = []
        groups = find(model)
        widths = {group: linear(model, group.names[0]).in_features for group in groups}
        asked = {group: scheme.group_size(widths[group], options.group_size) for group in groups}
        fitting = [size for group, size in asked.items() if size is not None and group.part in options.parts]
        # One for the whole model: engines and transformers look for one scheme of all linears.
        common = min(fitting, default=WHOLE_ROW)
        if scheme.name == "w4" and common != options.group_size:
            self.notes.append(f"groups of {common}: not every linear has whole groups of {options.group_size}")
        for group in groups:
            in_features = widths[group]
            for name in group.names:
                self.shapes[name] = (linear(model, name).out_features, in_features)
                self.part[name] = group.part
            if group.part not in options.parts:
                reason = f"{group.part} is not asked for"
            elif asked[group] is None:
                reason = f"its {in_features} inputs are in no whole groups of 32"
            else:
                self.groups.append(group)
                self.size |= dict.fromkeys(group.names, common)
                continue
            self.kept |= dict.fromkeys(group.names, reason)
        for part in PARTS:
            if part in options.parts and not any(group.part == part for group in self.groups):
                why = next((self.kept[name] for name in self.kept if self.part[name] == part), "it has no linear")
                flag = {"text": "MODEL", "lm_head": "--lm-head"}.get(part, f"--{part}")
                raise ValueError(f"{flag}: nothing of the {part} part can be quantised: {why}")
        moe = [name for name, value in model.named_parameters() if value.ndim == 3 and ".experts." in name]
        if moe:
            self.notes.append(f"experts are no linears here and stay in 16 bits: {len(moe)} tensors")

    def layers(self, scheme: Scheme) -> list[Layer]:
        made = []
        for name, shape in self.shapes.items():
            weight, found = self.weights.get(name), self.found.get(name)
            quantised = weight is not None and name not in self.kept
            size = self.size.get(name, WHOLE_ROW)
            made.append(
                Layer(
                    name,
                    self.part[name],
                    shape,
                    8 * weight.nbytes / (shape[0] * shape[1]) if weight is not None and quantised else 16.0,
                    size if quantised and scheme.name == "w4" else None,
                    self.kept.get(name),
                    name in self.scaled,
                    self.weight_error.get(name),
                    None if found is None else found.error,
                    None if found is None else found.loss_change,
                    quantised and any(width % gate for width, gate in zip(shape, scheme.gate, strict=True)),
                )
            )
        return made
