"""Blocks small enough for Triton's interpreter, and tensors where the kernels run: shared by the tests of Triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.gpu import Config

from . import strategies
from .operators import Call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
EPS = 1e-6
dtypes = st.sampled_from(DTYPES)
# Interpreted programs take about a millisecond each, so blocks are made small instead of shapes large.
shapes = st.one_of(
    st.tuples(st.integers(0, 9), st.sampled_from((1, 2, 7, 16, 33, 128, 130))),
    st.tuples(st.integers(1, 3), st.integers(0, 3), st.sampled_from((5, 64))),
)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", magnitude: float = 1.0) -> Tensor:
    values = strategies.tensor(shape, dtype, magnitude=magnitude).to(DEVICE)
    return strategies.laid_out(values, layout)


def on_device(call: Call) -> Call:
    """A drawn call with its tensors where the kernels run."""
    arguments = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in call.arguments.items()
    }
    return call._replace(arguments=arguments, grads={name: grad.to(DEVICE) for name, grad in call.grads.items()})


def row(kernel: str, width: int | None, num_warps: int = 4, **blocks: int) -> configs.Row:
    return configs.Row(kernel, "any", width, Config(blocks, num_warps))


# Wide rows begin at 65 columns, and tiles are small enough that shapes cross them.
SMALL = [
    row(f"{name}_{kind}", 2**k, BLOCK_ROWS=64 >> k, BLOCK_D=2**k)
    for name in ("rms_norm", "layer_norm")
    for kind in ("fwd", "bwd")
    for k in range(7)
]
SMALL += [row(f"layer_norm_{kind}_wide", None, BLOCK_D=32) for kind in ("fwd", "bwd")]
SMALL += [row("layer_norm_bwd_parameters", None, BLOCK_ROWS=2, BLOCK_D=32)]
SMALL += [row("rms_norm_fwd_wide", None, BLOCK_D=32), row("rms_norm_bwd_wide", None, BLOCK_D=32)]
SMALL += [row("rms_norm_bwd_weight", None, BLOCK_ROWS=2, BLOCK_D=32)]
SMALL += [row("rms_norm_bwd_reduce", None, BLOCK_PARTIALS=2, BLOCK_D=32)]
SMALL += [row(name, None, BLOCK_ROWS=2, BLOCK_D=32) for name in ("swiglu_fwd", "swiglu_bwd", "geglu_fwd", "geglu_bwd")]
SMALL += [row(name, None, BLOCK_ROWS=2, BLOCK_D=32) for name in ("gelu_fwd", "gelu_bwd")]
SMALL += [
    row(f"linear_logprob_{kind}{tiles}", None, BLOCK_T=16, BLOCK_V=size, BLOCK_D=16, GROUP=2, **more)
    for kind, more in (("fwd", {"TILES": 2}), ("bwd", {}))
    for tiles, size in (("", 16), ("_descriptors", 16), ("_wide", 32))
]
SMALL += [
    row(f"linear_kl_{kind}{tiles}", None, BLOCK_T=16, BLOCK_V=size, BLOCK_D=16, GROUP=2, **more)
    for kind, more in (("fwd", {"TILES": 2}), ("bwd", {}))
    for tiles, size in (("", 16), ("_wide", 32), ("_descriptors", 16), ("_descriptors_wide", 32))
]
SMALL += [
    row(f"quantized_linear_int4_{size}", width, BLOCK_N=16, BLOCK_M=rows, BLOCK_K=step, GROUP=2)
    for size, rows in (("few", 4), ("some", 8), ("many", 16), ("many_codes", 16), ("pairs", 16))
    for width, step in ((32, 32), (None, 64))
]
SMALL += [
    row(f"quantized_linear_bytes_{size}", None, BLOCK_N=16, BLOCK_M=rows, BLOCK_K=128, GROUP=2)
    for size, rows in (("few", 4), ("some", 8), ("many", 16), ("pairs", 16))
]
SMALL += [row("quantized_linear_bytes_many_descriptors", None, BLOCK_N=16, BLOCK_M=16, BLOCK_K=128, PARTS=2, GROUP=2)]
SMALL += [
    row("quantized_linear_input", None, BLOCK_D=256),
    row("quantized_linear_merge", None, BLOCK_ROWS=2, BLOCK_D=32),
    row("quantized_linear_dequantize", None, BLOCK_ROWS=4, BLOCK_D=32),
]
SMALL += [row("linear_kl_merge", None, BLOCK_SPLITS=2, BLOCK_T=16)]
SMALL += [row("linear_logprob_merge", None, BLOCK_SPLITS=2, BLOCK_T=16)]
SMALL += [row("feature_rows_index", None, BLOCK=4)]
SMALL += [row(f"feature_rows_{name}", None, BLOCK_ROWS=2, BLOCK_D=32) for name in ("fwd", "clear", "gather")]
SMALL += [
    row("interpolate_fwd", None, BLOCK_ROWS=4, BLOCK_D=32),
    row("interpolate_bwd", None, BLOCK_PATCHES=4, BLOCK_D=32),
]
SMALL += [
    row(name, width, BLOCK_HEADS=2, BLOCK_HALF=width // 2)
    for name in ("qk_norm_mrope_fwd", "qk_norm_mrope_bwd")
    for width in (16, 128, 1024)
]
SMALL += [row("vision_rope", width, BLOCK_HEADS=4, BLOCK_HALF=width // 2, BLOCK_IMAGES=2) for width in (16, 128)]


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with configs.override(*SMALL):
        yield
