"""What the GPU suite knows about each operator: examples to check, and subjects to measure.

Every name of ``m4ov_kernels.dispatch.FUNCTIONS`` must stand in ``CASES``; :func:`uncovered` names those that do
not, and the suite, dry runs included, is red until they do. To add one: a module like ``activation.py``, a line below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from m4ov_bench.gpu.example import Example, Maker
from m4ov_bench.gpu.operators import (
    activation,
    attention,
    gemm,
    gemm_quantize,
    head,
    head_kl,
    head_logprob,
    moe,
    norm,
    rope,
    rope_positions,
    vision,
)
from m4ov_bench.session import Subject
from m4ov_kernels.dispatch import FUNCTIONS


class Cases(NamedTuple):
    """``examples(maker, tiny)``: calls for the numerics rule, the first of them typical and small.
    ``subjects(session, device, tiny)``: what to measure, under the backend that is chosen when they are made."""

    examples: Callable[[Maker, bool], Iterator[Example]]
    subjects: Callable[..., Iterator[Subject]]


CASES = {
    "rms_norm": Cases(norm.examples, norm.subjects),
    "layer_norm": Cases(norm.layer_norm_examples, norm.layer_norm_subjects),
    "gelu": Cases(activation.gelu_examples, activation.gelu_subjects),
    "geglu": Cases(activation.geglu_examples, activation.geglu_subjects),
    "swiglu": Cases(activation.examples, activation.subjects),
    "varlen_attention": Cases(attention.examples, attention.subjects),
    "int4_linear": Cases(*gemm.of_kind("int4")),
    "int8_linear": Cases(*gemm.of_kind("int8")),
    "fp8_linear": Cases(*gemm.of_kind("fp8")),
    "linear_cross_entropy": Cases(head.examples, head.subjects),
    "linear_kl": Cases(head_kl.examples, head_kl.subjects),
    "linear_logprob": Cases(head_logprob.examples, head_logprob.subjects),
    "qk_norm_mrope": Cases(rope.examples, rope.subjects),
    "vision_rope": Cases(rope.vision_examples, rope.vision_subjects),
    "mrope_positions": Cases(rope_positions.examples, rope_positions.subjects),
    "route_topk": Cases(moe.route_examples, moe.route_subjects),
    "permute": Cases(moe.permute_examples, moe.permute_subjects),
    "unpermute": Cases(moe.unpermute_examples, moe.unpermute_subjects),
    "grouped_linear": Cases(moe.grouped_examples, moe.grouped_subjects),
    "quantize_int8": Cases(gemm_quantize.int8_examples, gemm_quantize.int8_subjects),
    "quantize_fp8": Cases(gemm_quantize.fp8_examples, gemm_quantize.fp8_subjects),
    "rms_norm_quantize": Cases(gemm_quantize.norm_examples, gemm_quantize.norm_subjects),
    "swiglu_quantize": Cases(gemm_quantize.swiglu_examples, gemm_quantize.swiglu_subjects),
    "scatter_vision": Cases(vision.scatter_examples, vision.scatter_subjects),
    "deepstack_add": Cases(vision.deepstack_examples, vision.deepstack_subjects),
    "interpolate_position_embeddings": Cases(vision.interpolate_examples, vision.interpolate_subjects),
}


def uncovered() -> list[str]:
    """Functions without a case here."""
    return sorted(FUNCTIONS.keys() - CASES.keys())


def cases_of(name: str) -> Cases:
    if name not in CASES:
        raise LookupError(
            f"operator {name!r} is registered in m4ov_kernels and has no case in m4ov_bench.gpu.operators: add a "
            "module with examples() and subjects(), and a line in CASES"
        )
    return CASES[name]
