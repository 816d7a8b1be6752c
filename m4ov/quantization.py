"""``m4ov quantize MODEL --scheme ...``: a checkpoint in four or eight bits, and what that did to it."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m4ov import evaluation

if TYPE_CHECKING:
    import torch

    from m4ov.data import Encoder, Split
    from m4ov.quantize import Batch, Calibration, Side

SCHEMES = ("w4", "w8a8", "fp8-block", "fp8-row")
METHODS = ("rtn", "awq")
CALIBRATORS = ("own", "modelopt")
GROUP_SIZES = (128, 64, 32, -1)
REPORT = "quantization.json"
_EPILOG = """\
Schemes: w4 (four-bit integers in groups, 16-bit activations), w8a8 (eight-bit integers, activations to eight bits token
by token), fp8-row (e4m3, a scale for each output), fp8-block (e4m3, a scale for each 128x128 block; the format of
DeepSeek and Qwen). The text is quantised; --vision, --merger and --lm-head add the vision tower, what joins it to the
text (DeepStack's mergers too), and the head. What is not quantised is named in the checkpoint's ignore list, which is
held against the model's modules after writing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("model", metavar="MODEL", type=Path, help="a Hugging Face checkpoint's folder")
    parser.add_argument("--scheme", required=True, metavar="S", help=", ".join(SCHEMES))
    parser.add_argument("--out", type=Path, metavar="DIR", help="written at once, never over (default: MODEL-SCHEME)")
    parser.add_argument("--group-size", type=int, default=128, metavar="N", help="of w4: 128, 64, 32, -1: a whole row")
    parser.add_argument("--method", default="rtn", metavar="M", help="rtn: round to nearest; awq: activation-aware")
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        help="quickstart, a folder as easy-vqa's, or .safetensors batches of the model's arguments (a file, a folder); "
        "none: only round (default: quickstart, for its models)",
    )
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="of DATA at most (default: 4)")
    parser.add_argument("--calibrator", default="own", metavar="C", help="who finds awq's scales: own, modelopt")
    parser.add_argument("--vision", action=yes_no, default=False, help="the vision tower")
    parser.add_argument("--merger", action=yes_no, default=False, help="between tower and text")
    parser.add_argument(
        "--lm-head",
        action="store_true",
        help="the head (a tied one is untied from the embeddings); not every engine loads one",
    )
    parser.add_argument(
        "--keep",
        default="auto",
        metavar="K",
        help="the most sensitive linears stay in 16 bits: a number of them, a share of the weights at most (3%%), "
        "auto: 5%%, and only where it hurts (default: auto)",
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="questions of the evaluation (default: all)")
    parser.add_argument("--no-evaluate", action="store_true", help="do not ask the quickstart's held-out questions")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of PyTorch (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write the report there too (it is DIR/{REPORT})")


def prepare(options: argparse.Namespace) -> Path:
    """The folder to write; needs no torch, so that a mistake is answered at once."""
    for name, known in (("scheme", SCHEMES), ("method", METHODS), ("calibrator", CALIBRATORS)):
        if getattr(options, name) not in known:
            raise ValueError(f"--{name}: expected one of {', '.join(known)}; got {getattr(options, name)}")
    if options.group_size not in GROUP_SIZES:
        raise ValueError(f"--group-size: expected 128, 64, 32 or -1 (a whole row); got {options.group_size}")
    if options.batches < 1:
        raise ValueError(f"--batches: expected at least 1, got {options.batches}")
    if options.limit < 0:
        raise ValueError(f"--limit: expected at least 0, got {options.limit}")
    if options.calibrator == "modelopt":
        if (options.scheme, options.method) != ("w4", "awq"):
            raise ValueError("--calibrator modelopt: finds the scales of --scheme w4 --method awq, and nothing else")
        if importlib.util.find_spec("modelopt") is None:
            raise ValueError(
                "--calibrator modelopt: nvidia-modelopt is not installed; pip install 'm4ov[quantize]' "
                "(or --calibrator own)"
            )
    evaluation.checkpoint(options.model)
    if options.calibrate not in (None, "none", "quickstart") and not Path(options.calibrate).exists():
        raise ValueError(f"--calibrate: {options.calibrate}: no such file or folder")
    if options.method == "awq" and options.calibrate == "none":
        raise ValueError("--calibrate: awq needs data; got none")
    out: Path = options.out or options.model.with_name(f"{options.model.name}-{options.scheme}")
    if out.exists():
        raise ValueError(f"--out: {out} exists already; remove it, or choose another")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: {out.parent}: no such folder")
    return out


def execute(options: argparse.Namespace, out: Path) -> int:
    """Quantise, write, evaluate before and after, report."""
    import torch
    from rich.console import Console

    from m4ov import quantize
    from m4ov.data import encoder_of
    from m4ov.models.qwen3_vl import cast_parameters
    from m4ov.train import command
    from m4ov_kernels.patches import patch

    keep = quantize.Keep.parse(options.keep)
    quantize.model_class(options.model)
    command.set_up(options.threads)
    console = Console()
    encoder = encoder_of(options.model)
    calibration = _calibration(options, encoder)
    if calibration is None and options.method == "awq":
        raise ValueError(
            f"--calibrate: awq needs data; {options.model} is no quickstart's model, so there is no default"
        )
    if calibration is None and options.keep != "auto" and keep.asks:
        raise ValueError(f"--calibrate: --keep {options.keep} needs data to judge with")
    questions = None if encoder is None or options.no_evaluate else (encoder, evaluation.held_out(encoder))
    dtype = quantize.half_dtype(options.model)
    batches = calibration.batches(dtype) if calibration is not None else []
    parts = {"text"} | {name for name in ("vision", "merger", "lm_head") if getattr(options, name)}
    chosen = quantize.Options(
        model=options.model,
        out=out,
        scheme=options.scheme,
        parts=frozenset(parts),
        group_size=options.group_size,
        method=options.method,
        calibrator=options.calibrator,
        keep=keep,
    )
    with quantize.Stages(console) as stages:
        model = quantize.load_source(options.model)
        cast_parameters(model, dtype)
        before = _side(model, options.model, questions, batches, options.limit, dtype, stages, "before")
        del model
        result = quantize.quantize(chosen, calibration, stages)
        model = quantize.load(out)
        patch(model)
        after = _side(model, out, questions, batches, options.limit, dtype, stages, "after")
    report = quantize.Report(chosen, result, before, after, torch.get_num_threads())
    quantize.print_report(report, console)
    text = json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n"
    (out / REPORT).write_text(text, encoding="utf-8")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text, encoding="utf-8")
    console.print(f"checkpoint: {out}\nreport: {out / REPORT}")
    return 0


def _calibration(options: argparse.Namespace, encoder: Encoder | None) -> Calibration | None:
    from m4ov import quantize

    data = options.calibrate or ("none" if encoder is None else "quickstart")
    return None if data == "none" else quantize.Calibration(options.model, data, options.batches)


def _side(
    model: Any,
    folder: Path,
    questions: tuple[Encoder, tuple[Split, ...]] | None,
    batches: list[Batch],
    limit: int,
    dtype: torch.dtype,
    stages: Any,
    when: str,
) -> Side:
    from m4ov import quantize

    accuracy: dict[str, float] = {}
    if questions is not None:
        encoder, splits = questions
        done = stages.stage(f"evaluating, {when}", len(splits))
        found = evaluation.accuracies(model, encoder, splits, limit=limit, dtype=dtype, done=done)
        accuracy = {result.split: result.value for result in found}
    return quantize.measure_side(model, folder, batches, accuracy)
