"""Peers of the quantised linears: functions of ``(input [M, K] bf16, which)`` that give ``[M, N]``, in bf16 or float32.

Each packs copies of one weight as its owners want it, at its first call, and takes copy ``which``. What a runtime reads
and writes is float32: the conversion of a bf16 input is in its time (0.3% of it at 32 rows), none of the result is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_bench import runtimes
from m4ov_bench.peers.base import Absent, Peer
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight

Layer = Callable[[Tensor], Tensor]
EAGER = "F.linear bf16"
_INT8 = ("OpenVINO u4", "OpenVINO i8", "onnxruntime level 4", "zentorch W4A8", "zentorch W8A8", "_int_mm")
# By name, what a peer rounds its input to by itself, and so is judged by.
ROUNDS_TO = {name: "int8" for name in _INT8} | {"_scaled_mm": "fp8"}
_LARGEST_INT8, _LARGEST_FP8, _LEAST_SCALE = 127.0, 448.0, 2.0**-126


class Rotating:
    """A peer with ``copies`` packed weights, made by ``pack`` at the first call. The first call with so many rows goes
    to each copy: some pack, or compile, only then."""

    def __init__(self, pack: Callable[[], Layer], copies: int) -> None:
        self._pack, self._copies = pack, copies
        self._made: list[Layer] = []
        self._seen: set[torch.Size] = set()

    def __call__(self, input: Tensor, which: Tensor) -> Tensor:
        if not self._made:
            self._made = [self._pack() for _ in range(self._copies)]
        with torch.no_grad():
            if input.shape not in self._seen:
                self._seen.add(input.shape)
                for layer in self._made:
                    layer(input)
            return self._made[int(which) % self._copies](input)


def int4_linear(weight: Int4Weight, plain: Tensor, copies: int, own: bool = True) -> dict[str, Peer]:
    """``plain``: the weight in bf16. ``own``: with the runtimes and packages besides PyTorch."""
    group, (_, columns) = weight.group_size, weight.shape
    uneven = Absent(f"{columns} columns are no whole groups of {group}") if columns % group else None
    if weight.zeros is not None or weight.g_idx is not None:
        uneven = Absent("called here for symmetric weights without act-order")
    packs: dict[str, Callable[[], Layer]] = {"int4pack": lambda: _int4pack(weight)}
    if own:
        packs |= {
            "OpenVINO u4": lambda: _openvino(weight.packed, weight.scales, "u4"),
            "onnxruntime level 4": lambda: _matmul_nbits(weight, 4),
            "onnxruntime level 0": lambda: _matmul_nbits(weight, 0),
            "zentorch W4A8": lambda: _zentorch_int4(weight, "int8"),
            "zentorch W4A16": lambda: _zentorch_int4(weight, "bf16"),
        }
    return _eager(plain) | _made(packs, copies, uneven)


def int8_linear(weight: Int8Weight, plain: Tensor, copies: int, own: bool = True) -> dict[str, Peer]:
    packs: dict[str, Callable[[], Layer]] = {"_int_mm": lambda: _int_mm(weight)}
    if own:
        packs |= {
            "zentorch W8A8": lambda: _zentorch_int8(weight),
            "OpenVINO i8": lambda: _openvino(weight.codes, weight.scales, "i8"),
        }
    return _eager(plain) | _made(packs, copies)


def fp8_linear(weight: Fp8Weight, plain: Tensor, copies: int, slow: bool = True) -> dict[str, Peer]:
    """``slow``: with the one that takes seconds."""
    packs: dict[str, Callable[[], Layer]] = {"dequantised in each call": lambda: _dequantised(weight)}
    peers = _eager(plain) | _made(packs, copies)
    scaled = _made({"_scaled_mm": lambda: _scaled_mm(weight)}, 1)  # seconds a call: nothing is left in a cache
    return peers | (scaled if slow else {"_scaled_mm": Absent("left out of the short run")})


def _made(packs: Mapping[str, Callable[[], Layer]], copies: int, absent: Absent | None = None) -> dict[str, Peer]:
    return {name: absent or _missing(name) or Rotating(pack, copies) for name, pack in packs.items()}


def _missing(name: str) -> Absent | None:
    package = name.split()[0].lower()
    reason = None
    if package == "zentorch":
        reason = runtimes.zentorch_missing()
    elif package in ("openvino", "onnxruntime"):
        reason = runtimes.missing(package) or (runtimes.missing("onnx") if package == "onnxruntime" else None)
    return None if reason is None else Absent(reason)


def _eager(plain: Tensor) -> dict[str, Peer]:
    """What a weight that is not quantised costs: its bytes are many, so that two copies do."""

    def pack() -> Layer:
        weight = plain.clone()
        return lambda input: F.linear(input, weight)

    return {EAGER: Rotating(pack, 2)}


def _signed(weight: Int4Weight) -> Tensor:
    """Codes around 0: int8 ``[N, K]`` of -8..7."""
    return weight.codes().to(torch.int8) - 8


def _int4pack(weight: Int4Weight) -> Layer:
    """PyTorch's own: (q - 8)·scale + zero, in bf16."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes().int(), 1)
    scales = weight.scales.bfloat16().t()
    scales = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()  # [G, N, 2]
    return lambda input: torch.ops.aten._weight_int4pack_mm_for_cpu(input, packed, weight.group_size, scales)


def _matmul_nbits(weight: Int4Weight, level: int) -> Layer:
    """onnxruntime's ``MatMulNBits``: level 4 rounds the input to int8 by blocks of a group, level 0 keeps float32."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    (rows, columns), group = weight.shape, weight.group_size
    groups = columns // group
    codes = helper.make_tensor(
        "codes", TensorProto.UINT8, [rows, groups, group // 2], weight.packed.numpy().tobytes(), raw=True
    )
    scales = helper.make_tensor(
        "scales", TensorProto.FLOAT, [rows * groups], weight.scales.float().numpy().tobytes(), raw=True
    )
    options = {"K": columns, "N": rows, "bits": 4, "block_size": group, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **options)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", size])
        for name, size in (("x", columns), ("y", rows))
    ]
    graph = helper.make_graph([node], "peer", ends[:1], ends[1:], [codes, scales])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # or it would spin in the others' time
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def run(input: Tensor) -> Tensor:
        input, result = input.float(), torch.empty(input.shape[0], rows)
        binding = session.io_binding()
        for bind, name, tensor in ((binding.bind_input, "x", input), (binding.bind_output, "y", result)):
            bind(name, "cpu", 0, TensorProto.FLOAT, list(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)
        return result

    return run


def _openvino(codes: Tensor, scales: Tensor, kind: str) -> Layer:
    """A compressed constant before a matrix product, the input rounded to int8 by groups of 128. ``kind``: ``"u4"``,
    two codes a byte around 8, or ``"i8"``."""
    import openvino as ov
    from openvino import opset13 as ops

    rows, groups = scales.shape
    columns = codes.shape[1] * (2 if kind == "u4" else 1)
    shape = [rows, groups, columns // groups] if groups > 1 else [rows, columns]
    small = [rows, groups, 1] if groups > 1 else [rows, 1]
    held: list[Any] = [codes.numpy().copy()]  # OpenVINO reads them where they lie

    def constant(values: Any, sizes: list[int], type_name: str) -> Any:
        return ops.constant(ov.Tensor(values, ov.Shape(sizes), getattr(ov.Type, type_name)), shared_memory=True)

    weight = ops.convert(constant(held[0], shape, kind), "f32")
    if kind == "u4":
        held.append(torch.full((rows * groups // 2,), 0x88, dtype=torch.uint8).numpy())
        weight = ops.subtract(weight, ops.convert(constant(held[1], small, "u4"), "f32"))
    weight = ops.multiply(weight, ops.constant(scales.float().view(small).numpy()))
    if groups > 1:
        weight = ops.reshape(weight, ops.constant([rows, columns], ov.Type.i64), False)
    input = ops.parameter([-1, columns], ov.Type.f32)
    model = ov.Model([ops.matmul(input, weight, False, True)], [input])
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(input: Tensor, held: Any = held) -> Tensor:
        input, result = input.float(), torch.empty(input.shape[0], rows)
        request.set_input_tensor(ov.Tensor(input.numpy(), shared_memory=True))
        request.set_output_tensor(ov.Tensor(result.numpy(), shared_memory=True))
        request.infer()
        return result

    return run


def _zentorch_int4(weight: Int4Weight, activation: str) -> Layer:
    import zentorch  # noqa: F401  (registers the operators)

    packed = torch.ops.zentorch.zentorch_woq_repack_weight(_signed(weight))  # int32 [N, K / 8]
    by_group = weight.scales.t().contiguous()  # [G, N]
    if activation == "int8":
        return lambda input: torch.ops.zentorch.zentorch_dynamic_qlinear(input, packed, by_group)
    turned = packed.t()
    return lambda input: torch.ops.zentorch.zentorch_woq_linear(input, turned, by_group, None)


def _zentorch_int8(weight: Int8Weight) -> Layer:
    import zentorch  # noqa: F401  (registers the operators)

    codes, scales = weight.codes.clone(), weight.scales.flatten()
    return lambda input: torch.ops.zentorch.zentorch_dynamic_qlinear(input, codes, scales)


def _by_row(input: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """The input over its scale, not rounded yet, and the scale ``[M, 1]``."""
    wide = input.float()
    scale = (wide.abs().amax(1, keepdim=True) / largest).clamp_min(_LEAST_SCALE)
    return wide / scale, scale


def _int_mm(weight: Int8Weight) -> Layer:
    """PyTorch's int8 product, and the quantisation and scaling around it by eager operators."""
    codes, scales = weight.codes.clone().t(), weight.scales.float().t()

    def run(input: Tensor) -> Tensor:
        scaled, scale = _by_row(input, _LARGEST_INT8)
        return (torch._int_mm(scaled.round_().to(torch.int8), codes).float().mul_(scale).mul_(scales)).to(input.dtype)

    return run


def _scaled_mm(weight: Fp8Weight) -> Layer:
    """PyTorch's fp8 product, of an input that is rounded to e4m3 by rows."""
    values, scales = weight.values.t(), weight.scales.float().t()  # [K, N]; [1, N]

    def run(input: Tensor) -> Tensor:
        scaled, scale = _by_row(input, _LARGEST_FP8)
        return torch._scaled_mm(scaled.to(torch.float8_e4m3fn), values, scale, scales, out_dtype=input.dtype)

    return run


def _dequantised(weight: Fp8Weight) -> Layer:
    """What an fp8 checkpoint costs without kernels for it."""
    held = Fp8Weight.from_state_dict({name: value.clone() for name, value in weight.state_dict().items()})
    return lambda input: F.linear(input, held.dequantize(input.dtype))
