"""Raw kernels run into preallocated outputs that show every element left out, and every write beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m4ov_kernels.dispatch import Implementation, Operator

# A NaN, or a number, that no kernel makes: inputs hold only the standard NaN.
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.int64: torch.int64}
_BITS |= {torch.int32: torch.int32, torch.int8: torch.int8, torch.float8_e4m3fn: torch.int8}
_POISON = {torch.float32: 0x7FC5A5A5, torch.bfloat16: 0x7FD5, torch.float16: 0x7E5A, torch.int64: -0x5A5A5A5A5A5A5A5B}
_POISON |= {torch.int32: -0x5A5A5A5B, torch.int8: -128, torch.float8_e4m3fn: 0x7F}
ZONE = 64  # elements on each side


class Output:
    """A contiguous tensor in the middle of a poisoned buffer, ``shift`` elements off alignment, itself poisoned."""

    def __init__(self, like: Tensor, shift: int) -> None:
        self.poison, count = _POISON[like.dtype], like.numel()
        self.bits = torch.full((count + 2 * ZONE + shift,), self.poison, dtype=_BITS[like.dtype])
        self.span = slice(ZONE + shift, ZONE + shift + count)
        self.values = self.bits[self.span].view(like.dtype).view(like.shape)

    def check(self, what: str) -> None:
        """Every element written, and nothing else."""
        poisoned = self.bits == self.poison
        assert poisoned[: self.span.start].all(), f"{what}: wrote before its output"
        assert poisoned[self.span.stop :].all(), f"{what}: wrote past its output"
        assert not poisoned[self.span].any(), f"{what}: left {int(poisoned[self.span].sum())} elements unwritten"


def check_bits(what: str, got: Tensor, expected: Tensor) -> None:
    bits = _BITS.get(got.dtype, got.dtype)
    differ = got.contiguous().view(bits) != expected.contiguous().view(bits)
    if differ.any():
        first = differ.nonzero()[0].tolist()
        values = f"{got[tuple(first)].item()!r} and {expected[tuple(first)].item()!r}"
        raise AssertionError(f"{what}: {int(differ.sum())} of {got.numel()} bits differ, first {first}: {values}")


@contextmanager
def guarded(
    operator: Operator, shift: int = 0, threads: int | None = None, bitwise: Callable[[torch.dtype], bool] | None = None
) -> Iterator[None]:
    """In this block every native kernel of ``operator`` runs twice: as it is called, and into guarded outputs, with
    another number of threads if one is given. Both must write the same bits (for the dtypes that ``bitwise`` says), and
    no input may change."""
    select = operator.select

    def selected(device: torch.device, dtype: torch.dtype | None, *call: Any) -> Implementation | None:
        found = select(device, dtype, *call)
        if found is None or found.backend != "native":
            return found
        same = bitwise is None or dtype is None or bitwise(dtype)
        fwd, bwd = (
            partial(_twice, kind, raw, shift, threads, same) for kind, raw in (("fwd", found.fwd), ("bwd", found.bwd))
        )
        return Implementation("native", fwd, bwd)

    operator.select = selected  # type: ignore[method-assign]
    try:
        yield
    finally:
        del operator.select  # type: ignore[method-assign]


def _twice(kind: str, raw: Callable[..., Any], shift: int, threads: int | None, same_bits: bool, *inputs: Any) -> Any:
    copies = [(value, value.detach().clone()) for value in inputs if isinstance(value, Tensor)]
    returned = raw(*inputs)
    single = isinstance(returned, Tensor)
    expected = (returned,) if single else returned
    outputs = [Output(tensor, shift) for tensor in expected]
    out = tuple(output.values for output in outputs)
    previous = torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        again = raw(*inputs, out=out[0] if single else out)
    finally:
        torch.set_num_threads(previous)
    given = (again,) if single else again
    assert given[0] is out[0], f"{kind}: did not write to its output"
    for i, (output, tensor, result) in enumerate(zip(outputs, expected, given, strict=True)):
        if result is output.values:
            output.check(f"{kind} output {i}")
        if same_bits:
            check_bits(f"{kind} output {i}", result, tensor)
    for value, copy in copies:
        check_bits(f"{kind} input", value, copy)
    return again
