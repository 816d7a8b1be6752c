"""Small checkpoints in any format, of weights that a test has made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from m4ov.checkpoints.config import leave_out
from m4ov_kernels.gemm import weights as formats

TEXT = "model.language_model.layers"
MODEL = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "dtype": "bfloat16"}


def write(
    folder: Path,
    weights: Mapping[str, Any],
    format: str,
    plain: Mapping[str, Tensor] | None = None,
    *,
    left: Iterable[str] = ("lm_head",),
    shards: int = 1,
    **model: Any,
) -> Path:
    """A folder of weights in one format; ``left``: linears that its configuration leaves out."""
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = dict(plain or {})
    kinds: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        made, config = formats.write(weight, format, name)
        tensors |= made
        kinds.setdefault(json.dumps(config), config)
    assert len(kinds) == 1, f"several configurations: {kinds}"
    quantization = leave_out(next(iter(kinds.values())), weights, left)
    config = {**MODEL, **model}
    if "quantization" in quantization:
        (folder / "hf_quant_config.json").write_text(json.dumps(quantization))
    else:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    store(folder, tensors, shards)
    return folder


def store(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """Tensors in one file, or dealt out to several with an index."""
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
        return
    index = {}
    for place in range(shards):
        part = dict(list(whole.items())[place::shards])
        file = f"model-{place + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor, as safetensors itself reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, change: Any, file: str = "config.json") -> None:
    """Apply a function to a JSON file's content, in place."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def linear(N: int, K: int) -> Tensor:
    return torch.randn(N, K) / K**0.5
