"""What makes a peer: a callable, or an ``Absent`` with the reason why it cannot run here."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import runtimes


class Absent(str):
    """Why a peer is not there."""

    __slots__ = ()


Peer = Callable[..., Any] | Absent
Compiled = bool | str  # True: with torch.compile; a text: why not


def compiled_peer(function: Callable[..., Any], compiled: Compiled) -> Peer:
    if isinstance(compiled, str):
        return Absent(compiled)
    if not compiled:
        return Absent("not measured in this case")
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return Absent("torch.compile needs a C++ compiler on the CPU")
    return torch.compile(function, dynamic=False)


def transformers_module(module: str) -> Any:
    if importlib.util.find_spec("transformers") is None:
        return Absent("transformers is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return Absent(f"{module} cannot be imported: {error}")


def runtime_peers(
    function: Callable[..., Tensor], nodes: list[Any], names: list[str], compiled: Compiled, scalar: bool = False
) -> dict[str, Peer]:
    """Inference runtimes: the function for those that convert PyTorch, the ONNX nodes for the other. The result is
    shaped as the first tensor, or a float32 ``scalar``."""

    def output(first: Tensor, *_: Tensor) -> Tensor:
        return first.new_empty((), dtype=torch.float32) if scalar else torch.empty_like(first)

    if compiled is not True:
        reason = compiled or "not measured in this case"
        return {name: Absent(reason) for name in ("onnxruntime", "OpenVINO", "zentorch")}
    made = {
        "onnxruntime": runtimes.onnxruntime(nodes, names, output),
        "OpenVINO": runtimes.openvino(function, output),
        "zentorch": runtimes.zentorch(function),
    }
    return {name: Absent(peer) if isinstance(peer, str) else peer for name, peer in made.items()}
