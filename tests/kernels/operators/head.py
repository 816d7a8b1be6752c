"""Cases of the language-model head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4ov_kernels import linear_cross_entropy
from m4ov_kernels.head import linear_logprob, native_logprob

from .. import draws
from ..draws import Draw
from ..numerics import BEYOND, EPS, logit_terms
from . import corruptions
from .case import Call, OperatorCase
from .options import number, tensor_dtype


def _arguments(draw: Draw) -> dict[str, Any]:
    # A sum of logits near the end of float32 overflows in one order and not in another.
    dtype, kind = tensor_dtype(draw), draws.kinds(draw, draws.GRADIENT_VALUES)
    # Mostly small. At times enough logits for threads to share, and several chunks.
    if draw.one_in(128):
        rows, width, vocab = draw.choice(((130, 24, 700), (3, 8, 9000), (64, 33, 4100)))
    else:
        rows = draw.integer(0, 12) if not draw.one_in(8) else draw.choice((17, 40, 65))
        width = draw.choice((1, 3, 8, 16, 65, 128))
        vocab = draw.integer(1, 80) if not draw.one_in(8) else draw.choice((127, 128, 333, 513, 1025))
    leading = (rows,) if not draw.one_in(6) else draw.choice(((1, rows), (rows, 1), (2, 1, rows)))
    ignore_index = draw.choice((-100, -100, -100, -1, 0, vocab - 1, 2**40))
    generator = torch.Generator().manual_seed(draw.integer(0, 2**32 - 1))
    target = torch.randint(vocab, leading, generator=generator)
    target[torch.rand(leading, generator=generator) < draw.choice((0.0, 0.0, 0.4, 1.0))] = ignore_index
    reduction = draw.choice(("none", "mean", "sum"))
    counted = reduction == "mean" and draw.one_in(3)
    weight = None
    if draw.one_in(3):  # some classes count nothing
        weight = torch.rand(vocab, generator=generator) + 0.1
        weight = (weight * (torch.rand(vocab, generator=generator) > draw.choice((0.0, 0.2)))).to(dtype)
    return {
        "input": draws.tensor(draw, (*leading, width), dtype, kind()),
        "linear_weight": draws.tensor(draw, (vocab, width), dtype, kind(), width**-0.5),
        "target": draws.laid_out(target, draws.layout_of(draw)) if draw.one_in(4) else target,
        "linear_bias": draws.tensor(draw, (vocab,), dtype, kind()) if draw.one_in(3) else None,
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": draw.choice((0.0, 0.0, 0.1, 1.0, 1, 0)),
        "z_loss": draw.choice((0.0, 0.0, 0, 1e-4, 0.5)),
        "softcap": draw.choice((None, None, 30.0, 2)),
        "num_items_in_batch": draw.choice((7, 0.5, torch.tensor(3), torch.tensor([2.0]))) if counted else None,
        # On the CPU the rows that count are seen: what is said of them makes no difference.
        "keep_logits_bytes": draw.choice((None, 0, 1000, 1 << 14)),
        "num_valid": int((target != ignore_index).sum()) if draw.one_in(4) else None,
        "numerics": draw.choice(("hf", "hf", "fp32")),
    }


def _results(input: Tensor, target: Tensor, reduction: str, **_: Any) -> Any:
    dtype = torch.promote_types(input.dtype, torch.float32)
    return {"loss": (target.shape if reduction == "none" else (), dtype)}


def _finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def _logits(arguments: dict[str, Any], keep: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows that count, in the dtype of the rest of the loss: before and after the cap, in plain PyTorch."""
    tensors = [arguments[name] for name in ("input", "linear_weight", "linear_bias")]
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    if arguments["numerics"] == "fp32":
        tensors = [None if tensor is None else tensor.to(wide) for tensor in tensors]
    logits = F.linear(tensors[0][keep], *tensors[1:]).to(wide)
    cap = arguments["softcap"]
    return logits, logits if cap is None else cap * torch.tanh(logits / cap)


def _definition(**arguments: Any) -> Tensor:
    """``F.cross_entropy`` of whole logits, without ignored rows: these reach no result and no gradient, not even by a
    NaN; in plain PyTorch they do."""
    target, reduction = arguments["target"], arguments["reduction"]
    keep = target != arguments["ignore_index"]
    logits = _logits(arguments, keep)[1]
    weight, labels = arguments["weight"], target[keep]
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=arguments["label_smoothing"])
    penalty = arguments["z_loss"] * logits.logsumexp(-1).square() if arguments["z_loss"] else torch.zeros_like(loss)
    if reduction == "none":
        return loss.new_zeros(target.shape).masked_scatter(keep, loss + penalty)
    if reduction == "sum":
        return (loss + penalty).sum()
    if arguments["num_items_in_batch"] is not None:
        return (loss + penalty).sum() / torch.as_tensor(arguments["num_items_in_batch"]).reshape(())
    mean = loss.sum() / (len(labels) if weight is None else weight[labels].sum())
    return mean + penalty.sum() / len(labels) if arguments["z_loss"] else mean


def _terms(call: Call) -> dict[str, Tensor]:
    """What nearly cancels, in float64: in the loss the logits; in a gradient the softmax, which moves by p · |logit| ·
    eps when logits are rounded, and the target's and the classes' shares, times the other factor."""
    arguments = call.arguments
    dtype, smoothing = arguments["input"].dtype, arguments["label_smoothing"]
    flat = arguments | {
        name: None if arguments[name] is None else arguments[name].double()
        for name in ("input", "linear_weight", "linear_bias")
    }
    flat["input"] = flat["input"].reshape(-1, flat["input"].shape[-1])
    target = arguments["target"].reshape(-1)
    keep = target != arguments["ignore_index"]
    before, logits = (_finite(tensor) for tensor in _logits(flat, torch.ones_like(keep)))
    vocab, cap = logits.shape[1], arguments["softcap"]
    slope = torch.ones_like(logits) if cap is None else 1 - (logits / cap).square()
    # What roundings move: those of the products' sum, and where logits are rounded to the dtype, of a logit.
    size = logit_terms(flat["input"], flat["linear_weight"], flat["linear_bias"])
    coarse = EPS[dtype] / EPS[torch.float32] if arguments["numerics"] == "hf" else 1.0
    weight = arguments["weight"]
    weight = torch.ones(vocab).double() if weight is None else weight.double()
    classes = target.masked_fill(~keep, 0)
    own, mass = (1 - smoothing) * weight[classes], smoothing * weight.mean()
    # VDPBF16PS takes what is below the normal range for 0.
    flushed = torch.finfo(torch.float32).tiny if dtype is torch.bfloat16 else 0.0
    lost = flushed * (flat["input"].abs().sum(-1) + flat["linear_weight"].abs().sum(-1).max() + 1)
    lost = _finite(lost) / EPS[torch.float32] + math.log(vocab) / 4
    penalty = 2 * arguments["z_loss"] * _finite(logits.logsumexp(-1)).abs()
    moved = (logits.abs() + (coarse * before.abs() + size) * slope).amax(-1) + lost
    loss = keep * (moved * (own + mass + penalty) + smoothing * (logits.abs() * weight).mean(-1))
    divisor, items = torch.ones(()).double(), arguments["num_items_in_batch"]
    if items is not None:
        divisor = torch.as_tensor(items).double().reshape(())
    elif arguments["reduction"] == "mean":
        divisor = (weight[classes] * keep).sum()
    if arguments["reduction"] == "none":
        terms = {"loss": loss.reshape(arguments["target"].shape)}
    else:
        parts = keep.sum() if arguments["z_loss"] else divisor
        terms = {"loss": loss.sum() / torch.minimum(divisor, parts)}
    # A sum past the end of float32 in one order and not in another is, if capped, a number in one of them.
    bias = 0.0 if flat["linear_bias"] is None else flat["linear_bias"].abs()
    sizes = flat["input"].abs() @ flat["linear_weight"].abs().t() + bias
    if cap is not None and not (sizes[keep] < torch.finfo(torch.float32).max).all():
        terms["loss"] = torch.full_like(terms["loss"], BEYOND)
    if call.wanted:
        grad = call.grads["loss"].double().reshape(-1).expand(keep.shape).abs()
        per_row = (own + mass) / divisor
        per_row += penalty / (keep.sum() if arguments["reduction"] == "mean" and items is None else divisor)
        log_p, p = _finite(logits.log_softmax(-1)), _finite(logits.softmax(-1))
        largest = (logits.abs() + size * slope).amax(-1, keepdim=True)
        shares = p * per_row[:, None] * (1 + largest + log_p.abs())
        shares += p * largest * (2 * arguments["z_loss"] / torch.minimum(divisor, keep.sum().clamp(min=1)))
        shares += F.one_hot(classes, vocab) * (own / divisor)[:, None] + smoothing * weight / vocab / divisor
        if cap is not None:  # 1 - tanh² cancels too
            shares *= slope * (1 + 2 * size / cap) + 2 * EPS[torch.float32] / EPS[dtype]
        shares = _finite(torch.where(keep[:, None], shares * grad[:, None], 0.0))
        hidden, least = _finite(torch.where(keep[:, None], flat["input"], 0.0)), torch.finfo(dtype).smallest_normal
        least, zero = least + flushed / EPS[dtype], flushed / EPS[dtype]
        of_input = (shares + zero) @ (_finite(flat["linear_weight"]).abs() + zero) + least
        terms["grad_input"] = of_input.reshape(arguments["input"].shape)
        terms["grad_linear_weight"] = (shares + zero).t() @ (hidden.abs() + zero) + least
        terms["grad_linear_bias"] = shares.sum(0) + len(target) * least
        # The gradient of logits is in their dtype, in plain PyTorch: past its end there is nothing to compare.
        beyond = (_finite(grad * per_row) * keep).sum() > 0.9 * torch.finfo(dtype).max
        if beyond or (logits[keep] == math.inf).any() or (terms["loss"] == BEYOND).any():
            terms |= {name: torch.full_like(term, BEYOND) for name, term in terms.items() if name != "loss"}
    return terms


@contextmanager
def _scratch(size: int) -> Iterator[None]:
    previous, native_logprob.SCRATCH_BYTES = native_logprob.SCRATCH_BYTES, size
    try:
        yield
    finally:
        native_logprob.SCRATCH_BYTES = previous


def _out_of_range(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    target, vocab = arguments["target"].clone().contiguous(), arguments["linear_weight"].shape[0]
    wrong = draw.choice([index for index in (vocab, -1, -(2**40), 2**62) if index != arguments["ignore_index"]])
    if not target.numel():
        return None
    target.view(-1)[draw.integer(0, target.numel() - 1)] = wrong
    return {"target": target}, str(wrong)


def _too_many_valid(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    wrong = draw.choice((-1, arguments["target"].numel() + 1))
    return {"num_valid": wrong}, str(wrong)


def _count_without_mean(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    reduction = draw.choice(("sum", "none"))
    return {"num_items_in_batch": 3, "reduction": reduction}, f"{reduction!r}"


def _group(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    return {"group_name": "nobody"}, "'nobody'"


def _learnt_weight(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    return {"weight": torch.ones(arguments["linear_weight"].shape[0], requires_grad=True)}, "one that does"


def _items(what: str, error: type[Exception], *options: Any) -> corruptions.Corruption:
    def change(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
        wrong = draw.choice(options)
        came = str(list(wrong.shape)) if isinstance(wrong, Tensor) else repr(wrong)
        return {"num_items_in_batch": wrong, "reduction": "mean"}, came

    return corruptions.Corruption("num_items_in_batch", what, error, change)


LINEAR_CROSS_ENTROPY = OperatorCase(
    "linear_cross_entropy",
    linear_cross_entropy,
    _arguments,
    _results,
    ("input", "linear_weight", "linear_bias"),
    (
        *corruptions.head("input", "linear_weight", "target"),
        *corruptions.index_tensor("target"),
        corruptions.shape("target", corruptions.longer, corruptions.deeper),
        corruptions.device("target"),
        corruptions.Corruption("target", "out of range", ValueError, _out_of_range),
        *corruptions.float_tensor("linear_bias", optional=True),
        corruptions.shape("linear_bias", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("linear_bias"),
        *corruptions.float_tensor("weight", optional=True),
        corruptions.shape("weight", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("weight"),
        corruptions.Corruption("weight", "wants a gradient", ValueError, _learnt_weight),
        corruptions.value("ignore_index", TypeError, "not an int", 1.5, "-100", True, None),
        corruptions.value("ignore_index", ValueError, "more than 64 bits", 2**63, -(2**70)),
        corruptions.value("reduction", ValueError, "unknown", "average", "", None, 0, ["mean"]),
        corruptions.value("label_smoothing", ValueError, "out of range", 1.5, -0.1, math.nan, math.inf),
        number("label_smoothing"),
        corruptions.value("label_smoothing", TypeError, "missing", None),
        corruptions.value("z_loss", ValueError, "negative", -1e-4, math.nan, math.inf),
        number("z_loss"),
        corruptions.value("softcap", ValueError, "not above 0", 0, -30.0, math.nan, math.inf),
        number("softcap"),
        corruptions.value("numerics", ValueError, "unknown", "vllm", "bf16", "", None),
        corruptions.Corruption("group_name", "unknown", ValueError, _group),
        corruptions.value("group_name", TypeError, "not a name", 3, b"0", ["0"]),
        _items("not above 0", ValueError, 0, -1, -0.5, math.nan),
        _items("not a number", TypeError, "3", [3], 1j),
        _items("no single real number", ValueError, torch.ones(2), torch.ones(0), torch.tensor([1j])),
        corruptions.Corruption("num_items_in_batch", "without a mean", ValueError, _count_without_mean),
        corruptions.Corruption("num_valid", "out of range", ValueError, _too_many_valid),
        corruptions.value("keep_logits_bytes", ValueError, "negative", -1, -(2**40)),
        corruptions.value("keep_logits_bytes", TypeError, "not an int", 0.5, "1", True),
        corruptions.value("num_valid", TypeError, "not an int", 0.5, "1", True),
    ),
    _terms,
    _definition,
    share=1,
    settings=lambda draw, call: _scratch(draw.choice((native_logprob.SCRATCH_BYTES, 1))),
)


def _logprob_arguments(draw: Draw) -> dict[str, Any]:
    arguments = _arguments(draw)
    targets, vocab = arguments["target"], arguments["linear_weight"].shape[0]
    return {
        "hidden_states": arguments["input"],
        "weight": arguments["linear_weight"],
        "targets": targets,
        "bias": arguments["linear_bias"],
        "ignore_index": arguments["ignore_index"],
        "num_valid": arguments["num_valid"],
        "temperature": draw.choice((1.0, 1.0, 0.5, 3, 0.01, 100.0)),
        "entropy": draw.boolean(),
        "top_k_logprobs": draw.integer(1, min(vocab, 5)) if draw.one_in(4) else 0,
        "numerics": draw.choice(("fp32", "fp32", "hf")),
        "invariant": False,
    }


def _logprob(**arguments: Any) -> tuple[Tensor, ...]:
    """Without the likeliest words: which of two nearly equal ones comes first is chance."""
    found = linear_logprob(**arguments)
    return (found.logprob, found.logsumexp, *((found.entropy,) if found.entropy is not None else ()))


def _logprob_results(hidden_states: Tensor, targets: Tensor, entropy: bool, **_: Any) -> Any:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return {name: (targets.shape, dtype) for name in ("logprob", "logsumexp", *(("entropy",) if entropy else ()))}


def _flushed(tensor: Tensor) -> Tensor:
    """1 where a number is below the normal range, and not 0."""
    return ((tensor != 0) & (tensor.abs() < torch.finfo(torch.float32).tiny)).double()


def _logprob_terms(call: Call) -> dict[str, Tensor]:
    """As :func:`_terms`. A gradient moves by its share of the softmax, by the entropy and by log p, each of which moves
    with the logits; where these are rounded, one may round to its neighbour."""
    arguments = call.arguments
    targets, temperature = arguments["targets"].reshape(-1), arguments["temperature"]
    hidden = arguments["hidden_states"].double().reshape(len(targets), arguments["hidden_states"].shape[-1])
    weight, bias = arguments["weight"].double(), arguments["bias"]
    vocab = weight.shape[0]
    keep = targets != arguments["ignore_index"]
    logits = F.linear(hidden, weight, None if bias is None else bias.double()) / temperature
    largest = torch.where(keep, logit_terms(hidden, weight, bias).amax(-1) / temperature, 0.0)
    if arguments["numerics"] == "hf":
        largest = largest * (EPS[arguments["hidden_states"].dtype] / EPS[torch.float32])
    log_p = _finite(logits.log_softmax(-1))
    p = _finite(logits.softmax(-1))
    entropy = -(p * log_p).sum(-1)
    spread = (p * (log_p + entropy[:, None]).abs()).sum(-1)
    # VDPBF16PS takes what is below the normal range for 0.
    flushed = torch.finfo(torch.float32).tiny if arguments["hidden_states"].dtype is torch.bfloat16 else 0.0
    lost = flushed * (hidden.abs().sum(-1) + weight.abs().sum(-1).max() + 1) / EPS[torch.float32]
    log_vocab = math.log(vocab) / 4 + _finite(lost)
    terms = {
        "logprob": keep * (largest + log_vocab),
        "logsumexp": keep * (largest + log_vocab),
        "entropy": keep * (largest * spread + entropy + log_vocab),
    }
    if flushed:  # of an infinity times what it takes for 0 it makes NaN
        lost_rows = (
            _flushed(hidden) @ weight.isinf().double().t() + hidden.isinf().double() @ _flushed(weight).t()
        ) > 0
        terms = {name: torch.where(lost_rows.any(-1), BEYOND, term) for name, term in terms.items()}
    terms = {name: term.reshape(arguments["targets"].shape) for name, term in terms.items()}
    if call.wanted:
        grads = [
            _finite(call.grads[name].double()).reshape(-1).abs() if name in call.grads else torch.zeros(len(targets))
            for name in ("logprob", "logsumexp", "entropy")
        ]
        shares = p * (grads[0] + grads[1])[:, None]
        shares += p * grads[2][:, None] * (log_p.abs() + entropy[:, None] + 1)
        shares = shares * (1 + largest[:, None] + log_p.abs())
        shares += F.one_hot(targets.masked_fill(~keep, 0), vocab) * grads[0][:, None]
        shares = torch.where(keep[:, None], shares, 0.0) / temperature
        hidden = _finite(torch.where(keep[:, None], hidden, 0.0))
        dtype = arguments["hidden_states"].dtype
        least = torch.finfo(dtype).smallest_normal + flushed / EPS[dtype]
        lost = flushed / EPS[dtype]
        terms["grad_hidden_states"] = (shares + lost) @ (_finite(weight).abs() + lost) + least
        terms["grad_hidden_states"] = terms["grad_hidden_states"].reshape(arguments["hidden_states"].shape)
        terms["grad_weight"] = (shares + lost).t() @ (hidden.abs() + lost) + least
        terms["grad_bias"] = shares.sum(0) + len(targets) * least
        if (logits[keep] == math.inf).any():  # nothing has a probability there, and so no gradient is one
            terms |= {name: torch.full_like(term, BEYOND) for name, term in terms.items() if name.startswith("grad_")}
    return terms


def _logprob_without_ignored_rows(hidden_states: Tensor, targets: Tensor, **rest: Any) -> tuple[Tensor, ...]:
    """Rows without a target reach no result and no gradient, not even by a NaN; in plain PyTorch they do."""
    keep = targets != rest["ignore_index"]
    found = _logprob(hidden_states=hidden_states[keep], targets=targets[keep], **{**rest, "num_valid": None})
    return tuple(value.new_zeros(targets.shape).masked_scatter(keep, value) for value in found)


def _too_many_words(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    wrong = draw.choice((-1, arguments["weight"].shape[0] + 1))
    return {"top_k_logprobs": wrong}, str(wrong)


def _bad_target(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str] | None:
    changed = _out_of_range({**arguments, "target": arguments["targets"], "linear_weight": arguments["weight"]}, draw)
    return changed and ({"targets": changed[0]["target"]}, changed[1])


def _too_many_valid_targets(arguments: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], str]:
    return _too_many_valid({"target": arguments["targets"]}, draw)


LINEAR_LOGPROB = OperatorCase(
    "linear_logprob",
    _logprob,
    _logprob_arguments,
    _logprob_results,
    ("hidden_states", "weight", "bias"),
    (
        *corruptions.head("hidden_states", "weight", "targets"),
        *corruptions.index_tensor("targets"),
        corruptions.shape("targets", corruptions.longer, corruptions.deeper),
        corruptions.device("targets"),
        corruptions.Corruption("targets", "out of range", ValueError, _bad_target),
        *corruptions.float_tensor("bias", optional=True),
        corruptions.shape("bias", corruptions.wider, corruptions.deeper, corruptions.scalar),
        corruptions.device("bias"),
        corruptions.value("temperature", ValueError, "not above 0", 0, -1.0, math.nan, math.inf),
        number("temperature"),
        corruptions.value("temperature", TypeError, "missing", None),
        corruptions.value("ignore_index", TypeError, "not an int", 1.5, "-100", True, None),
        corruptions.value("ignore_index", ValueError, "more than 64 bits", 2**63, -(2**70)),
        corruptions.value("entropy", TypeError, "not a bool", 1, None, "yes"),
        corruptions.value("invariant", TypeError, "not a bool", 1, None, "yes"),
        corruptions.value("numerics", ValueError, "unknown", "vllm", "bf16", "", None),
        corruptions.Corruption("top_k_logprobs", "out of range", ValueError, _too_many_words),
        corruptions.value("top_k_logprobs", TypeError, "not an int", 0.5, "1", True),
        corruptions.Corruption("group_name", "unknown", ValueError, _group),
        corruptions.value("group_name", TypeError, "not a name", 3, b"0", ["0"]),
        corruptions.Corruption("num_valid", "out of range", ValueError, _too_many_valid_targets),
        corruptions.value("num_valid", TypeError, "not an int", 0.5, "1", True),
    ),
    _logprob_terms,
    _logprob_without_ignored_rows,
    share=1,
)
