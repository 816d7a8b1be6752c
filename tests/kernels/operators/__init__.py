"""Every operator's case, in one table: a new operator is entered here, and nowhere else, for the shared properties
(``test_operators.py``), the calls from threads (``test_threads.py``) and the fuzzer (``make fuzz``)."""

from __future__ import annotations

from . import activation, attention, gemm, gemm_quantize, head, head_kl, moe, norm, rope, rotation, vision
from .case import Call, OperatorCase
from .corruptions import Corruption

__all__ = ["CASES", "Call", "Corruption", "OperatorCase"]

CASES = {
    case.name: case
    for case in (
        norm.RMS_NORM,
        norm.LAYER_NORM,
        activation.SWIGLU,
        activation.GEGLU,
        activation.GELU,
        head.LINEAR_CROSS_ENTROPY,
        head.LINEAR_LOGPROB,
        head_kl.LINEAR_KL,
        gemm.INT4_LINEAR,
        gemm.INT8_LINEAR,
        gemm.FP8_LINEAR,
        attention.VARLEN_ATTENTION,
        rotation.QK_NORM_MROPE,
        rotation.VISION_ROPE,
        rope.MROPE_POSITIONS,
        vision.SCATTER_VISION,
        vision.DEEPSTACK_ADD,
        vision.INTERPOLATE,
        moe.ROUTE_TOPK,
        moe.PERMUTE,
        moe.UNPERMUTE,
        moe.GROUPED_LINEAR,
        gemm_quantize.QUANTIZE_INT8,
        gemm_quantize.QUANTIZE_FP8,
        gemm_quantize.RMS_NORM_QUANTIZE,
        gemm_quantize.SWIGLU_QUANTIZE,
    )
}
