"""What ``KERNELS`` declares, and so what is locked, is what the launchers launch: types, divisibility, constants.

Launches are recorded instead of interpreted; what Triton would specialise on is read off their arguments.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m4ov_kernels import configs, gpu
from m4ov_kernels.activation import triton as activation
from m4ov_kernels.gemm import triton as gemm
from m4ov_kernels.gemm import triton_linear_builds, triton_linear_launches
from m4ov_kernels.gpu import FP_FUSION, Build
from m4ov_kernels.head import kl_state, triton_kl_builds, triton_logprob_builds, triton_logprob_launches
from m4ov_kernels.head import triton as head
from m4ov_kernels.moe import triton as moe
from m4ov_kernels.norm import triton as norm
from m4ov_kernels.rope import triton as rope
from m4ov_kernels.vision import triton as vision

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="records the interpreter's launches")
ROWS = 32
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", **gpu.DTYPES}
TYPES[torch.float8_e4m3fn] = "fp8e4nv"

Launch = tuple[str, tuple[str, ...], tuple[tuple[str, Any], ...], int, int]


def specialised(kernel: Any, name: str, value: Any) -> str:
    """The type that Triton compiles for, with ``/16`` where it knows of divisibility."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}" + ("/16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    if name in (kernel.kwargs["do_not_specialize"] or ()):
        return "i32"
    assert value != 1, f"{name}: Triton makes a constant of 1"
    return "i32/16" if value % 16 == 0 else "i32"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from triton.runtime.interpreter import InterpretedFunction

    seen: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS}
        assert options["enable_fp_fusion"] is FP_FUSION
        types = tuple(specialised(self, name, value) for name, value in zip(self.arg_names, args, strict=False))
        assert len(types) + len(kwargs) == len(self.arg_names)
        seen.append((self.__name__, types, tuple(sorted(kwargs.items())), options["num_warps"], options["num_stages"]))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return seen


def declared(build: Build) -> Launch:
    types = tuple(token.replace("T", build.dtype) for token in build.signature.split())
    constants = tuple(sorted(build.constexprs.items()))
    return build.kernel.__name__, types, constants, build.num_warps, build.num_stages


def launch_norm(dtype: torch.dtype) -> None:
    widths = {row.width for row in configs.rows_of("rms_norm_fwd", "cpu", gpu.DTYPES[dtype])} | {16384}
    for width, residual, numerics in itertools.product(widths, (False, True), ("hf", "vllm", "fp32")):
        x, weight = torch.empty(ROWS, width, dtype=dtype), torch.empty(width, dtype=dtype)
        _, _, rstd = norm.rms_norm_fwd(x, weight, x if residual else None, 1e-6, numerics)
        for need_weight in (False, True):
            norm.rms_norm_bwd(x, x if residual else None, x, weight, rstd, numerics, need_weight)

    widths = {row.width for row in configs.rows_of("layer_norm_fwd", "cpu", gpu.DTYPES[dtype])} | {16384}
    for width, residual, numerics in itertools.product(widths, (False, True), ("hf", "vllm", "fp32")):
        x, weight = torch.empty(ROWS, width, dtype=dtype), torch.empty(width, dtype=dtype)
        *_, mean, rstd = norm.layer_norm_fwd(x, weight, weight, x if residual else None, 1e-6, numerics)
        for need in (False, True):
            norm.layer_norm_bwd(x, x if residual else None, x, weight, mean, rstd, need, need)


def launch_activation(dtype: torch.dtype) -> None:
    widths = {row.width or 4096 for row in configs.rows_of("swiglu_fwd", "cpu", gpu.DTYPES[dtype])}
    for width, numerics in itertools.product(widths, ("hf", "vllm", "fp32")):
        dense = torch.empty(ROWS, width, dtype=dtype)
        halves = torch.empty(ROWS, 2 * width, dtype=dtype).chunk(2, -1)
        for gate, up in ((dense, dense), halves):
            activation.swiglu_fwd(gate, up, numerics)
            activation.swiglu_bwd(gate, gate, up, numerics)
            for approximate in ("tanh", "none"):
                activation.geglu_fwd(gate, up, approximate, numerics)
                activation.geglu_bwd(gate, gate, up, approximate, numerics)
                for bias in (None, torch.empty(width, dtype=dtype)):
                    activation.gelu_fwd(gate, bias, approximate)
                    activation.gelu_bwd(gate, gate, bias, approximate, bias is not None)


def launch_quantize(dtype: torch.dtype) -> None:
    widths = {row.width for row in configs.rows_of("quantize_rows", "cpu", gpu.DTYPES[dtype])} | {16384}
    for width in widths:
        x = torch.empty(ROWS, width, dtype=dtype)
        gemm.quantize_int8_fwd(x)
        for granularity, transposed in (("row", False), ("group", False), ("block", False), ("block", True)):
            gemm.quantize_fp8_fwd(x, granularity, transposed)
        for kind, numerics in itertools.product(("int8", "fp8"), ("hf", "vllm", "fp32")):
            gemm.swiglu_quantize_fwd(x, x, numerics, kind)
            gemm.rms_norm_quantize_fwd(x, torch.empty(width, dtype=dtype), None, 1e-6, numerics, kind)


def launch_head(dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:  # as on each architecture
        for tiles in (("cpu",), ("cpu",)), (("cpu",), ()), ((), ()):
            patch.setattr(triton_logprob_launches, "DESCRIPTORS", tiles[0])
            patch.setattr(triton_logprob_launches, "WIDE", tiles[1])
            launch_logprob(dtype)
            launch_kl(dtype)
        patch.setattr(gpu, "architecture", lambda device: "gfx942")  # which has tiles of its own
        launch_kl(dtype)


def launch_logprob(dtype: torch.dtype) -> None:
    hidden, weight = torch.empty(ROWS, 32, dtype=dtype), torch.empty(2048, 32, dtype=dtype)
    targets, vector, normalizer = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(2048), torch.zeros(2, ROWS)
    bias, row = vector.to(dtype), vector[:ROWS]
    variants = itertools.chain(triton_logprob_builds.FORWARDS.values(), triton_logprob_builds.BACKWARDS.values(), [()])
    for chosen in set(variants):
        given = (bias if "HAS_BIAS" in chosen else None, vector if "WEIGHTED" in chosen else None)
        scalars = (0.5 if "SCALED" in chosen else 1.0, 3.0 if "CAPPED" in chosen else 0.0)
        options = (*scalars, -100, None, "ROUNDED" in chosen)
        total, entropy = "TOTAL" in chosen, "CENTRED" in chosen
        top = int("LOGITS" in chosen)
        head.linear_logprob_fwd(hidden, weight, targets, *given, *options, entropy, total, top, 0, 2048, 0)
        saved = (normalizer, row, row[:0])
        grads = (row, None, row if "GENERAL" in chosen else None, None)
        needs = (True, True, "NEED_BIAS" in chosen)
        head.linear_logprob_bwd(hidden, weight, targets, *given, *saved, *grads, *options, 0, 2048, *needs)


def launch_kl(dtype: torch.dtype) -> None:
    heads = [torch.empty(rows, 32, dtype=dtype) for rows in (ROWS, 2048) * 2]
    normalizer, grad, bias = torch.zeros(5, ROWS), torch.zeros(ROWS), torch.zeros(2048, dtype=dtype)
    variants = [((), ""), *((chosen, "jsd" * ("JSD" in chosen)) for chosen in triton_kl_builds.FORWARDS.values())]
    variants += [(chosen, kl_state.KINDS[kind]) for kind, chosen in triton_kl_builds.BACKWARDS.values()]
    for chosen, kind in variants:
        biases = [bias if name in chosen else None for name in ("FIRST_BIAS", "SECOND_BIAS")]
        options = (None, kind or "reverse", 0.5 if "SCALED" in chosen else 1.0, None, "ROUNDED" in chosen)
        head.linear_kl_fwd(*heads, *biases, *options)
        given = (grad, *heads, *biases, options[0], normalizer, *options[1:])
        head.linear_kl_bwd(*given, True, True, "NEED_BIAS" in chosen)


def launch_rope(dtype: torch.dtype) -> None:
    ids, bounds = torch.zeros(2 * ROWS, dtype=torch.int64), torch.tensor([0, 2 * ROWS])
    grid = torch.ones(ROWS, 3, dtype=torch.int64)
    for types, intervals in itertools.product((None, ids, ids.int()), (None, torch.ones(ROWS))):
        rope.mrope_positions_fwd(ids, bounds, types, grid, grid, intervals, 1, 2, 1)
    widths = {row.width for row in configs.rows_of("qk_norm_mrope_fwd", "cpu", gpu.DTYPES[dtype])}
    for width, norms, rest in itertools.product(sorted(w for w in widths if w), (False, True), (False, True)):
        q, k = (torch.empty(ROWS, heads, width, dtype=dtype) for heads in (4, 2))
        weights = [torch.empty(width, dtype=dtype) if norms else None for _ in range(2)]
        rotary = width // 2 if rest else width
        for axes, numerics in itertools.product((1, 3), ("hf", "vllm", "fp32")):
            positions = torch.zeros((3, ROWS) if axes == 3 else (ROWS,), dtype=torch.int64)
            options = (positions, [rotary // 2, 0, 0] if axes == 3 else [], 1e4, 1e-6, True, rotary, numerics)
            rope.qk_norm_mrope_fwd(q, k, *weights, *options)
            for need in {False, norms}:
                rope.qk_norm_mrope_bwd(q, k, *((q, k) if norms else (None, None)), *weights, *options, need, need)


def launch_vision_rope(dtype: torch.dtype) -> None:
    widths = {row.width for row in configs.rows_of("vision_rope", "cpu", gpu.DTYPES[dtype])}
    for width, numerics in itertools.product(sorted(w for w in widths if w), ("hf", "fp32")):
        q, k = (torch.empty(ROWS, 4, width, dtype=dtype) for _ in range(2))
        for places in ((torch.tensor([[2, 4, 4]]), None), (None, torch.zeros(ROWS, 2, dtype=torch.int64))):
            for run in (vision.vision_rope_fwd, vision.vision_rope_bwd):
                run(q, k, *places, 2, 1e4, numerics)


def launch_vision(dtype: torch.dtype) -> None:
    launch_vision_rope(dtype)
    positions, grid_thw = torch.arange(ROWS // 2), torch.tensor([[1, 4, ROWS // 4]])
    widths = {row.width or 1152 for row in configs.rows_of("feature_rows_fwd", "cpu", gpu.DTYPES[dtype])}
    widths |= {row.width or 1152 for row in configs.rows_of("interpolate_fwd", "cpu", gpu.DTYPES[dtype])}
    for width in widths:
        x = torch.empty(ROWS, width, dtype=dtype)
        for forward in (vision.scatter_vision_fwd, vision.deepstack_add_fwd):
            forward(x, x[: ROWS // 2], positions)
        vision.scatter_vision_bwd(x, positions, True, True)
        table = torch.empty(48 * 48, width, dtype=dtype)
        for hidden, numerics in itertools.product((None, x), ("hf", "vllm", "fp32")):
            vision.interpolate_position_embeddings_fwd(table, grid_thw, hidden, ROWS, 2, numerics)
        vision.interpolate_position_embeddings_bwd(x, grid_thw, 48 * 48, 2)


def launch_gemm(dtype: torch.dtype) -> None:
    launch_quantize(dtype)
    with pytest.MonkeyPatch.context() as patch:  # as on each architecture
        for architecture in gpu.ARCHITECTURES:
            patch.setattr(gpu, "architecture", lambda device, name=architecture: name)
            for processors in (1, 64):  # K in one part, and in several where there are few rows
                patch.setattr(triton_linear_launches, "_processors", lambda device, count=processors: count)
                for mode, rows in itertools.product(triton_linear_builds.MODES.values(), (16, 64, 128)):
                    launch_mode(dtype, rows, *mode)
        patch.setattr(gpu, "architecture", lambda device: "sm_90")
        patch.setattr(triton_linear_launches, "DESCRIPTORS", ())  # where no descriptor serves a call
        for mode in triton_linear_builds.MODES.values():
            launch_mode(dtype, 128, *mode)
    for note, (_, scales, options) in triton_linear_builds.DEQUANTIZED.items():
        kind = note.replace(",", " ").split()[0]
        tensors = gemm_weight(kind, 128 if kind == "int4" or "block" in note else None, 1024)
        zeros = torch.empty(256, 8, dtype=torch.uint8) if options["ZEROS"] else None
        order = torch.zeros(1024, dtype=torch.int32) if options["ORDERED"] else None
        assert f"*{TYPES[tensors[1].dtype]}/16" == scales
        gemm.quantized_linear_bwd(torch.empty(ROWS, 256, dtype=dtype), *tensors, zeros, order, kind, 1024, 128)


def gemm_weight(kind: str, group: int | None, width: int) -> tuple[Tensor, Tensor]:
    """Canonical codes and scales of 256 weight rows."""
    groups = 1 if group is None else -(-width // group)
    if kind == "int4":
        return torch.empty(256, width // 2, dtype=torch.uint8), torch.empty(256, groups, dtype=torch.bfloat16)
    codes = torch.empty(256, width, dtype=torch.int8 if kind == "int8" else torch.uint8)
    return codes, torch.empty(256 if kind == "int8" or group is None else 2, groups)


def launch_mode(dtype: torch.dtype, rows: int, kind: str, activation: str, scaled: bool) -> None:
    def launch(
        width: int, group: int | None, zeros: Any = None, extra: Any = (None, None), after: str = "none"
    ) -> None:
        codes, scales = gemm_weight(kind, group, width)
        columns, x = 256 if width % 2 == 0 else 253, torch.empty(rows, width, dtype=dtype)
        tensors = (codes[:columns], scales[:columns], zeros, None, None)
        gemm.quantized_linear_fwd(x, *tensors, *extra, kind, columns, group or width, activation, after)

    group = 128 if scaled else None
    bias, residual = torch.empty(256, dtype=dtype), torch.empty(rows, 256, dtype=dtype)
    launch(1024, group)
    launch(1024, group, extra=(bias, residual))
    for after in ("gelu", "gelu_tanh", "swiglu"):
        launch(1024, group, extra=(None if after == "swiglu" else bias, None), after=after)
    if kind == "int4":
        launch(1024, group, zeros=torch.empty(256, 8, dtype=torch.uint8))
        for small, after in itertools.product((32, 64), ("none", "swiglu")):
            launch(1024, small, after=after)
    else:
        launch(1028, group)
        launch(1027, group)
    if kind == "fp8":
        x, tensors = torch.empty(rows, 1024, dtype=dtype), gemm_weight(kind, None, 1024)
        gemm.quantized_linear_fwd(x, *tensors, None, None, torch.ones(1), None, None, kind, 256, 1024, "fp8", "none")


def launch_moe(dtype: torch.dtype) -> None:
    for name, dense in (("route_topk_fwd", False), ("permute_fwd", True), ("unpermute_fwd", True)):
        widths = {row.width or 4096 for row in configs.rows_of(name, "cpu", gpu.DTYPES[dtype])}
        for width in sorted(widths):
            if not dense:
                logits = torch.empty(ROWS, width, dtype=dtype)
                weights, experts = torch.empty(ROWS, 8), torch.zeros(ROWS, 8, dtype=torch.int32)
                for normalize in (False, True):
                    moe.route_topk_fwd(logits, 8, normalize)
                    moe.route_topk_bwd(logits, weights, torch.empty(width), weights, experts, normalize)
                continue
            x, rows = torch.empty(ROWS, width, dtype=dtype), torch.empty(8 * ROWS, width, dtype=dtype)
            order, weights = torch.arange(8 * ROWS, dtype=torch.int32).view(ROWS, 8), torch.empty(ROWS, 8)
            moe.permute_fwd(x, order % 16, 16)
            for given in (None, weights):
                moe.unpermute_fwd(rows, order, given)
                moe.unpermute_bwd(x, rows, order, given, True, True)
    rows, weight = torch.empty(256, 64, dtype=dtype), torch.empty(128, 48, 64, dtype=dtype)
    offsets = torch.arange(0, 258, 2, dtype=torch.int32)
    moe.grouped_linear_fwd(rows, weight, offsets)
    moe.grouped_linear_bwd(torch.empty(256, 48, dtype=dtype), rows, weight, offsets, True, True)


FAMILIES = (
    (norm, launch_norm),
    (activation, launch_activation),
    (gemm, launch_gemm),
    (head, launch_head),
    (rope, launch_rope),
    (vision, launch_vision),
    (moe, launch_moe),
)


def builds(module: Any) -> Iterator[Build]:
    return (entry for entry in module.KERNELS if isinstance(entry, Build))


@pytest.mark.parametrize(("module", "launch"), FAMILIES, ids=[module.__name__ for module, _ in FAMILIES])
def test_what_is_declared_is_what_is_launched(module, launch, launches):
    for dtype in gpu.DTYPES:
        launch(dtype)
    found = set(launches)
    for build in builds(module):
        # An architecture's own rows are in force there, not here.
        if build.targets == gpu.ARCHITECTURES or not any(configs.table(target).rows for target in build.targets):
            assert declared(build) in found, build.name
    # And the other way: no kernel is launched with a configuration, for a dtype, that is not declared.
    # By any family: one may launch another's.
    every = itertools.chain.from_iterable(builds(module) for module, _ in FAMILIES)
    known = {(name, _blocks(constants), warps, stages) for name, _, constants, warps, stages in map(declared, every)}
    for name, _, constants, warps, stages in found:
        assert (name, _blocks(constants), warps, stages) in known


def _blocks(constants: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    return tuple(item for item in constants if item[0].startswith("BLOCK"))
