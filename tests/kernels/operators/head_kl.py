"""The case of the divergence between two heads."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_kernels.head import linear_kl

from .. import draws
from ..draws import Draw
from ..numerics import BEYOND, EPS, logit_terms
from . import corruptions
from .case import Call, OperatorCase
from .options import number, tensor_dtype

HEADS = ("", "ref_")


def _arguments(draw: Draw) -> dict[str, Any]:
    dtype, kind = tensor_dtype(draw), draws.kinds(draw, draws.GRADIENT_VALUES)
    if draw.one_in(128):  # enough logits for threads to share, and several chunks
        rows, width, vocab = draw.choice(((130, 24, 700), (3, 8, 9000), (64, 33, 4100)))
    else:
        rows = draw.integer(0, 12) if not draw.one_in(8) else draw.choice((17, 40, 65))
        width = draw.choice((1, 3, 8, 16, 65, 128))
        vocab = draw.integer(1, 80) if not draw.one_in(8) else draw.choice((127, 128, 333, 513, 1025))
    leading = (rows,) if not draw.one_in(6) else draw.choice(((1, rows), (rows, 1), (2, 1, rows)))
    ref_width = width if draw.boolean() else draw.choice((1, 2, 9, 64))
    made: dict[str, Any] = {}
    for prefix, dim in zip(HEADS, (width, ref_width), strict=True):
        made[f"{prefix}hidden_states"] = draws.tensor(draw, (*leading, dim), dtype, kind())
        made[f"{prefix}weight"] = draws.tensor(draw, (vocab, dim), dtype, kind(), dim**-0.5)
        made[f"{prefix}bias"] = draws.tensor(draw, (vocab,), dtype, kind()) if draw.one_in(3) else None
    if width == ref_width and draw.boolean():  # one head: as a policy and its reference have
        made["ref_weight"], made["ref_bias"] = made["weight"], made["bias"]
        if draw.boolean():
            made["ref_hidden_states"] = made["hidden_states"]
    for prefix in HEADS:
        _flush(made[f"{prefix}hidden_states"], made[f"{prefix}weight"])
    mask = None
    if draw.boolean():
        generator = torch.Generator().manual_seed(draw.integer(0, 2**32 - 1))
        mask = torch.rand(leading, generator=generator) < draw.choice((0.0, 0.6, 1.0))
        mask = draws.laid_out(mask, draws.layout_of(draw)) if draw.one_in(4) else mask
    count = made["hidden_states"].shape[:-1].numel()
    return {
        **made,
        "mask": mask,
        "num_valid": (count if mask is None else int(mask.sum())) if draw.one_in(4) else None,
        "kind": draw.choice(("forward", "reverse", "jsd")),
        "temperature": draw.choice((1.0, 1.0, 0.5, 3, 0.01, 100.0)),
        "numerics": draw.choice(("fp32", "fp32", "hf")),
    }


def _flush(*pair: Tensor) -> None:
    """VDPBF16PS takes what is below the normal range for 0, which times infinity is NaN and not infinite. In place,
    whatever the strides."""
    if pair[0].dtype is torch.bfloat16 and any(x.isinf().any() for x in pair):
        for x in pair:
            everything = x.new_empty(0).set_(x.untyped_storage())
            everything.masked_fill_(everything.abs() < torch.finfo(torch.float32).tiny, 0.0)


def _results(hidden_states: Tensor, **_: Any) -> Any:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return {"divergence": (hidden_states.shape[:-1], dtype)}


def _finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def terms(call: Call) -> dict[str, Tensor]:
    """What nearly cancels, in float64: in a divergence both logits of a word, by its share of the mean; in a gradient
    the share of each word, which moves by p · |logit| · eps, times what lies between the logarithms."""
    arguments = call.arguments
    dtype, temperature = arguments["hidden_states"].dtype, arguments["temperature"]
    shape = arguments["hidden_states"].shape
    rows = shape[:-1].numel()
    mask = arguments["mask"]
    keep = torch.ones(rows, dtype=torch.bool) if mask is None else mask.reshape(rows)
    largest, logs, lost = torch.zeros(rows, dtype=torch.float64), [], torch.zeros(rows, dtype=torch.float64)
    # VDPBF16PS takes what is below the normal range for 0.
    flushed = torch.finfo(torch.float32).tiny if dtype is torch.bfloat16 else 0.0
    endless = False
    for prefix in HEADS:
        hidden, weight, bias = (arguments[f"{prefix}{name}"] for name in ("hidden_states", "weight", "bias"))
        hidden, weight = hidden.double().reshape(rows, hidden.shape[-1]), weight.double()
        bias = None if bias is None else bias.double()
        logits = F.linear(hidden, weight, bias) / temperature
        largest = torch.maximum(largest, logit_terms(hidden, weight, bias).amax(-1) / temperature)
        lost += _finite(flushed * (hidden.abs().sum(-1) + weight.abs().sum(-1).max() + 1) / EPS[torch.float32])
        logs.append(logits.log_softmax(-1))
        endless = endless or bool((logits[keep] == math.inf).any())
    if arguments["numerics"] == "hf":
        largest = largest * (EPS[dtype] / EPS[torch.float32])
    largest = torch.where(keep, largest, 0.0) + lost / temperature
    log_p, log_q = logs
    p, q = _finite(log_p.exp()), _finite(log_q.exp())
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    gap = _finite(log_p - log_m if arguments["kind"] == "jsd" else log_p - log_q).abs()
    over = {"forward": q, "reverse": p, "jsd": p + q}[arguments["kind"]]
    mean = (over * gap).sum(-1)
    log_vocab = math.log(p.shape[-1]) / 4
    # The mean is a sum over words that is divided at last by that of exponentials, at most V.
    beyond = keep & (mean * len(p.T) > torch.finfo(torch.float32).max) & (arguments["kind"] != "jsd")
    found = {"divergence": (keep * (largest * (1 + mean) + mean + log_vocab)).reshape(shape[:-1])}
    found["divergence"][beyond.reshape(shape[:-1])] = BEYOND
    if call.wanted:
        grad = _finite(call.grads["divergence"].double()).reshape(rows).abs()
        shares = p + q if arguments["kind"] == "forward" else p * (1 + gap + mean[:, None])
        shares = shares * (1 + largest[:, None])
        shares = torch.where(keep[:, None], shares * grad[:, None], 0.0) / temperature
        hidden, weight = arguments["hidden_states"].double().reshape(rows, shape[-1]), arguments["weight"].double()
        hidden = _finite(torch.where(keep[:, None], hidden, 0.0)).abs()
        least, each = torch.finfo(dtype).smallest_normal + flushed / EPS[dtype], flushed / EPS[dtype]
        shares_of = shares + each
        found["grad_hidden_states"] = (shares_of @ (_finite(weight).abs() + each) + least).reshape(shape)
        found["grad_weight"] = shares_of.t() @ (hidden + each) + least
        found["grad_bias"] = shares.sum(0) + rows * least
        if endless or (
            beyond.any() and arguments["kind"] == "reverse"
        ):  # nothing has a probability there, and so no gradient is one
            found |= {name: torch.full_like(term, BEYOND) for name, term in found.items() if name.startswith("grad_")}
    return found


def _without_rows_that_do_not_count(hidden_states: Tensor, ref_hidden_states: Tensor, mask: Any, **rest: Any) -> Tensor:
    """They reach no result and no gradient, not even by a NaN; in plain PyTorch they do."""
    keep = torch.ones(hidden_states.shape[:-1], dtype=torch.bool) if mask is None else mask
    options = {**rest, "num_valid": None}
    found = linear_kl(hidden_states=hidden_states[keep], ref_hidden_states=ref_hidden_states[keep], **options)
    return found.new_zeros(keep.shape).masked_scatter(keep, found)


def _too_many_valid(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    wrong = draw.choice((-1, arguments["hidden_states"].shape[:-1].numel() + 1))
    return {"num_valid": wrong}, str(wrong)


def _learned(argument: str) -> corruptions.Corruption:
    def make(tensor: Tensor, draw: Draw) -> tuple[Tensor, str]:
        return tensor.clone().requires_grad_(), "requires a gradient"

    return corruptions.changed(argument, ValueError, "requires a gradient", make)


LINEAR_KL = OperatorCase(
    "linear_kl",
    linear_kl,
    _arguments,
    _results,
    ("hidden_states", "weight", "bias"),
    (
        *corruptions.head("hidden_states", "weight", "ref_hidden_states"),
        *corruptions.float_tensor("ref_hidden_states"),
        corruptions.shape(
            "ref_hidden_states",
            corruptions.scalar,
            corruptions.longer,
            corruptions.deeper,
            lambda shape: (*shape[:-1], 0),
        ),
        corruptions.shape("ref_hidden_states", corruptions.wider, blamed="ref_weight"),
        corruptions.device("ref_hidden_states"),
        *corruptions.float_tensor("ref_weight"),
        corruptions.shape("ref_weight", corruptions.wider, corruptions.deeper, corruptions.longer),
        corruptions.device("ref_weight"),
        *(
            fault
            for name in ("bias", "ref_bias")
            for fault in (
                *corruptions.float_tensor(name, optional=True),
                corruptions.shape(name, corruptions.wider, corruptions.deeper, corruptions.scalar),
                corruptions.device(name),
            )
        ),
        *(_learned(f"ref_{name}") for name in ("hidden_states", "weight", "bias")),
        corruptions.value("mask", TypeError, "not a tensor", True, [True], "yes", 1),
        corruptions.dtype("mask", torch.uint8, torch.int64, torch.float32),
        corruptions.shape("mask", corruptions.longer, corruptions.deeper),
        corruptions.device("mask"),
        corruptions.value("kind", ValueError, "unknown", "kl", "js", "", None, 0, ["jsd"]),
        corruptions.value("temperature", ValueError, "not above 0", 0, -1.0, math.nan, math.inf),
        number("temperature"),
        corruptions.value("temperature", TypeError, "missing", None),
        corruptions.value("numerics", ValueError, "unknown", "vllm", "bf16", "", None),
        corruptions.Corruption("num_valid", "out of range", ValueError, _too_many_valid),
        corruptions.value("num_valid", TypeError, "not an int", 0.5, "1", True),
    ),
    terms,
    _without_rows_that_do_not_count,
    share=1,
)
