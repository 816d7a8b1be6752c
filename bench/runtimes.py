"""Inference runtimes as functions of torch tensors: onnxruntime, OpenVINO, zentorch. Forward only.

Each is called as its owners recommend for repeated calls of one shape: a session compiled once for static shapes, with
PyTorch's number of threads; inputs bound where they lie, without a copy; the output written to a fresh torch tensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

# float16 and bfloat16 tensors cross to OpenVINO as 16-bit integers of the same bytes: NumPy has no bfloat16.
_BYTES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.int64: torch.int64}


class Inference:
    """A peer without a backward. ``prepare(*tensors)`` compiles for their shapes and gives ``run(*tensors) -> Tensor``;
    it is called once for every tuple of shapes and dtypes."""

    def __init__(self, prepare: Callable[..., Callable[..., Tensor]]) -> None:
        self._prepare = prepare
        self._compiled: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        tensors = tuple(tensor.detach() for tensor in tensors)
        if any(tensor.device.type != "cpu" for tensor in tensors):
            raise ValueError("called here for CPU tensors only")
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key not in self._compiled:
            self._compiled[key] = self._prepare(*tensors)
        return self._compiled[key](*tensors)


def missing(package: str) -> str | None:
    """Why a package cannot be a peer, or ``None``."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed (m4ov[peers])"


def zentorch_missing() -> str | None:
    """Why zentorch cannot be a peer, or ``None``."""
    absent = missing("zentorch")
    if absent:
        return absent
    theirs, ours = metadata.version("zentorch").split(".")[:2], torch.__version__.split(".")[:2]
    return f"zentorch {'.'.join(theirs)} is built for that torch; this is {'.'.join(ours)}" if theirs != ours else None


def onnxruntime(nodes: list[tuple[Any, ...]], names: list[str], output: Callable[..., Tensor]) -> Inference | str:
    """A graph of ``(operator, inputs, outputs, attributes)`` whose last output is the result.

    ``names``: of the inputs; ``output(*tensors)``: an empty tensor for the result.
    """
    absent = missing("onnxruntime") or missing("onnx")
    if absent:
        return absent

    def prepare(*tensors: Tensor) -> Callable[..., Tensor]:
        import onnxruntime as ort
        from onnx import TensorProto, helper

        types = {
            torch.float32: TensorProto.FLOAT,
            torch.bfloat16: TensorProto.BFLOAT16,
            torch.float16: TensorProto.FLOAT16,
            torch.int64: TensorProto.INT64,
        }
        inputs = [
            helper.make_tensor_value_info(name, types[tensor.dtype], list(tensor.shape))
            for name, tensor in zip(names, tensors, strict=True)
        ]
        result = output(*tensors)
        last = nodes[-1][2][-1]
        outputs = [helper.make_tensor_value_info(last, types[result.dtype], list(result.shape))]
        made = [helper.make_node(kind, read, wrote, **attributes) for kind, read, wrote, attributes in nodes]
        graph = helper.make_graph(made, "peer", inputs, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def run(*tensors: Tensor) -> Tensor:
            binding = session.io_binding()
            for name, tensor in zip(names, tensors, strict=True):
                binding.bind_input(name, "cpu", 0, types[tensor.dtype], list(tensor.shape), tensor.data_ptr())
            result = output(*tensors)
            binding.bind_output(last, "cpu", 0, types[result.dtype], list(result.shape), result.data_ptr())
            session.run_with_iobinding(binding)
            return result

        return run

    return Inference(prepare)


def openvino(function: Callable[..., Tensor], output: Callable[..., Tensor]) -> Inference | str:
    """A function of tensors, converted and compiled for the CPU in the precision of its first argument."""
    absent = missing("openvino")
    if absent:
        return absent

    class Model(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return function(*tensors)

    def prepare(*tensors: Tensor) -> Callable[..., Tensor]:
        import openvino as ov

        types = {
            torch.float32: ov.Type.f32,
            torch.bfloat16: ov.Type.bf16,
            torch.float16: ov.Type.f16,
            torch.int64: ov.Type.i64,
        }

        def shared(tensor: Tensor) -> Any:
            raw = tensor.view(_BYTES[tensor.dtype]).numpy()
            return ov.Tensor(raw, ov.Shape(list(tensor.shape)), types[tensor.dtype])

        shapes = [(list(tensor.shape), types[tensor.dtype]) for tensor in tensors]
        model = ov.convert_model(Model().eval(), example_input=tensors, input=shapes)
        precision = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(tensors[0].dtype, "f32")
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

        def run(*tensors: Tensor) -> Tensor:
            result = output(*tensors)
            held = [shared(tensor) for tensor in (*tensors, result)]
            for place, tensor in enumerate(held[:-1]):
                request.set_input_tensor(place, tensor)
            request.set_output_tensor(held[-1])
            request.infer()
            return result

        return run

    return Inference(prepare)


def zentorch(function: Callable[..., Tensor]) -> Inference | str:
    """``torch.compile`` with AMD's backend, for inference."""
    absent = zentorch_missing()
    if absent:
        return absent

    def prepare(*tensors: Tensor) -> Callable[..., Tensor]:
        import zentorch  # noqa: F401  (registers the backend)

        compiled = torch.compile(function, backend="zentorch", dynamic=False)

        def run(*tensors: Tensor) -> Tensor:
            with torch.no_grad():
                return compiled(*tensors)

        return run

    return Inference(prepare)
