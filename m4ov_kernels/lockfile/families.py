"""Which kernels there are: what the families declare, and whether anything is not declared."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m4ov_kernels import configs
from m4ov_kernels.gpu import Build, CudaBuild
from m4ov_kernels.lockfile.targets import TARGETS

PACKAGE = Path(__file__).resolve().parents[1]
CSRC = PACKAGE.parent / "csrc"
_JIT = re.compile(r"^@triton\.jit\b", re.MULTILINE)


@dataclass(frozen=True)
class Declared:
    """``builds``: (module, index in its ``KERNELS``, build); ``cuda``: csrc folder → what is declared of it;
    ``errors``: what is declared wrongly or not at all."""

    builds: list[tuple[str, int, Build]]
    cuda: dict[Path, list[CudaBuild]]
    errors: list[str]


def families() -> list[str]:
    """The ``triton.py`` of every operator family, or its package ``triton``."""
    found = {path.parent.name for path in PACKAGE.glob("*/triton.py")}
    found |= {path.parents[1].name for path in PACKAGE.glob("*/triton/__init__.py")}
    return [f"m4ov_kernels.{family}.triton" for family in sorted(found)]


def declared(modules: list[str] | None = None) -> Declared:
    """What ``modules`` (default: every family) declare. A module that is not a family's has no CUDA sources."""
    found = Declared([], {}, [])
    if modules is None:
        found.errors.extend(_strays())
        found.errors.extend(_unknown_tables())
    for name in modules if modules is not None else families():
        module = importlib.import_module(name)
        entries = list(getattr(module, "KERNELS", ()))
        if not entries:
            found.errors.append(f"{name} declares no kernels: it needs a table KERNELS of m4ov_kernels.gpu.Build")
        found.errors.extend(f"{name}: {kernel} is not in KERNELS" for kernel in _undeclared(name, entries))
        found.errors.extend(
            f"{name}: {entry.name} has no cost model: pass work=Work(problem, bytes, flops)"
            for entry in entries
            if entry.work is None
        )
        taken: set[tuple[str, str]] = set()
        for i, entry in enumerate(entries):
            if isinstance(entry, CudaBuild):
                continue
            found.builds.append((name, i, entry))
            keys = {(entry.name, target) for target in entry.targets}
            found.errors.extend(f"{name}: {kernel} is declared twice for {t}" for kernel, t in sorted(keys & taken))
            taken |= keys
        cuda = [entry for entry in entries if isinstance(entry, CudaBuild)]
        folder = CSRC / name.split(".")[-2] if name in families() else None
        if folder and folder.is_dir() and (cuda or any(folder.glob("*.cu"))):
            found.cuda[folder] = cuda
    return found


def _strays() -> list[str]:
    """Triton kernels outside the families, which nobody would compile."""
    homes = {path.parent for path in (*PACKAGE.glob("*/triton.py"), *PACKAGE.glob("*/triton/__init__.py"))}
    return [
        f"{path.relative_to(PACKAGE.parent)} has Triton kernels, but no triton.py beside it declares them"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent not in homes and _JIT.search(path.read_text())
    ]


def _unknown_tables() -> list[str]:
    known = {configs.DEFAULT, *TARGETS}
    return [
        f"configs/{path.name}: its architecture is not compiled for; known: {', '.join(TARGETS)}"
        for path in sorted(configs.FOLDER.glob("*.json"))
        if path.stem not in known
    ]


def _undeclared(name: str, entries: list[Any]) -> list[str]:
    """Jitted functions of the module and of its siblings that no entry names and no such kernel calls."""
    from triton.runtime.jit import JITFunction

    modules = [importlib.import_module(name)]
    if name in families():
        home = name if hasattr(modules[0], "__path__") else name.rpartition(".")[0]  # the folder of its kernels
        folder = PACKAGE.parent.joinpath(*home.split("."))
        stems = [path.stem for path in sorted(folder.glob("*.py")) if _JIT.search(path.read_text())]
        modules = [importlib.import_module(f"{home}.{stem}") for stem in stems]
    reached: set[Any] = set()
    waiting = [entry.kernel for entry in entries if isinstance(entry, Build)]
    while waiting:
        kernel = waiting.pop()
        if kernel not in reached:
            reached.add(kernel)
            called = (kernel.fn.__globals__.get(other) for other in kernel.fn.__code__.co_names)
            waiting += [value for value in called if isinstance(value, JITFunction)]
    return sorted(
        value.__name__
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__ and value not in reached
    )
