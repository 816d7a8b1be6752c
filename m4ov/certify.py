"""``m4ov certify ROLLOUT TRAIN``: how far apart the log-probabilities of two programs are, from files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = (".safetensors", ".npy", ".jsonl")
_DESCRIPTION = """\
FILE[:KEY] is a .safetensors or .npy file with a tensor [T] or [B, T], or a .jsonl file with a sequence a line, such as
{"logprobs": [-0.1, -2.5]}, of any lengths. KEY names the tensor or the field (a .npy file has none); without it, it is
"logprobs", "mask", "cu_seqlens" or "token_types"."""


class Source(NamedTuple):
    path: Path
    key: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("rollout", metavar="ROLLOUT", help="FILE[:KEY] with the sampler's log-probabilities")
    parser.add_argument("train", metavar="TRAIN", help="FILE[:KEY] with the trainer's, of the same tokens")
    parser.add_argument("--mask", metavar="FILE[:KEY]", help="1 for tokens that count (default: all)")
    parser.add_argument("--cu-seqlens", metavar="FILE[:KEY]", help="where in [T] each sequence begins, and the end")
    parser.add_argument("--token-types", metavar="FILE[:KEY]", help="0 text, 1 image, 2 video: for the classes")
    parser.add_argument("--bins", type=int, default=8, metavar="N", help="bins of positions (default: 8)")
    parser.add_argument("--clip-low", type=float, default=0.2, metavar="E", help="clipped below 1 - E (default: 0.2)")
    parser.add_argument("--clip-high", type=float, default=0.28, metavar="E", help="above 1 + E (default: 0.28)")
    parser.add_argument("--at-most", type=float, metavar="NATS", help="exit status 1 if any |Δ log-prob| is larger")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the certificate there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there (.png, .svg, .pdf)")


def sources(options: argparse.Namespace) -> dict[str, Source]:
    """Where each tensor is; needs no torch, so that a wrong name is answered at once."""
    keys = {"rollout": "logprobs", "train": "logprobs", "mask": "mask", "cu_seqlens": "cu_seqlens"}
    keys["token_types"] = "token_types"
    given = {name: getattr(options, name) for name in keys}
    return {name: _source(value, keys[name]) for name, value in given.items() if value is not None}


def _source(text: str, key: str) -> Source:
    path = Path(text)
    if not path.exists() and ":" in text:
        before, _, key = text.rpartition(":")
        path = Path(before)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: expected a file of {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return Source(path, key)


def execute(options: argparse.Namespace, found: dict[str, Source]) -> int:
    """Exit status 1: further apart than ``--at-most``, or (with it) not comparable: a NaN, no token."""
    from m4ov_kernels.numerics import certify

    tensors = {name: _load(name, source) for name, source in found.items()}
    lines = [(found[name].path, loaded.lengths) for name, loaded in tensors.items() if loaded.lengths is not None]
    for path, lengths in lines[1:]:
        _same_lengths(*lines[0], path, lengths)
    cu_seqlens = tensors["cu_seqlens"].values if "cu_seqlens" in tensors else None
    if lines:
        if cu_seqlens is not None:
            raise ValueError(f"--cu-seqlens: {lines[0][0]} has a sequence a line already")
        cu_seqlens = _cumulative(lines[0][1])
    certificate = certify(
        tensors["rollout"].values,
        tensors["train"].values,
        mask=tensors["mask"].values if "mask" in tensors else None,
        cu_seqlens=cu_seqlens,
        token_types=tensors["token_types"].values if "token_types" in tensors else None,
        position_bins=options.bins,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
    )
    print(certificate.text())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(certificate.as_json(), indent=1, ensure_ascii=False) + "\n")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        certificate.plot(options.plot)
    if options.at_most is None:
        return 0
    return int(certificate.first_nan is not None or not certificate.total.max_abs <= options.at_most)


class _Loaded(NamedTuple):
    values: Tensor
    lengths: list[int] | None = None  # of the sequences, where a file has one a line


def _load(name: str, source: Source) -> _Loaded:
    import numpy as np
    import torch

    path, key = source
    if path.suffix == ".jsonl":
        rows = _read_lines(path, key)
        dtype = torch.float64 if name in ("rollout", "train") else torch.int64
        try:
            values = [torch.tensor(row, dtype=dtype) for row in rows]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: field {key!r} must be a list of numbers in every line; {error}") from None
        if any(row.ndim != 1 for row in values):
            raise ValueError(f"{path}: field {key!r} must be a list of numbers in every line")
        return _Loaded(torch.cat([torch.empty(0, dtype=dtype), *values]), [len(row) for row in rows])
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
            return _Loaded(torch.from_numpy(array))
        except (TypeError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: not a .npy file of numbers; {error}") from None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if key not in names:
                raise ValueError(f"{path}: no tensor {key!r}; it has {', '.join(names) or 'none'}")
            return _Loaded(file.get_tensor(key))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a .safetensors file; {error}") from None


def _read_lines(path: Path, key: str) -> list[Any]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON; {error}") from None
        if not isinstance(record, dict) or key not in record:
            has = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{path}, line {number}: no field {key!r}; it has {has or 'none'}")
        value = record[key]
        if isinstance(value, list):  # a sampler's null is a log-probability that it does not know
            value = [float("nan") if item is None else item for item in value]
        rows.append(value)
    return rows


def _same_lengths(path: Path, lengths: list[int], other: Path, others: list[int]) -> None:
    if len(lengths) != len(others):
        raise ValueError(f"{path} has {len(lengths)} sequences, {other} has {len(others)}")
    for number, (length, own) in enumerate(zip(lengths, others, strict=True)):
        if length != own:
            raise ValueError(f"sequence {number} has {length} tokens in {path}, {own} in {other}")


def _cumulative(lengths: list[int]) -> Tensor:
    import torch

    return torch.tensor([0, *lengths]).cumsum(0)
