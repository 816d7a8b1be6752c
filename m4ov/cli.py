"""The command ``m4ov``: ``run``, ``data``, ``eval``, ``quantize``, ``checkpoint``, ``doctor``, ``bench``, ``kernels``,
``certify``, ``parity``.

torch is imported only by a command that computes, and after the allocator is set up (:mod:`m4ov.allocator`). What goes
wrong is one line and exit status 2; ``--traceback`` shows where. Ctrl-C is 130.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from m4ov import allocator, certify, checkpoint_command, data_command, evaluation, kernels, parity, quantization

#: Task of a recipe → (its configuration, the function that runs it).
TASKS = {
    "quickstart": ("m4ov.quickstart_recipe:QuickstartConfig", "m4ov.quickstart:run"),
    "curriculum": ("m4ov.manifest:CurriculumConfig", "m4ov.curriculum:run"),
    "sft": ("m4ov.sft_recipe:SftConfig", "m4ov.sft_run:run"),
    "hybrid-rl": ("m4ov.hybrid_recipe:HybridConfig", "m4ov.hybrid:run"),
    "data": ("m4ov.data_recipe:DataBuildConfig", "m4ov.data_command:run"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. ``arguments``: without the program's name; ``None``: the process's
    own, and then a command that computes may start the process again to set the allocator up."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        prepared = options.prepare(options) if hasattr(options, "prepare") else None
        if arguments is None:
            allocator.ensure()  # does not return where it starts the process again
        return int(options.execute(options, prepared) or 0)
    except KeyboardInterrupt as interrupt:  # a task may say more
        hint = "; the same command goes on where it was" if options.command == "run" else ""
        print(f"\nm4ov {options.command}: {str(interrupt) or 'interrupted' + hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `m4ov doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.traceback:
            raise
        rank = os.environ.get("RANK")
        print(f"m4ov {options.command}{f' (rank {rank})' if rank else ''}: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    expected = isinstance(error, (ValueError, OSError))
    kind = "" if expected else f"{type(error).__name__}: "
    return f"{kind}{text}" + ("" if expected else " (m4ov --traceback … shows where)")


def _parser() -> argparse.ArgumentParser:
    from m4ov_bench import command as bench_command

    parser = argparse.ArgumentParser(prog="m4ov", description="Train and measure vision-language models.")
    parser.add_argument("--version", action="version", version=f"m4ov {_version()}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run = commands.add_parser("run", help="run a recipe; the same command goes on where it was")
    run.add_argument("recipe", metavar="RECIPE", help="a name (quickstart, curriculum, sft, hybrid-rl) or a .yaml file")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. scale=0.2 run.folder=runs/mine")
    run.set_defaults(prepare=_load, execute=_run)
    data = commands.add_parser("data", help="produce training data by a recipe; check files of records")
    data_command.add_arguments(data)
    data.set_defaults(prepare=data_command.prepare, execute=data_command.execute)
    evaluate = commands.add_parser(
        "eval", aliases=["evaluate"], help="benchmarks, by every tool's rule; held-out questions"
    )
    evaluation.add_arguments(evaluate)
    evaluate.set_defaults(prepare=evaluation.prepare, execute=evaluation.execute)
    quantize = commands.add_parser("quantize", help="a checkpoint in four or eight bits, and what that did to it")
    quantization.add_arguments(quantize)
    quantize.set_defaults(prepare=quantization.prepare, execute=quantization.execute)
    files = commands.add_parser("checkpoint", help="inspect a checkpoint, convert it between formats, verify it")
    checkpoint_command.add_arguments(files)
    files.set_defaults(prepare=checkpoint_command.prepare, execute=checkpoint_command.execute)
    doctor = commands.add_parser("doctor", help="what this machine will run, and why")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of tables")
    doctor.set_defaults(execute=_doctor)
    bench = commands.add_parser("bench", help="operators against the machine's limit and against their peers")
    bench_command.add_arguments(bench)
    bench.set_defaults(prepare=_check_bench, execute=_bench)
    lockfile = commands.add_parser("kernels", help="the GPU kernels' lockfile and configurations")
    kernels.add_arguments(lockfile)
    lockfile.set_defaults(execute=lambda options, _: kernels.execute(options))
    certificate = commands.add_parser("certify", help="how far apart a sampler's and a trainer's log-probabilities are")
    certify.add_arguments(certificate)
    certificate.set_defaults(prepare=certify.sources, execute=certify.execute)
    layouts = commands.add_parser("parity", help="every parallel layout against one process, gradient by gradient")
    parity.add_arguments(layouts)
    layouts.set_defaults(prepare=parity.prepare, execute=parity.execute)
    return parser


def _load(options: argparse.Namespace) -> tuple[Any, str]:
    """(the configuration, where its task's function is); needs no torch, so that a mistake is answered at once."""
    from m4ov import config

    path = config.find(options.recipe)
    task = config.task(path, options.overrides)
    if task not in TASKS:
        given = "names no task" if task is None else f"has the task {task!r}"
        raise config.ConfigError(f"{path} {given}; tasks: {', '.join(TASKS)} (task: quickstart)")
    schema, function = TASKS[task]
    return config.load(_resolve(schema), path, options.overrides), function


def _run(options: argparse.Namespace, prepared: tuple[Any, str]) -> int:
    loaded, function = prepared
    return _resolve(function)(loaded) or 0


def _doctor(options: argparse.Namespace, _: None) -> int:
    from m4ov import doctor

    report = doctor.collect()
    if options.json:
        print(json.dumps(report.as_json(), indent=1, ensure_ascii=False))
        return 0
    from rich.console import Console

    doctor.render(report, Console())
    return 0


def _check_bench(options: argparse.Namespace) -> None:
    from m4ov_bench import runner

    runner.check(options.family)


def _bench(options: argparse.Namespace, _: None) -> int:
    from m4ov_bench import command as bench_command

    memory = allocator.status()
    return bench_command.execute(options, f"{memory.how}: {memory.reason}")


def _resolve(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _version() -> str:
    try:
        return metadata.version("m4ov")
    except metadata.PackageNotFoundError:
        return "(not installed: running from its sources)"
