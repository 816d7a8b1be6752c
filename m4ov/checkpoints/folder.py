"""A checkpoint as its files have it: configuration, tensors by name, and which of them make a quantised weight. Headers
are read when it is opened, values one module at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from m4ov.checkpoints import config as configs
from m4ov.checkpoints.names import is_embedding
from m4ov.models.safetensors_file import DTYPES, unique
from m4ov.models.sharded import INDEX, SINGLE, Stored, WeightsError, held, some, stored
from m4ov_kernels.gemm import weights as formats
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight
from m4ov_kernels.gemm.weights.formats.fields import LEAVES

Weight = Int4Weight | Int8Weight | Fp8Weight
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A static scale of activations or of the KV cache may stand beside a weight that is not quantised.
_SIGNS = LEAVES - {"weight"} - {leaf for leaf in LEAVES if leaf.startswith("input_")}
_REFUSED = (
    "a pickle, which can run any program when it is loaded, so that it is not opened here. Take the publisher's "
    "safetensors, or convert it where nothing can be lost: transformers' from_pretrained(…), then save_pretrained(…)"
)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that headers and configuration say.

    Attributes:
        folder: its files' folder.
        config: of config.json; empty where there is none.
        quantization: the configuration of its quantised weights, as :func:`m4ov_kernels.gemm.weights.read` takes it;
            empty: there is none.
        said_by: where that stands.
        tensors: every tensor by name.
        notes: what is odd about the folder and harms nothing.
    """

    folder: Path
    config: dict[str, Any]
    quantization: dict[str, Any]
    said_by: str
    tensors: dict[str, Stored]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def modules(self) -> dict[str, dict[str, Stored]]:
        """Module → its tensors by full name, for each whose weight is in the tensors of a quantised format; the bias is
        none of them. In the order of the files."""
        found: dict[str, dict[str, Stored]] = {}
        for key, tensor in self.tensors.items():
            module, _, leaf = key.rpartition(".")
            whole = leaf == "weight" and (tensor.dtype not in _FLOATS)
            if leaf in _SIGNS or whole:
                found.setdefault(module, {})
        for key, tensor in self.tensors.items():
            module, _, leaf = key.rpartition(".")
            if module in found and leaf in LEAVES:
                found[module][key] = tensor
        return found

    @cached_property
    def plain(self) -> dict[str, Stored]:
        """Every other tensor."""
        taken = {key for tensors in self.modules.values() for key in tensors}
        return {key: tensor for key, tensor in self.tensors.items() if key not in taken}

    @cached_property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """Linears that are not quantised, by module, with [N, K]: matrices called ``weight`` that are no embeddings."""
        found: dict[str, tuple[int, ...]] = {}
        for key, tensor in self.plain.items():
            module, _, leaf = key.rpartition(".")
            if leaf == "weight" and len(tensor.shape) == 2 and not is_embedding(module):
                found[module] = tensor.shape
        return found

    def left(self) -> list[str]:
        """What a configuration has to leave out: the linears that are not quantised, and a head that is the embeddings
        and so is not there."""
        head = [] if "lm_head" in self.modules else ["lm_head"]
        return sorted({*self.linears, *head})

    def read(self, module: str) -> Weight:
        """A quantised weight, checked against its configuration and its other tensors.

        Raises:
            WeightsError: it is not as its format has it; names file and tensor.
        """
        tensors = self.modules[module]
        where = ", ".join(sorted({str(tensor.path) for tensor in tensors.values()}))
        if not self.quantization:
            kinds = ", ".join(f"{key} is {str(t.dtype).removeprefix('torch.')}" for key, t in list(tensors.items())[:3])
            raise WeightsError(f"{where}: {kinds}, and {self.folder} has no configuration of a quantisation")
        try:
            return formats.read({key: tensor.read() for key, tensor in tensors.items()}, self.quantization, module)
        except (TypeError, ValueError) as error:
            named = "" if module in str(error) else f"{module}: "
            raise WeightsError(f"{where}: {named}{error}") from None

    def format_of(self, module: str) -> str:
        """The name of the format of a quantised module, by headers and configuration alone.

        Raises:
            TypeError, ValueError: see :func:`m4ov_kernels.gemm.weights.detect`.
        """
        tensors = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in self.modules[module].items()}
        return formats.detect(tensors, self.quantization, module)

    @property
    def tied(self) -> bool:
        """Whether the configuration ties the head to the embeddings."""
        text = self.config.get("text_config")
        tied = self.config.get("tie_word_embeddings")
        return bool(text.get("tie_word_embeddings") if tied is None and isinstance(text, dict) else tied)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Of a folder, or of one safetensors file beside its config.json.

    Raises:
        WeightsError: there are no safetensors (pickles are refused by name), a file is missing or damaged, files, index
            and headers do not say the same, or a configuration is not JSON.
    """
    path = Path(path)
    if path.name.endswith(PICKLES):
        raise WeightsError(f"{path}: {_REFUSED}")
    if path.is_dir():
        folder, tensors = path, _tensors(path)
    elif path.is_file():
        folder, tensors = path.parent, held(path, DTYPES.values())
    else:
        raise WeightsError(f"{path}: there is no such folder or file")
    config = _json(folder / "config.json") or {}
    said_by, quantization, notes = _quantization(folder, config)
    files = {tensor.path.name for tensor in tensors.values()}
    pickles = sorted(file.name for file in folder.iterdir() if file.name.endswith(PICKLES))
    others = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in files)
    if pickles:
        notes.append(f"pickles beside the safetensors, which nothing here opens: {some(pickles)}")
    if others and path.is_dir():
        notes.append(f"safetensors that {INDEX if len(files) > 1 else SINGLE} does not reach: {some(others)}")
    if not config:
        notes.append("there is no config.json")
    return Checkpoint(folder, config, quantization, said_by, tensors, notes)


def _tensors(folder: Path) -> dict[str, Stored]:
    alone = sorted(folder.glob("*.safetensors"))
    if not alone and not (folder / INDEX).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.name.endswith(PICKLES))
        if pickles:
            raise WeightsError(f"{folder / pickles[0]}: {_REFUSED}")
    if len(alone) == 1 and not (folder / INDEX).is_file():
        return held(alone[0], DTYPES.values())  # by whatever name
    return stored(folder, DTYPES.values())


def _quantization(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    notes: list[str] = []
    inside = configs.quantization_of(config)
    for file, method in configs.FILES.items():
        found = _json(folder / file)
        if not found:
            continue
        if inside is None:
            return file, found if method == "modelopt" else {"quant_method": method, **found}, notes
        if method == "modelopt":  # it says the group size, which config.json does not
            ours = str(inside[1].get("quant_algo")).upper()
            theirs = found.get("quantization")
            theirs = str(theirs.get("quant_algo") if isinstance(theirs, dict) else None).upper()
            if theirs != ours:
                notes.append(f"{file} says quant_algo {theirs}, {inside[0]} says {ours}; the former is taken")
            return file, found, notes
        notes.append(f"{file} is there, and {inside[0]}, which is taken")
    return (*inside, notes) if inside is not None else ("", {}, notes)


def _json(path: Path) -> dict[str, Any] | None:
    """A file's object; ``None``: there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read ({error})") from None
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: unique(pairs, "name"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: expected an object, got {type(found).__name__}")
    return found
