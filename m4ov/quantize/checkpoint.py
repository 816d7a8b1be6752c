"""A quantised checkpoint: written in one piece, held against the model's modules, and loaded again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from m4ov.checkpoints.config import copy_rest, edited, experts_of, leave_out
from m4ov.checkpoints.names import part_of
from m4ov.quantize.linears import linears_of
from m4ov.quantize.schemes import Scheme, Weight
from m4ov_kernels.gemm import weights as formats
from m4ov_kernels.nn import Fp8Linear, Int4Linear, Int8Linear

# Tensors that only a quantised weight has, in the formats that are written here.
_LEAVES = ("weight_packed", "weight_scale", "weight_scale_inv")
_MODULES: dict[type, Any] = {
    formats.Int4Weight: Int4Linear,
    formats.Int8Weight: Int8Linear,
    formats.Fp8Weight: Fp8Linear,
}


class QuantizedCheckpointError(ValueError):
    """A checkpoint is not what its configuration says; the message names the module."""


def module_of(weight: Weight, linear: nn.Linear) -> nn.Module:
    """The module that computes with a quantised weight in place of a linear, whose bias and dtype it takes over."""
    return _MODULES[type(weight)](weight, linear.bias, compute_dtype=linear.weight.dtype)  # type: ignore[no-any-return]


def write(
    model: Any, quantized: Mapping[str, Weight], scheme: Scheme, source: Path, out: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """A folder that engines and :func:`load` read: the quantised weights, everything else in 16 bits, the tokenizer
    and processor of ``source``, and the configuration that says which module is what. It appears whole or not at all.

    Args:
        model: unquantised, its other weights as they are to be written (rounded to ``dtype``).
        quantized: module name → weight.

    Returns:
        The ``quantization_config``.

    Raises:
        FileExistsError: ``out`` is there already.
        QuantizedCheckpointError: what was written does not hold against the modules' names.
    """
    if out.exists():
        raise FileExistsError(f"--out: {out} exists already; remove it, or choose another")
    state = {
        name: value.to(dtype) if isinstance(value, nn.Parameter) and value.is_floating_point() else value
        for name, value in model.state_dict(keep_vars=True).items()
    }
    config: dict[str, Any] = {}
    for name, weight in quantized.items():
        del state[f"{name}.weight"]
        tensors, fragment = formats.write(weight, scheme.format, name)
        assert fragment == (config or fragment), name  # one scheme for all
        state |= tensors
        config = fragment
    left = [name for name in linears_of(model) if name not in quantized]
    experts = experts_of({name: tuple(value.shape) for name, value in model.named_parameters()})
    config = leave_out(config, quantized, left, experts)
    temporary = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        # In the layout that engines know: transformers stores a mixture's experts transposed.
        moe = "moe" in model.config.model_type
        model.save_pretrained(temporary, state_dict=state, save_original_format=moe)
        copy_rest(source, temporary)
        written = json.loads((source / "config.json").read_text(encoding="utf-8"))
        untied = model.lm_head.weight is not model.get_input_embeddings().weight
        written = edited(written, dtype, untied) | {"quantization_config": config}
        (temporary / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        verify(temporary, model, read(temporary, tensors_of(temporary)), quantized)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return config


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's safetensors files, mapped, not read.

    Raises:
        QuantizedCheckpointError: there is no such file, or one is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= _tensors_of(path)
    if not found:
        raise QuantizedCheckpointError(f"{folder}: expected .safetensors files; it has none")
    return found


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise QuantizedCheckpointError(f"{path}: not a safetensors file ({error})") from None


def ignored(config: Mapping[str, Any], name: str) -> bool:
    """Whether a ``quantization_config`` leaves a module unquantised."""
    return any(excludes(name) for excludes in formats.exclusions(config).values())


def verify(
    folder: Path, model: nn.Module, weights: Mapping[str, Weight], quantized: Iterable[str] | None = None
) -> None:
    """Hold a checkpoint against the model's modules: each linear is quantised in the files or left out by the
    configuration, and not both, and each weight has its module's shape.

    Args:
        model: with its linears as they were before they were replaced.
        weights: what the files hold (:func:`read`), by module.
        quantized: the modules that must be quantised, and no others; ``None``: whatever the configuration says.

    Raises:
        QuantizedCheckpointError: otherwise; a tower that is silently quantised, or silently not, is this.
    """
    config, linears = _quantization_config(folder), linears_of(model)
    wanted = None if quantized is None else set(quantized)
    for name in sorted(set(weights) - set(linears)):
        raise QuantizedCheckpointError(f"{folder}: {name} is quantised, and the model has no linear of that name")
    for name, linear in linears.items():
        where, left = f"{folder}: {name} ({part_of(name)})", ignored(config, name)
        if name in weights and left:
            raise QuantizedCheckpointError(f"{where} is quantised, and the ignore list names it")
        if name not in weights and not left:
            raise QuantizedCheckpointError(f"{where} is not quantised, and the ignore list does not name it")
        if wanted is not None and (name in weights) != (name in wanted):
            raise QuantizedCheckpointError(f"{where} was written {'not ' if name in wanted else ''}quantised")
        if name in weights and weights[name].shape != linear.weight.shape:
            raise QuantizedCheckpointError(
                f"{where}: expected {list(linear.weight.shape)}; got {list(weights[name].shape)}"
            )


def read(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """The quantised weights in a checkpoint's tensors, by module.

    Raises:
        QuantizedCheckpointError: one is not as its format has it.
    """
    config = _quantization_config(folder)
    names = sorted({key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] in _LEAVES})
    return {name: _read(folder, tensors, config, name) for name in names}


def _read(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Weight:
    try:
        return formats.read(tensors, config, name)
    except (TypeError, ValueError) as error:
        raise QuantizedCheckpointError(f"{folder}: {name}: {error}") from error


def _quantization_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantizedCheckpointError(f"{folder}: config.json: {error.strerror}") from error
    except ValueError as error:
        raise QuantizedCheckpointError(f"{folder}: config.json: not JSON ({error})") from error
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise QuantizedCheckpointError(f"{folder}: config.json has no quantization_config; this model is not quantised")
    return found


def is_quantized(folder: Path) -> bool:
    """Whether a checkpoint's configuration says that it is quantised."""
    try:
        _quantization_config(folder)
    except QuantizedCheckpointError:
        return False
    return True


def load(folder: Path | str, *, dtype: torch.dtype | None = None) -> Any:
    """A quantised checkpoint as the Hugging Face model of its class, its quantised linears as modules of
    ``m4ov_kernels.nn``; in eval mode. ``m4ov_kernels.patch`` may follow.

    Args:
        folder: written by ``m4ov quantize``, or by another program in a format of ``m4ov_kernels.gemm.weights`` with
            transformers' names.
        dtype: of the weights that are not quantised; ``None``: the configuration's.

    Raises:
        QuantizedCheckpointError: files, configuration and the model's modules do not agree.
    """
    folder = Path(folder)
    _quantization_config(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    name = (config.architectures or ["?"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise QuantizedCheckpointError(f"{folder}: config.json: transformers has no class {name}")
    tensors = tensors_of(folder)
    weights = read(folder, tensors)
    dtype = dtype or config.dtype or torch.bfloat16
    state = {key: value for key, value in tensors.items() if not _of_weight(key, weights)}
    # One zero seen as a whole matrix: transformers finds a weight for every linear, and none takes memory.
    state |= {f"{name}.weight": torch.zeros((), dtype=dtype).expand(w.shape) for name, w in weights.items()}
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            found = ", ".join(map(str, sorted(info[problem])[:4]))
            raise QuantizedCheckpointError(f"{folder}: {problem.replace('_', ' ')}: {found}")
    verify(folder, model, weights)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    for name, weight in weights.items():
        replace(model, name, module_of(weight, model.get_submodule(name)))
    return model.eval()


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another stands."""
    above, _, own = name.rpartition(".")
    setattr(model.get_submodule(above), own, module)


def _of_weight(key: str, weights: Mapping[str, Weight]) -> bool:
    module, _, leaf = key.rpartition(".")
    return module in weights and leaf != "bias"
