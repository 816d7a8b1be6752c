"""What was committed of each compiler's kernels, and how the present ones differ from it.

A file per compiler version, ``<compiler>-<version>.json``, a line per kernel and target and one per kernel for its cost
model. Machine code is a compiler's as much as a kernel's, so it is compared with what the same version made. ``key``: a
hash of all that a compilation depends on; while it is the same, the line stands for the compilation.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from m4ov_kernels.lockfile.check import Kernel
from m4ov_kernels.lockfile.report import Report
from m4ov_kernels.lockfile.targets import h200_floor

FOLDER = Path(__file__).resolve().parent
MODEL = "model"  # stands where a machine code's target does

Key = tuple[str, str]  # kernel, target
Entry = dict[str, Any]


class Difference(NamedTuple):
    kernel: str
    target: str
    field: str
    locked: str
    now: str


def entries(kernels: Iterable[Kernel]) -> dict[Key, Entry]:
    """What a lock file holds of ``kernels``."""
    found: dict[Key, Entry] = {}
    for kernel in kernels:
        report = kernel.report.as_json()
        found[report.pop("kernel"), report.pop("target")] = report
        work = kernel.build.work
        if work is not None:
            floor = f"{h200_floor(kernel.build) * 1e6:.3g}"
            found[kernel.build.name, MODEL] = {**asdict(work), "h200_us": float(floor)}
    return found


def path_of(compiler: str, version: str, folder: Path = FOLDER) -> Path:
    return folder / f"{compiler}-{version}.json"


def versions(compiler: str, folder: Path = FOLDER) -> list[str]:
    """The versions of ``compiler`` that have a lock."""
    return sorted(path.stem.removeprefix(f"{compiler}-") for path in folder.glob(f"{compiler}-*.json"))


def read(path: Path) -> dict[Key, Entry]:
    """Without the keys: a kernel that was written in other words and compiles to the same is the same."""
    found = {}
    for entry in json.loads(path.read_text())["kernels"]:
        entry.pop("key", None)
        found[entry.pop("kernel"), entry.pop("target")] = entry
    return found


def reports(path: Path) -> dict[str, list[Report]]:
    """What was locked, by the key of its compilation."""
    found: dict[str, list[Report]] = {}
    for entry in json.loads(path.read_text())["kernels"] if path.exists() else ():
        if "key" in entry:
            found.setdefault(entry.pop("key"), []).append(Report(**entry))
    return found


def write(path: Path, kernels: Iterable[Kernel]) -> None:
    """Whole or not at all, a line per entry."""
    kernels = list(kernels)
    keys = {(kernel.report.kernel, kernel.report.target): {"key": kernel.key} for kernel in kernels}
    lines = [
        json.dumps({"kernel": kernel, "target": target, **entry, **keys.get((kernel, target), {})})
        for (kernel, target), entry in entries(kernels).items()
    ]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write('{"kernels": [\n' + ",\n".join(lines) + "\n]}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def differences(old: dict[Key, Entry], new: dict[Key, Entry], targets: Sequence[str] | None = None) -> list[Difference]:
    """Field by field; a kernel that is only in one of them is one difference. ``targets``: only these were compiled."""
    found = []
    for key in dict.fromkeys((*old, *new)):
        if targets is not None and key[1] not in targets:
            continue
        before, after = old.get(key), new.get(key)
        if targets is not None and key[1] == MODEL and after is None:
            continue  # of a configuration that ships for another target
        if before is None or after is None:
            found.append(
                Difference(*key, "kernel", "—" if before is None else "here", "—" if after is None else "here")
            )
            continue
        found += [
            Difference(*key, name, _text(before.get(name)), _text(after.get(name)))
            for name in dict.fromkeys((*before, *after))
            if before.get(name) != after.get(name)
        ]
    return found


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    return "—" if value is None else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (list(header), *cells)) for i in range(len(header))]
    numbers = [all(re.fullmatch(r"[\d.e+-]+|—", row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        aligned = (c.rjust(w) if number else c.ljust(w) for c, w, number in zip(row, widths, numbers, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join(line(row) for row in (list(header), *cells))
