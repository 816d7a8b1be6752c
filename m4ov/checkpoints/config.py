"""A checkpoint's configuration: written for the modules that a file holds quantised and those that it leaves."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from m4ov.checkpoints.names import TOWERS
from m4ov.models.sharded import WeightsError
from m4ov_kernels.gemm.weights import exclusions

MODELOPT_FILE = "hf_quant_config.json"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".index.json")
# Where a quantisation's configuration stands: in config.json, in parts of it, in files of its own.
_KEYS = ("quantization_config", "compression_config")
FILES = {MODELOPT_FILE: "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}


def leave_out(
    config: dict[str, Any], quantised: Iterable[str], left: Iterable[str], experts: Iterable[str] = ()
) -> dict[str, Any]:
    """A writer's configuration with the modules that are not quantised, as each format lists them.

    Args:
        config: of :func:`m4ov_kernels.gemm.weights.write`; it is changed.
        quantised, left: names of linears.
        experts: modules of a mixture whose weights are one tensor of three dimensions, and stay as they are.

    Raises:
        WeightsError: the list would name a module that is quantised (AWQ's entries are parts of names).
    """
    quantised, left, experts = set(quantised), sorted(left), sorted(experts)
    method = config.get("quant_method", "modelopt")
    towers = []
    for tower in TOWERS:  # engines have linears there that transformers has not
        inside = [name for name in left if f".{tower}." in f".{name}."]
        if inside and method != "fp8" and not any(f".{tower}." in f".{name}." for name in quantised):
            towers.append(tower)
            left = [name for name in left if name not in inside]
    if method == "fp8":
        config["modules_to_not_convert"] = sorted({*left, *experts})
    elif method == "awq":
        config["modules_to_not_convert"] = [*towers, *experts, *left]
    elif method == "gptq":
        patterns = [rf"-:.*{tower}\..*" for tower in towers] + [f"-:{re.escape(name)}$" for name in (*experts, *left)]
        config |= {"dynamic": {pattern: {} for pattern in patterns}} if patterns else {}
    elif method == "modelopt":
        config["quantization"]["exclude_modules"] = [*(f"*{tower}*" for tower in towers), *experts, *left]
    else:
        some = ["re:.*mlp\\.experts.*"] if experts else []
        config["ignore"] = [*(f"re:.*{tower}\\..*" for tower in towers), *some, *left]
    for entry, excludes in exclusions(config).items():
        hit = next((name for name in sorted(quantised) if excludes(name)), None)
        if hit is not None:
            raise WeightsError(f"{entry!r}, which is to stay unquantised, would name {hit} too in this format's list")
    return config


def experts_of(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Experts that are one tensor of three dimensions: no linears, and left as they are."""
    found = (name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) == 3)
    return sorted({name for name in found if name.endswith(".experts")})


def edited(config: Any, dtype: torch.dtype | None = None, untied: bool = False) -> Any:
    """A model's configuration without its quantisation, with another dtype, and an untied head, wherever it says so."""
    if not isinstance(config, dict):
        return config
    made = {name: edited(value, dtype, untied) for name, value in config.items() if name not in _KEYS}
    for name in ("dtype", "torch_dtype"):
        if name in made and dtype is not None:
            made[name] = str(dtype).removeprefix("torch.")
    if untied and "tie_word_embeddings" in made:
        made["tie_word_embeddings"] = False
    return made


def quantization_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(where it stands, the quantisation's configuration) of a config.json."""
    for part in ("", "text_config"):
        values = config.get(part) if part else config
        for key in _KEYS if isinstance(values, Mapping) else ():
            found = values.get(key)  # type: ignore[union-attr]
            if isinstance(found, dict) and found:
                return f"config.json[{f'{part}.' if part else ''}{key}]", found
    return None


def copy_rest(source: Path, to: Path) -> None:
    """Tokenizer, processor and the like: every file that holds no weights and no configuration of their format."""
    for file in sorted(source.iterdir()):
        wanted = not file.name.startswith(".") and not file.name.endswith(_WEIGHT_FILES) and file.name not in FILES
        if wanted and file.is_file():
            shutil.copyfile(file, to / file.name)
