"""Weights in and out: Hugging Face's folders, sharded or not, one tensor in memory at a time.

Parameters have Hugging Face's names, so nothing is renamed. Two things differ between folders:

- A tied head is stored once (as the embedding), or twice.
- Experts. Published checkpoints, and the engines that read them, have ``gate_up_proj`` as ``[E, H, 2·I]`` and
  ``down_proj`` as ``[E, I, H]``; transformers 5 has, and writes, the transposes, and tells by their shapes what it
  reads. Both are read here, and the published layout is written; except where a matrix is square, which
  transformers would take for its own: then that is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m4ov.models.qwen3_vl.config import Config, ConfigurationError, TextConfig
from m4ov.models.qwen3_vl.model import Qwen3VL
from m4ov.models.sharded import Stored, WeightsError, some, stored, whole, write

_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
SHARD_BYTES = 5 * 2**30


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter of a model, in its order; a tied head is none."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Qwen3VL(config).named_parameters()}


def configuration(folder: Path | str) -> Config:
    """Of a folder's ``config.json``.

    Raises:
        WeightsError: there is none, or it is of another model.
    """
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Config.from_dict(found)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    except ConfigurationError as error:
        raise WeightsError(f"{path}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not a configuration ({error})") from None


def read(folder: Path | str, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Name and value, mapped from its file, of every parameter of a model, in its order, each read when it is asked
    for. Before the first everything has been checked that headers say.

    Raises:
        WeightsError: a shard or tensor is missing, one is there that the model has not, or has another shape.
    """
    found = _checked(Path(folder), config)
    return ((name, part.read().transpose(1, 2) if turned else part.read()) for name, (part, turned) in found.items())


def load(model: Qwen3VL, folder: Path | str) -> None:
    """Read a folder's weights into a model, converted to the dtype that its parameters have.

    All or nothing: whatever can be wrong with a folder is found before the first weight is changed.

    Raises:
        WeightsError: the folder is of another model or not whole; see :func:`read`.
        ValueError: the model's parameters are on the meta device.
    """
    parameters = dict(model.named_parameters())
    empty = [name for name, parameter in parameters.items() if parameter.is_meta]
    if empty:
        raise ValueError(f"load: {some(empty)} on the meta device; model.to_empty(device=…) first")
    _same(Path(folder), configuration(folder), model.config)
    with torch.no_grad():
        for name, value in read(folder, model.config):
            parameters[name].copy_(value)


def from_pretrained(
    folder: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Qwen3VL:
    """A model with a folder's configuration and weights, in training mode.

    Args:
        dtype: of the parameters; ``None``: of the files (the widest, where they have several).

    Raises:
        WeightsError: see :func:`load`.
    """
    config = configuration(folder)
    parts = [part for part, _ in _checked(Path(folder), config).values()]
    if dtype is None:
        dtype = parts[0].dtype
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
    with torch.device("meta"):
        model = Qwen3VL(config)
    model.to(dtype).to_empty(device=device)
    load(model, folder)
    return model


def save(
    model: Qwen3VL, folder: Path | str, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model's configuration and weights into a new folder that ``from_pretrained`` reads, transformers' too.
    It appears whole or not at all.

    Args:
        dtype: of the files; ``None``: of the head's weight.
        shard_bytes: of one file, at most, unless one tensor is larger.

    Raises:
        WeightsError: the folder is there already and not empty, or cannot be written.
    """
    dtype = model.lm_head.weight.dtype if dtype is None else dtype
    export(model.config, model.named_parameters(), folder, dtype=dtype, shard_bytes=shard_bytes)


def export(
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path | str,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """:func:`save` of tensors that come one after the other, named and ordered as :func:`shapes` has them: of a model
    that is sharded, each gathered when it is asked for.

    Raises:
        WeightsError: a tensor has another name or shape; and as for :func:`save`.
    """
    expected = shapes(config)
    turned = {name for name in expected if _of_experts(name)} if _square(config.text) is None else set()
    written = {name: _turn(shape) if name in turned else shape for name, shape in expected.items()}

    def stream() -> Iterator[Tensor]:
        found = iter(tensors)
        for name in expected:
            given, tensor = next(found, (None, None))
            if given != name or tensor is None:
                raise WeightsError(f"{folder}: expected {name}, got {given or 'no more tensors'}")
            yield tensor.transpose(1, 2) if name in turned else tensor

    with whole(Path(folder)) as temporary:
        write(temporary, written, stream(), dtype, shard_bytes)
        _write_json(temporary / "config.json", config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")})
        tokens = {name: getattr(config.text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if any(token is not None for token in tokens.values()):
            generation = {name: token for name, token in tokens.items() if token is not None}
            _write_json(temporary / "generation_config.json", generation)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _same(folder: Path, found: Config, config: Config) -> None:
    """A folder of another model is refused by what differs, not by the first tensor that does not fit."""
    theirs, ours = _flat(found.to_dict()), _flat(config.to_dict())
    skipped = ("initializer_range", "max_position_embeddings", "router_aux_loss_coef", "_token_id")
    differing = [
        f"{name} ({theirs.get(name)} there, {ours.get(name)} here)"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name) and not name.endswith(skipped)
    ]
    if differing:
        raise WeightsError(f"{folder}: is of another model: {some(differing)}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _checked(folder: Path, config: Config) -> dict[str, tuple[Stored, bool]]:
    """Of every parameter, where it is stored and whether its last two dimensions are the other way round."""
    expected, found = shapes(config), stored(folder)
    missing = [name for name in expected if name not in found]
    if missing:
        raise WeightsError(f"{folder}: {some(missing)} missing: {len(missing)} of {len(expected)} tensors")
    extra = [name for name in found if name not in expected and not (config.tie_word_embeddings and name == _HEAD)]
    if extra:
        raise WeightsError(f"{folder}: {some(extra)} there, and the model has none of that name")
    turned = _published(config.text, found)
    made = {}
    for name, shape in expected.items():
        other = turned and _of_experts(name)
        if found[name].shape != (_turn(shape) if other else shape):
            raise WeightsError(f"{folder}: {name}: expected {list(shape)}, got {list(found[name].shape)}")
        made[name] = (found[name], other)
    if config.tie_word_embeddings and _HEAD in found:
        _check_tied(folder, found[_HEAD], found[_EMBEDDING])
    return made


def _check_tied(folder: Path, head: Stored, embedding: Stored) -> None:
    """A tied head that is stored too must be the embedding."""
    equal = head.shape == embedding.shape
    step = max(1, 2**20 // embedding.shape[-1])
    for begin in range(0, embedding.shape[0], step):
        equal = equal and torch.equal(head.rows(begin, begin + step), embedding.rows(begin, begin + step))
    if not equal:
        raise WeightsError(f"{folder}: {_HEAD} is not {_EMBEDDING}, and tie_word_embeddings says that it is")


def _of_experts(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _turn(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _square(config: TextConfig) -> str | None:
    """The experts' matrix, if any, of which the shape says nothing about the layout; the other's then does."""
    if config.hidden_size == 2 * config.moe_intermediate_size:
        return "gate_up_proj"
    return "down_proj" if config.hidden_size == config.moe_intermediate_size else None


def _published(config: TextConfig, found: dict[str, Stored]) -> bool:
    """Whether experts are stored as in published checkpoints. One matrix may be square, never both."""
    telling = ".experts.down_proj" if _square(config) == "gate_up_proj" else ".experts.gate_up_proj"
    rows = config.hidden_size if telling == ".experts.gate_up_proj" else config.moe_intermediate_size
    return any(name.endswith(telling) and part.shape[1:2] == (rows,) for name, part in found.items())
