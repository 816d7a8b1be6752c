"""``m4ov kernels``: the GPU kernels' lockfile (``lock``, ``check``, ``show``) and their configurations (``tune``)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from m4ov_kernels.lockfile.check import Found
    from m4ov_kernels.lockfile.locked import Entry, Key

CODE = ("registers", "local", "spills", "shared", "fp64", "matrix", "threads", "occupancy", "size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = commands.add_parser(
        "check", help="every kernel for every target: compile what has changed and a sample; budgets; against the lock"
    )
    lock = commands.add_parser(
        "lock", help="compile every kernel that is not in the cache, and write what was found into the lock files"
    )
    for command in (check, lock):
        command.add_argument("module", nargs="*", help="modules with a KERNELS table (default: every family, and csrc)")
        command.add_argument(
            "--no-cache", action="store_true", help="compile again what was compiled before, what is locked too"
        )
        command.add_argument("--locks", type=Path, metavar="DIR", help="lock files there (default: the package's)")
    check.add_argument("--target", action="append", help="only this target (sm_80, sm_90, ...); may be repeated")
    check.add_argument("--exact", action="store_true", help="fail where this compiler's version has no lock (CI)")
    show = commands.add_parser("show", help="print what is locked; compiles nothing")
    show.add_argument("kernel", nargs="?", default="", help="only kernels whose name holds this")
    show.add_argument("--target", action="append", help="only this target; may be repeated")
    tune = commands.add_parser("tune", help="measure configurations on this GPU and write its architecture's table")
    tune.add_argument("kernel", nargs="*", help="only these kernels (default: all that have a table)")
    tune.add_argument("--minutes", type=float, default=10.0, help="stop after about this long (default: 10)")


def execute(options: argparse.Namespace) -> int:
    """Exit status 1: a budget or the lock is broken; 2: it cannot look (``ValueError``, or said on stderr)."""
    if options.action == "show":
        return _show(options)
    if options.action == "tune":
        from m4ov_bench import tune

        return tune.command(options.kernel, options.minutes)
    return _compile(options)


class _Compiler(NamedTuple):
    name: str
    version: str
    found: Found
    targets: list[str]


def _compile(options: argparse.Namespace) -> int:
    from m4ov_kernels.lockfile import check, compile, families, locked
    from m4ov_kernels.lockfile.targets import TARGETS

    only = getattr(options, "target", None)
    for target in only or ():
        if target not in TARGETS:
            raise ValueError(f"--target: unknown target {target}; known: {', '.join(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set: Triton would interpret, not compile; unset it")
    if options.module and options.action == "lock" and options.locks is None:
        raise ValueError("--locks: expected a folder, because the package's lock holds every family")
    cache = None if options.no_cache else check.default_cache()
    declared = families.declared(options.module or None)
    compilers, absent = [], []
    targets = only or list(TARGETS)
    folder = options.locks or (None if options.module else locked.FOLDER)

    def held(compiler: str, version: str) -> check.Held:
        if options.action == "lock" or options.no_cache or folder is None:
            return {}
        return check.all_but_a_sample(locked.reports(locked.path_of(compiler, version, folder)))

    version = compile.nvcc_version()
    if declared.cuda and version is not None:
        cuda_targets = check.cuda_targets(only)
        found = check.cuda_kernels(declared, cuda_targets, cache, held("nvcc", version), version)
        compilers.append(_Compiler("nvcc", version, found, cuda_targets))
    elif declared.cuda:
        absent.append("nvcc is not on the PATH: the CUDA C++ kernels were not compiled")
    triton = compile.triton_version()
    found = check.triton_kernels(declared, targets, cache, held("triton", triton))
    found.errors.extend(declared.errors)
    compilers.insert(0, _Compiler("triton", triton, found, targets))
    act = _lock if options.action == "lock" else _compare
    status = max([act(compiler, folder, options) for compiler in compilers])
    for line in absent:
        exact = getattr(options, "exact", False)
        print(f"{line}{'; --exact asks for it' if exact else ''}", file=sys.stderr)
        status = max(status, int(exact))
    return status


def _judge(compiler: _Compiler) -> int:
    failures, count = compiler.found.failures, len(compiler.found.kernels)
    for failure in failures:
        print(f"  ✗ {failure}", file=sys.stderr)
    known = f" ({compiler.found.held} compilations unchanged since they were locked)" if compiler.found.held else ""
    print(f"{compiler.name} {compiler.version}: {count} kernels{known}, {len(failures)} violations")
    return int(bool(failures) or not count)


def _compare(compiler: _Compiler, folder: Path | None, options: argparse.Namespace) -> int:
    from m4ov_kernels.lockfile import locked

    status = _judge(compiler)
    if folder is None:
        return status
    path = locked.path_of(compiler.name, compiler.version, folder)
    if not path.exists():
        others = ", ".join(locked.versions(compiler.name, folder)) or "none"
        print(
            f"{compiler.name} {compiler.version}: budgets only, no comparison: this version has no lock (locked: "
            f"{others}). Install a locked one, or let `m4ov kernels lock` add this one.",
            file=sys.stderr,
        )
        return max(status, int(options.exact))
    now = locked.entries(compiler.found.kernels)
    targets = [*compiler.targets, locked.MODEL]
    found = locked.differences(locked.read(path), now, targets if options.target else None)
    if not found:
        print(f"{compiler.name} {compiler.version}: as locked")
        return status
    print(f"\n{len(found)} differences from {path.name}:\n")
    print(locked.table(("kernel", "target", "field", "locked", "now"), found))
    print("\nIf they are meant, say why in the commit that holds the new lock: m4ov kernels lock")
    return 1


def _lock(compiler: _Compiler, folder: Path | None, options: argparse.Namespace) -> int:
    from m4ov_kernels.lockfile import locked

    if _judge(compiler):
        print(f"{compiler.name} {compiler.version}: not locked", file=sys.stderr)
        return 1
    path = locked.path_of(compiler.name, compiler.version, folder or locked.FOLDER)
    before = locked.read(path) if path.exists() else {}
    now = locked.entries(compiler.found.kernels)
    found = locked.differences(before, now)
    locked.write(path, compiler.found.kernels)
    if before and found:
        print(locked.table(("kernel", "target", "field", "locked", "now"), found))
    print(f"{path}: {len(found)} differences from what was locked" if before else f"{path}: new")
    return 0


def _show(options: argparse.Namespace) -> int:
    from m4ov_kernels import configs
    from m4ov_kernels.lockfile import locked

    def wanted(key: Key) -> bool:
        return options.kernel in key[0] and (not options.target or key[1] in options.target or key[1] == locked.MODEL)

    models: dict[Key, Entry] = {}
    for compiler in ("triton", "nvcc"):
        for version in locked.versions(compiler):
            held = {k: v for k, v in locked.read(locked.path_of(compiler, version)).items() if wanted(k)}
            models |= {key: entry for key, entry in held.items() if key[1] == locked.MODEL}
            rows: list[list[Any]] = [
                [*key, *(entry[name] for name in CODE)] for key, entry in held.items() if key[1] != locked.MODEL
            ]
            if rows:
                print(f"{compiler} {version}\n{locked.table(('kernel', 'target', *CODE), rows)}\n")
    fields = ("problem", "bytes", "flops", "h200_us")
    print(
        "cost models, and the time below which no H200 can be (4.8 TB/s; see m4ov_kernels/lockfile/targets.py)\n"
        + locked.table(("kernel", *fields), [[key[0], *(entry[f] for f in fields)] for key, entry in models.items()])
        + "\n"
    )
    for path in sorted(configs.FOLDER.glob("*.json")):
        held_table = configs.table(path.stem)
        measured = ", ".join(f"{name} {value}" for name, value in held_table.measured.items()) or "not measured"
        print(f"configurations {path.stem}: {len(held_table.rows)} rows, {measured}")
    return 0
