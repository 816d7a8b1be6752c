"""The house rules, held against the code: who may import whom, no circles, file sizes, one name per family."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"m4ov_kernels": ROOT / "m4ov_kernels", "m4ov": ROOT / "m4ov", "m4ov_bench": ROOT / "bench"}
# A layer of m4ov may import the layers left of it, and itself; rooms that share a layer never import each other.
LAYERS = (
    ("allocator", "config", "cores", "recipe"),
    ("data_recipe", "manifest", "rl_recipe"),
    ("hybrid_recipe", "sft_recipe"),
    ("quickstart_recipe",),
    ("data", "models"),
    ("checkpoints",),  # files and formats: below what makes and serves quantised models, beside no model's code
    ("parallel",),
    ("train", "generate"),
    ("sft", "rl", "quantize", "serve", "evaluate"),
    ("doctor", "kernels", "certify", "parity", "data_command", "checkpoint_command"),
    ("hybrid",),
    ("quickstart",),
    ("evaluation", "curriculum", "sft_run"),
    ("quantization",),
    ("cli",),
    ("__main__",),
)
MAX_LINES = 500
BENCHED = {"m4ov_bench.generate": ("m4ov.generate", "m4ov.models")}  # the benchmark of a layer above the operators
HOST_FAMILIES = ("packing",)  # functions that make batches, which no GPU runs


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, top_level: bool = False) -> Iterator[str]:
    """The modules of this project that a module imports, anywhere or only when it is itself imported."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import; name the module in full"
            targets = [
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        yield from (target for target in targets if target.split(".")[0] in PACKAGES)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_the_code_is_seen():
    assert {"m4ov_kernels.dispatch", "m4ov.cli", "m4ov_bench.cases"} <= MODULES.keys()
    assert "m4ov_kernels.norm.reference" in set(imports("m4ov_kernels.norm"))


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    package = name.split(".")[0]
    for target in imports(name):
        to = target.split(".")[0]
        if package != "m4ov":
            allowed = {package} if package == "m4ov_kernels" else {package, "m4ov_kernels"}
            if package == "m4ov_bench" and room(name).startswith(("sft", "rl")):  # measure the loop that trains
                allowed.add("m4ov")
                assert to != "m4ov" or _level(target) <= _level("m4ov.sft"), f"{name} imports {target}"
            assert to in allowed or target.startswith(BENCHED.get(name, ())), f"{name} imports {target}"
        elif to == "m4ov_bench":
            assert room(name) in ("cli", "quickstart", "kernels"), f"{name} imports {target}"
        elif to == "m4ov" and target != "m4ov" and room(target) != room(name):
            assert _level(name) > _level(target), f"{name} imports {target}, which is not in a lower layer"


def _level(module: str) -> int:
    levels = [level for level, rooms in enumerate(LAYERS) if room(module) in rooms]
    assert levels, f"{module} stands in no layer of tests/test_house.py"
    return levels[0]


# What `import m4ov_kernels` must not bring, and the modules that are imported only when somebody asks for them.
HEAVY = ("accelerate", "datasets", "matplotlib", "peft", "rich", "transformers", "trl", "verl")
ASKED_FOR = {"matplotlib": ("m4ov_kernels.numerics.plot",), "transformers": ("m4ov_kernels.patches.",)}


def test_the_kernels_import_no_trainer_and_no_plotting():
    for name in MODULES:
        if name.split(".")[0] != "m4ov_kernels":
            continue
        for node in ast.parse(MODULES[name].read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            for package in {(n or "").split(".")[0] for n in names} & set(HEAVY):
                assert name.startswith(ASKED_FOR.get(package, ())), f"{name} imports {package} when it is imported"


def test_nothing_stands_on_the_integrations():
    """They join operators and other people's code; no operator knows of them. (A recipe of m4ov may ask for one.)"""
    for name in MODULES:
        if name.startswith("m4ov_kernels") and not name.startswith("m4ov_kernels.integrations"):
            used = [target for target in imports(name) if target.startswith("m4ov_kernels.integrations")]
            assert not used, f"{name} imports {used[0]}"


def test_no_import_cycles():
    graph = {name: set(imports(name, top_level=True)) - {name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "import cycle: " + " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_m4ov_imports_no_torch_before_the_allocator_is_set_up():
    for name in ("m4ov", "m4ov.cli", "m4ov.allocator", "m4ov.config", "m4ov.cores"):
        for node in ast.parse(MODULES[name].read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert not any((n or "").split(".")[0] in ("torch", "m4ov_kernels", "transformers") for n in names), name


@pytest.mark.parametrize("folder", ["m4ov_kernels", "m4ov", "bench", "tests", "csrc"])
def test_no_file_holds_two_rooms(folder):
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
            lines = len(path.read_text().splitlines())
            assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines; part it"


def test_a_family_has_one_name_everywhere():
    kernels = ROOT / "m4ov_kernels"
    families = {path.parent.name for path in kernels.glob("*/reference.py")}
    families |= {path.parents[1].name for path in kernels.glob("*/reference/__init__.py")}
    assert families

    def stands(module: Path) -> bool:  # a file, or a package where a family has many operators
        return module.with_suffix(".py").exists() or (module / "__init__.py").exists()

    for family in families:
        assert stands(kernels / family / "native"), f"family {family!r} has no native"
        for place in (f"csrc/{family}", f"bench/{family}.py"):
            assert (ROOT / place).exists(), f"family {family!r} has no {place}"
        assert any((ROOT / "tests/kernels").glob(f"test_{family}*.py")), f"family {family!r} has no tests"
        on_gpu = [kernels / family / module for module in ("triton", "library")]
        assert family in HOST_FAMILIES or any(map(stands, on_gpu)), f"family {family!r} has nothing for a GPU"
