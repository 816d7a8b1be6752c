"""``route_topk`` in Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from m4ov_kernels import configs
from m4ov_kernels.gpu import SIZES, Build, Config, Work, current_device
from m4ov_kernels.layout import as_rows, output
from m4ov_kernels.moe.triton_route_kernels import _route_topk_bwd_kernel, _route_topk_fwd_kernel
from m4ov_kernels.moe.values import Routing, routing

_PROGRAMS = 512  # enough to fill a large GPU; each makes one partial sum


def _config(name: str, logits: Tensor) -> Config:
    config = configs.find(name, logits, logits.shape[1])
    if config is None:
        raise RuntimeError(f"route_topk: the Triton kernels are for at most 2048 experts; got {logits.shape[1]}")
    return config


def route_topk_fwd(logits: Tensor, top_k: int, normalize: bool, *, out: Routing | None = None) -> Routing:
    """``(weights, experts, counts, probability)``."""
    tokens, count = logits.shape
    weights, experts, counts, probability = routing(logits, top_k, out)
    config = _config("route_topk_fwd", logits)
    programs = min(triton.cdiv(tokens, config.constexprs["BLOCK_T"]), _PROGRAMS)
    chosen = torch.empty(programs, count, dtype=torch.int32, device=logits.device)
    partial = torch.empty(programs, count, dtype=torch.float32, device=logits.device)
    if programs:
        logits, stride = as_rows(logits)
        operands = (logits, stride, weights, experts, chosen, partial, tokens, count, top_k)
        flags = {"NORMALIZE": normalize, "CHOSEN": triton.next_power_of_2(top_k)}
        with current_device(logits):
            _route_topk_fwd_kernel[(programs,)](*operands, **flags, **config.options())
    torch.sum(chosen, 0, dtype=torch.int64, out=counts)
    torch.div(partial.sum(0), max(tokens, 1), out=probability)
    return weights, experts, counts, probability


def route_topk_bwd(
    logits: Tensor,
    grad_weights: Tensor | None,
    grad_probability: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    normalize: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of ``logits``."""
    result = output(out, logits.shape, logits, logits.dtype)
    if result.numel():
        (tokens, count), top_k = logits.shape, experts.shape[1]
        config = _config("route_topk_bwd", logits)
        logits, stride = as_rows(logits)
        weights, experts = weights.contiguous(), experts.contiguous()
        grads = [weights if grad is None else grad.contiguous() for grad in (grad_weights, grad_probability)]
        flags = {
            "NORMALIZE": normalize,
            "HAS_WEIGHTS": grad_weights is not None,
            "HAS_PROBABILITY": grad_probability is not None,
        }
        operands = (logits, stride, weights, experts, *grads, result, tokens, count, top_k)
        with current_device(logits):
            _route_topk_bwd_kernel[(triton.cdiv(tokens, config.constexprs["BLOCK_T"]),)](
                *operands, **flags, **config.options()
            )
    return result


_TOKENS, _TOP_K = 8192, 8  # the problem of the cost model


def _declared() -> list[Build]:
    builds = []
    for dtype in SIZES:
        for kind, kernel in (("fwd", _route_topk_fwd_kernel), ("bwd", _route_topk_bwd_kernel)):
            for row, targets in configs.shipped(f"route_topk_{kind}", dtype):
                width, config = row.width or 2048, row.config
                moved = _TOKENS * (width * SIZES[dtype] * (1 + (kind == "bwd")) + 8 * _TOP_K)
                work = Work(f"[{_TOKENS}, {width}], {_TOP_K} chosen", moved, 5 * _TOKENS * width)
                outputs = "*fp32/16 *i32/16 *i32/16 *fp32/16" if kind == "fwd" else ""
                inputs = "*fp32/16 *i32/16 *fp32/16 *fp32/16 *T/16" if kind == "bwd" else ""
                for normalize in (True, False):
                    flags: dict[str, int] = {"NORMALIZE": normalize}
                    if kind == "fwd":
                        flags["CHOSEN"] = _TOP_K
                    else:
                        flags |= {"HAS_WEIGHTS": True, "HAS_PROBABILITY": True}
                    note = f"E {width}" + ", normalised" * normalize
                    signature = f"*T/16 i32/16 {outputs}{inputs} i32 i32 i32"
                    constexprs, stages = {**flags, **config.constexprs}, (config.num_warps, config.num_stages)
                    builds.append(
                        Build(kernel, dtype, signature, constexprs, *stages, note=note, work=work, targets=targets)
                    )
    return builds


KERNELS = _declared()
