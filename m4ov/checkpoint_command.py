"""``m4ov checkpoint inspect|convert|verify``: what a checkpoint is, in another format, and whether two are alike."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from m4ov.checkpoints import Checkpoint

FORMATS = (
    "awq",
    "gptq",
    "gptq_v2",
    "compressed-tensors-int4",
    "compressed-tensors-int8",
    "compressed-tensors-fp8",
    "modelopt-fp8",
    "modelopt-fp8-pb-wo",
    "modelopt-w4a16-awq",
    "block-fp8",
    "plain",
)
DTYPES = ("bfloat16", "float16", "float32")
_EPILOG = """\
Formats: awq, gptq (version 1), gptq_v2, compressed-tensors-int4, -int8, -fp8, modelopt-fp8, modelopt-fp8-pb-wo,
modelopt-w4a16-awq, block-fp8, and plain (dequantised). Codes and scales are carried over bit for bit; what a format
cannot hold is refused before anything is written. safetensors only: a pickle is never opened."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="what is quantised, what silently is or is not, which kernels take it")
    inspect.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's folder, or one .safetensors file")
    inspect.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks of a server (default: 1)")
    convert = actions.add_parser("convert", help="the same weights in another format", epilog=_EPILOG)
    convert.add_argument("model", metavar="MODEL", type=Path, help="a quantised checkpoint's folder")
    convert.add_argument("--to", required=True, metavar="F", help="the format; see below")
    convert.add_argument("--out", required=True, type=Path, metavar="DIR", help="appears whole, never over another")
    convert.add_argument(
        "--dtype", metavar="D", help=f"of dequantised weights: {', '.join(DTYPES)} (default: config's)"
    )
    convert.add_argument(
        "--scale-dtype", metavar="D", help="round int4's scales to it (awq and gptq hold 16 bits; default: as they are)"
    )
    convert.add_argument(
        "--granularity", metavar="G", help="write fp8's one scale of a tensor out for each channel or block"
    )
    convert.add_argument(
        "--unfit", default="refuse", metavar="U", help="refuse, or plain: dequantise what the format cannot hold"
    )
    convert.add_argument("--shard-gib", type=float, default=5.0, metavar="G", help="of a file at most (default: 5)")
    verify = actions.add_parser("verify", help="every tensor read; with a second checkpoint: are they alike")
    verify.add_argument("model", metavar="A", type=Path, help="a checkpoint's folder, or one .safetensors file")
    verify.add_argument("other", metavar="B", type=Path, nargs="?", help="another, as what A was made from")
    verify.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="‖B − A‖/‖A‖ of a weight at most (default: the same values, or any where one side is quantised)",
    )
    for action in (inspect, convert, verify):
        action.add_argument("--json", action="store_true", help="print JSON instead of tables")


def prepare(options: argparse.Namespace) -> None:
    """Checks what needs no torch, so that a mistake is answered at once."""
    if options.action == "inspect" and options.tensor_parallel < 1:
        raise ValueError(f"--tensor-parallel: expected at least 1, got {options.tensor_parallel}")
    if options.action == "verify" and options.tolerance is not None and not options.tolerance >= 0:
        raise ValueError(f"--tolerance: expected at least 0, got {options.tolerance}")
    if options.action == "convert":
        for name, value, known in (
            ("to", options.to, FORMATS),
            ("dtype", options.dtype, (None, *DTYPES)),
            ("scale-dtype", options.scale_dtype, (None, *DTYPES)),
            ("granularity", options.granularity, (None, "channel", "block")),
            ("unfit", options.unfit, ("refuse", "plain")),
        ):
            if value not in known:
                raise ValueError(f"--{name}: expected one of {', '.join(k for k in known if k)}; got {value}")
        if not options.shard_gib > 0:
            raise ValueError(f"--shard-gib: expected more than 0, got {options.shard_gib}")
        if options.out.exists():
            raise ValueError(f"--out: {options.out} exists already; remove it, or choose another")
    paths = {"MODEL" if options.action != "verify" else "A": options.model, "B": getattr(options, "other", None)}
    for name, path in paths.items():
        if path is not None and not path.exists():
            raise ValueError(f"{name}: {path}: no such file or folder")


def execute(options: argparse.Namespace, _: None) -> int:
    """Exit status 1: ``inspect`` found an error, or the checkpoints of ``verify`` are not alike."""
    from rich.console import Console

    from m4ov import checkpoints

    first = checkpoints.open_checkpoint(options.model)
    return {"inspect": _inspect, "convert": _convert, "verify": _verify}[options.action](options, first, Console())


def _inspect(options: argparse.Namespace, checkpoint: Checkpoint, console: Console) -> int:
    from m4ov.checkpoints import inspect, render

    total = sum(tensor.nbytes for tensors in checkpoint.modules.values() for tensor in tensors.values())
    with _progress("reading", total) as advance:
        report = inspect(checkpoint, ranks=options.tensor_parallel, advance=advance)
    _show(options, console, report, render.report_json, render.print_report)
    return 0 if report.ok else 1


def _convert(options: argparse.Namespace, checkpoint: Checkpoint, console: Console) -> int:
    from m4ov.checkpoints import Options, convert, render
    from m4ov.checkpoints.conversion import DTYPES

    chosen = Options(
        out=options.out,
        format=options.to,
        dtype=DTYPES.get(options.dtype),
        scale_dtype=DTYPES.get(options.scale_dtype),
        granularity=options.granularity,
        unfit=options.unfit,
        shard_bytes=max(1, int(options.shard_gib * 2**30)),
    )
    with _progress("converting", 2 * sum(tensor.nbytes for tensor in checkpoint.tensors.values())) as advance:
        result = convert(checkpoint, chosen, advance)
    _show(options, console, result, render.result_json, render.print_result)
    return 0


def _verify(options: argparse.Namespace, first: Checkpoint, console: Console) -> int:
    from m4ov.checkpoints import open_checkpoint, render, verify

    second = None if options.other is None else open_checkpoint(options.other)
    total = sum(tensor.nbytes for side in (first, second) if side for tensor in side.tensors.values())
    with _progress("comparing", total) as advance:
        comparison = verify(first, second, tolerance=options.tolerance, advance=advance)
    _show(options, console, comparison, render.comparison_json, render.print_comparison)
    return 0 if comparison.ok else 1


def _show(
    options: argparse.Namespace,
    console: Console,
    made: Any,
    as_json: Callable[[Any], dict[str, Any]],
    to_terminal: Callable[[Any, Console], None],
) -> None:
    if options.json:
        print(json.dumps(as_json(made), indent=1, ensure_ascii=False))
    else:
        to_terminal(made, console)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar of bytes on the terminal's error stream; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.advance(task, done)
