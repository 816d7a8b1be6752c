"""What ``invariant()`` costs a whole model: the patched 55 M Qwen3-VL of ``step.py``, inside and outside by turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from m4ov_bench import measure, step
from m4ov_bench.row import Peer, Row
from m4ov_bench.session import Session, timing
from m4ov_kernels import invariant, linear_logprob, patch
from m4ov_kernels.dispatch import native_extension

_OUTSIDE, _NEW = "outside", 4  # tokens that the gate decodes


def benchmark(session: Session) -> Iterator[Row]:
    session.say("invariant(): gate")
    data = {name: value for name, value in step.batch().items() if name not in ("labels", "use_cache")}
    model: Any = step.build()
    patch(model)
    problem = _drift(model, data)
    for what, make in (("forward + backward", _training), ("decode a token", _decoding)):
        measured: dict[str, Any] = {}
        if not problem:
            session.say(f"invariant(): {what}")
            calls = {"inside": make(model, data, invariant), _OUTSIDE: make(model, data, nullcontext)}
            times = session.interleaved(calls, measure.Effort(4.0, 2.0, 3, 20))
            inside, outside = times["inside"], times[_OUTSIDE]
            measured = timing(inside) | {"peers": {_OUTSIDE: Peer(outside.seconds, outside.ratio_to(inside))}}
        yield Row(
            family="gemm",
            operator="invariant()",
            case=f"Qwen3-VL 55 M bf16, {data['input_ids'].shape[1]} tokens",
            what=what,
            implementation=f"native {native_extension()[0].isa()}",
            machine=session.machine,
            green=not problem,
            errors={"decoded, prefilled": float("inf") if problem else 0.0},
            problem=problem,
            **measured,
        )


def _hidden(model: Any, **inputs: Any) -> Any:
    return model.model(**inputs)


def _drift(model: Any, data: dict[str, Any]) -> str:
    """The last hidden states of a whole row, and of its last tokens decoded."""
    ids, types = data["input_ids"], data["mm_token_type_ids"]
    rest = {name: value for name, value in data.items() if name not in ("input_ids", "mm_token_type_ids")}
    begin = ids.shape[1] - _NEW
    with torch.no_grad(), invariant():
        whole = _hidden(model, **data, use_cache=False).last_hidden_state[:, begin:]
        found = _hidden(model, input_ids=ids[:, :begin], mm_token_type_ids=types[:, :begin], use_cache=True, **rest)
        decoded = []
        for at in range(begin, ids.shape[1]):
            token = ids[:, at : at + 1]
            found = _hidden(model, input_ids=token, past_key_values=found.past_key_values, use_cache=True)
            decoded.append(found.last_hidden_state)
    differ = int((torch.cat(decoded, 1) != whole).sum())
    return f"{differ} of {whole.numel()} hidden states of decoded tokens are not those of the whole row" * bool(differ)


Context = Callable[[], AbstractContextManager[Any]]


def _training(model: Any, data: dict[str, Any], context: Context) -> measure.Call:
    targets: Tensor = data["input_ids"][:, 1:]

    def call(_: int) -> None:
        with context():
            hidden = _hidden(model, **data, use_cache=False).last_hidden_state[:, :-1]
            linear_logprob(hidden, model.lm_head.weight, targets).logprob.mean().backward()
        model.zero_grad()

    return call


def _decoding(model: Any, data: dict[str, Any], context: Context) -> measure.Call:
    length = data["input_ids"].shape[1]
    with torch.no_grad():
        cache = _hidden(model, **data, use_cache=True).past_key_values
    token = data["input_ids"][:, -1:]

    def call(_: int) -> None:
        with torch.no_grad(), context():
            hidden = _hidden(model, input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state
            linear_logprob(hidden[:, -1], model.lm_head.weight, token[:, 0])
        cache.crop(length - cache.get_seq_length())

    return call
