"""``linear_logprob`` in Triton, for CUDA and ROCm (and, interpreted, for CPU tensors): launches and declarations.

The forward is one persistent kernel (``triton_logprob_kernels.py``) and a small one that merges its splits of the
vocabulary. The backward makes a chunk's logits again and writes their gradient, and takes two products of it by the
vendor's library: the chunk's rows of the weight's gradient, written once, and a contribution to that of the hidden
states, summed in float32. The likeliest words take a pass of their own, by chunks of logits.

Where the host does not know how many rows count, they are sorted to the front, and the kernels read on the device where
to stop; the library's products take all rows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m4ov_kernels import configs, gpu
from m4ov_kernels.gpu import SIZES, Build, Config, Work, current_device
from m4ov_kernels.head import state as states
from m4ov_kernels.head.rows import Rows, computed_rows, report_bad_targets
from m4ov_kernels.head.triton_logprob_kernels import (
    _linear_logprob_bwd_kernel,
    _linear_logprob_fwd_kernel,
    _linear_logprob_merge_kernel,
)
from m4ov_kernels.layout import output

_OP = "linear_logprob"
# What a chunk of the vocabulary may take: the gradient of its logits in the backward; its logits and their sort keys
# where the likeliest words are asked for. By the shape alone, never measured.
GPU_CHUNK_BYTES = 128 << 20
_CHUNK_WORDS, _MOST_ROWS = 2048, 256  # chunks are multiples of them, and so of every tile
# Architectures that load tiles by tensor descriptors (TMA); others would take pointers apart again. sm_90 keeps a tile
# of 128 × 256 logits in the registers of two warp groups, if not too much else happens to a logit.
_DESCRIPTORS, _WIDE = ("sm_90", "sm_100", "cpu"), ("sm_90", "cpu")  # cpu: interpreted
_PROGRAMS_PER_PROCESSOR = {True: 1, False: 2}  # with descriptors and without; other tiles leave room for two


def linear_logprob_fwd(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    num_valid: int | None,
    rounded: bool,
    want_entropy: bool,
    want_total: bool,
    top_k: int,
    first: int,
    vocab_size: int,
    keep_logits_bytes: int,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """``(logprob, logsumexp, entropy, total, top_logprobs, top_indices, normalizer, kept)``, 0 in ignored rows, NaN
    where a target is out of range or did not fit in ``num_valid``. No logits are kept: ``kept`` is zeros."""
    count, vocab = targets.shape[0], weight.shape[0]
    report_bad_targets(_OP, targets, vocab_size, ignore_index)
    rows = _computed_rows(hidden_states, targets, vocab_size, ignore_index, num_valid)
    tokens = rows.target.shape[0]
    state = torch.zeros(states.STATES, tokens, dtype=torch.float32, device=weight.device)
    call = Call(rows, weight, bias, class_weight, temperature, softcap, rounded, first)
    if tokens:
        call.forward(state, want_entropy, want_total)
    results = states.finish(state, _here(rows.target, first, vocab), want_entropy, want_total)
    top_values, top_indices = call.likeliest(top_k)
    top_logprobs = (top_values - results.normalizer[0, :, None]) - results.normalizer[1, :, None]
    ignored, bad = rows.target < 0, rows.target == vocab_size

    def placed(values: Tensor) -> Tensor:
        """``[..., rows]`` of all rows."""
        values = values.masked_fill(ignored, 0)
        return rows.put(values.masked_fill_(bad, math.nan) if values.is_floating_point() else values, count)

    made = (
        placed(results.logprob),
        placed(results.logsumexp),
        placed(results.entropy) if want_entropy else results.entropy,
        placed(results.total) if want_total else results.total,
        placed(top_logprobs.t()).t().contiguous(),
        _placed_indices(rows, top_indices.t().masked_fill(ignored, 0), count),
        placed(results.normalizer),
        states.room_for_logits(hidden_states, weight, num_valid, rounded, softcap, keep_logits_bytes).zero_(),
    )
    if out is not None:
        for given, tensor in zip(out, made, strict=True):
            output(given, tensor.shape, tensor, tensor.dtype).copy_(tensor)
        return out
    return made


def linear_logprob_bwd(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor,
    entropy: Tensor,
    kept: Tensor,
    grad_logprob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_total: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    num_valid: int | None,
    rounded: bool,
    first: int,
    vocab_size: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_hidden_states, grad_weight, grad_bias)``; an empty tensor for each that is not needed. Takes, beside
    them, :data:`GPU_CHUNK_BYTES` and, where there is more than one chunk, the hidden states' gradient in float32."""
    needed = (need_hidden, need_weight, need_bias and bias is not None)
    shapes = (hidden_states.shape, weight.shape, weight.shape[:1])
    grad_hidden, grad_weight, grad_bias = (
        output(out and out[i], shapes[i] if needed[i] else (0,), hidden_states, hidden_states.dtype) for i in range(3)
    )
    rows = _computed_rows(hidden_states, targets, vocab_size, ignore_index, num_valid)
    tokens = rows.target.shape[0]
    if not any(needed) or tokens == 0:
        for gradient in (grad_hidden, grad_weight, grad_bias):
            gradient.zero_()
        return grad_hidden, grad_weight, grad_bias
    vocab, dtype = weight.shape[0], hidden_states.dtype
    # A gradient of what nobody asked for is empty.
    grads = (grad_logprob, grad_logsumexp, grad_entropy, grad_total)
    of_rows = [rows.take(grad) if grad is not None and grad.numel() else None for grad in grads]
    coefficients = states.coefficients(
        *of_rows,
        normalizer=rows.take(normalizer),
        entropy=rows.take(entropy) if entropy.numel() else entropy,
        here=_here(rows.target, first, vocab),
        temperature=temperature,
    )
    # A NaN of an ignored row must not meet its gradient of 0.
    rows = rows._replace(input=torch.where((rows.target < 0)[:, None], 0.0, rows.input))
    call = Call(rows, weight, bias, class_weight, temperature, softcap, rounded, first)
    general = of_rows[2] is not None or of_rows[3] is not None
    columns = _columns(tokens * weight.element_size(), vocab)
    buffer = call.room(columns, dtype)
    row_grad = torch.empty_like(rows.input, memory_format=torch.contiguous_format) if need_hidden else grad_hidden
    sums = row_grad if columns >= vocab or not need_hidden else torch.empty_like(row_grad, dtype=torch.float32)
    for begin in range(0, vocab, columns):
        end = min(begin + columns, vocab)
        gradient = buffer[:tokens, : end - begin]
        parts = call.chunk(buffer, begin, end, coefficients, general, needed[2])
        if need_weight:
            torch.mm(gradient.t(), rows.input, out=grad_weight[begin:end])
        if needed[2]:
            grad_bias[begin:end] = parts[:, : end - begin].sum(0)
        if need_hidden:
            _add_product(sums, gradient, weight[begin:end], begin == 0)
    if need_hidden:
        rows.put_rows(grad_hidden, sums if sums is row_grad else row_grad.copy_(sums))
    return grad_hidden, grad_weight, grad_bias


def _add_product(sums: Tensor, left: Tensor, right: Tensor, assign: bool) -> None:
    """``sums (+)= left @ right``, in float32 where ``sums`` is."""
    if sums.dtype == left.dtype:
        if assign:
            torch.mm(left, right, out=sums)
        else:
            sums.addmm_(left, right)
    elif left.is_cuda and torch.version.hip is None:
        if assign:
            torch.mm(left, right, out_dtype=sums.dtype, out=sums)
        else:
            torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
    else:  # no float32 sums of such products there: each is rounded once
        product = torch.mm(left, right)
        sums.copy_(product) if assign else sums.add_(product)


def _computed_rows(
    hidden_states: Tensor, targets: Tensor, vocab_size: int, ignore_index: int, num_valid: int | None
) -> Rows:
    """Ignored rows last, where there may be any. The order of all others is theirs."""
    count = targets.shape[0]
    some = num_valid if num_valid is not None and num_valid < count else None
    rows = computed_rows(_OP, hidden_states, targets, vocab_size, ignore_index, some, False)
    if num_valid is not None or count == 0:
        return rows
    order = torch.argsort((rows.target < 0).to(torch.uint8), stable=True)
    return Rows(rows.input.index_select(0, order), rows.target.index_select(0, order), order, None)


def _placed_indices(rows: Rows, values: Tensor, count: int) -> Tensor:
    """int64 ``[k, rows]`` as ``[count, k]``: 0 in other rows, those that were left out too."""
    if rows.index is not None:
        values = values.new_zeros(values.shape[0], count).index_copy_(1, rows.index, values)
    return values.t().contiguous()


def _here(target: Tensor, first: int, rows: int) -> Tensor:
    return (target >= first) & (target < first + rows)


def _columns(bytes_each: int, vocab: int) -> int:
    """Words of a chunk; of the last one as many as there are."""
    most = max(1, GPU_CHUNK_BYTES // max(1, bytes_each) // _CHUNK_WORDS)
    return _CHUNK_WORDS * min(most, -(-vocab // _CHUNK_WORDS))


def _table(kernel: str, flags: dict[str, bool], wide: bool) -> str:
    if not flags["DESCRIPTORS"]:
        return kernel
    often = any(flags.get(name) for name in ("HAS_BIAS", "CAPPED", "WEIGHTED", "TOTAL", "LOGITS"))
    light = not often and not (flags["ROUNDED"] and flags["SCALED"])
    return f"{kernel}_{'wide' if wide and light else 'descriptors'}"


class Call:
    """The arguments that every kernel of a call shares."""

    def __init__(
        self,
        rows: Rows,
        weight: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        temperature: float,
        softcap: float,
        rounded: bool,
        first: int,
    ) -> None:
        self.hidden, self.weight, self.target = _dense(rows.input), _dense(weight), rows.target
        self.tokens, self.first = rows.target.shape[0], first
        self.descriptors = _by_descriptors(self.hidden, self.weight)
        counted = torch.arange(1, self.tokens + 1, device=weight.device).masked_fill_(self.target < 0, 0)
        self.live = counted.amax() if self.tokens else counted  # rows from here on are ignored
        self.bias = None if bias is None else bias.contiguous()
        self.class_weight = None if class_weight is None else class_weight.to(torch.float32).contiguous()
        self.scalars = (temperature if rounded else 1.0 / temperature, softcap)
        self.flags = {
            "DESCRIPTORS": self.descriptors,
            "HAS_BIAS": bias is not None,
            "ROUNDED": rounded,
            "SCALED": temperature != 1.0,
            "CAPPED": softcap != 0.0,
            "WEIGHTED": class_weight is not None,
        }

    def config(self, kernel: str, flags: dict[str, bool]) -> Config:
        architecture = gpu.architecture(self.hidden.device)
        return configs.get(_table(kernel, flags, architecture in _WIDE), self.hidden)

    def room(self, columns: int, dtype: torch.dtype) -> Tensor:
        """Of a chunk, in whole tiles; rows that are not computed stay 0."""
        rows = -(-self.tokens // _MOST_ROWS) * _MOST_ROWS
        return torch.zeros(rows, columns, dtype=dtype, device=self.weight.device)

    def forward(self, state: Tensor, centred: bool, total: bool) -> None:
        """Of every row before ``live``; others hold anything."""
        wanted = {"CENTRED": centred, "TOTAL": total}
        flags = {**self.flags, **wanted, "WEIGHTED": total and self.class_weight is not None}
        config, merge = self.config("linear_logprob_fwd", flags), configs.get("linear_logprob_merge", state)
        sizes = config.constexprs
        splits = triton.cdiv(self.weight.shape[0], sizes["BLOCK_V"] * sizes["TILES"])
        partial = state.new_empty(splits, 3 + centred + total, self.tokens)
        vectors = (self.class_weight if total else None, self.target, self.live, partial)
        units = splits * triton.cdiv(self.tokens, sizes["BLOCK_T"])
        with current_device(state):
            _linear_logprob_fwd_kernel[self._grid(units)](
                *self._operands(config, vectors),
                *self._sizes(),
                self.first,
                *self.scalars,
                **flags,
                **config.options(),
            )
            grid = (triton.cdiv(self.tokens, merge.constexprs["BLOCK_T"]),)
            _linear_logprob_merge_kernel[grid](partial, state, splits, self.tokens, **wanted, **merge.options())

    def chunk(
        self,
        result: Tensor,
        begin: int,
        end: int,
        coefficients: Tensor | None,
        general: bool = False,
        need_bias: bool = False,
    ) -> Tensor:
        """The logits' gradient of the words from ``begin`` to ``end``, or without ``coefficients`` their logits, into
        ``result``. Returns the gradient's sums by blocks of rows, float32 ``[blocks, columns of result]``, if wanted.
        """
        given = self.target if coefficients is None else coefficients
        vectors = (self.class_weight if general else None, self.target, self.live, given)
        flags = {
            **self.flags,
            "GENERAL": general,
            "WEIGHTED": general and self.class_weight is not None,
            "NEED_BIAS": need_bias,
            "LOGITS": coefficients is None,
        }
        config = self.config("linear_logprob_bwd", flags)
        sizes = config.constexprs
        blocks = triton.cdiv(self.tokens, sizes["BLOCK_T"])
        assert result.shape[0] >= blocks * sizes["BLOCK_T"]
        # Blocks that are not computed add nothing.
        parts = result.new_zeros(blocks if need_bias else 0, result.shape[1], dtype=torch.float32)
        by_descriptor = self.descriptors and coefficients is not None
        to = TensorDescriptor.from_tensor(result, [sizes["BLOCK_T"], sizes["BLOCK_V"]]) if by_descriptor else result
        tiles = blocks * triton.cdiv(end - begin, sizes["BLOCK_V"])
        with current_device(result):
            _linear_logprob_bwd_kernel[self._grid(tiles)](
                *self._operands(config, vectors),
                to,
                result.stride(0),
                parts if need_bias else result,
                *self._sizes(),
                self.first,
                begin,
                end,
                *self.scalars,
                **flags,
                **config.options(),
            )
        return parts

    def likeliest(self, count: int) -> tuple[Tensor, Tensor]:
        """``[T, k]``: logits and words, the likeliest first, the smaller word first where they are equal."""
        like = self.hidden
        if count == 0 or self.tokens == 0:
            shape = (self.tokens, count)
            return like.new_zeros(shape, dtype=torch.float32), like.new_zeros(shape, dtype=torch.int64)
        vocab = self.weight.shape[0]
        columns = _columns(self.tokens * (4 + 8 + 8), vocab)
        logits = self.room(columns, torch.float32)
        best = like.new_empty((self.tokens, 0), dtype=torch.int64)
        for begin in range(0, vocab, columns):
            end = min(begin + columns, vocab)
            self.chunk(logits, begin, end, None)
            keys = _keys(logits[: self.tokens, : end - begin], self.first + begin)
            found = keys.topk(min(count, end - begin), dim=1).values
            best = torch.cat((best, found), 1)
            best = best.topk(min(count, best.shape[1]), dim=1).values
        return _values_of(best)

    def _operands(self, config: Config, vectors: tuple[Tensor | None, ...]) -> list[Any]:
        operands: list[Any] = []
        for matrix, block in ((self.hidden, "BLOCK_T"), (self.weight, "BLOCK_V")):
            tile = [config.constexprs[block], config.constexprs["BLOCK_D"]]
            operands += [TensorDescriptor.from_tensor(matrix, tile) if self.descriptors else matrix, matrix.stride(0)]
        operands.append(self.weight if self.bias is None else self.bias)
        return operands + [self.target if vector is None else vector for vector in vectors]

    def _sizes(self) -> tuple[int, int, int]:
        return (self.tokens, *self.weight.shape)

    def _grid(self, units: int) -> tuple[int]:
        return (min(units, _processors(self.hidden.device) * _PROGRAMS_PER_PROCESSOR[self.descriptors]),)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _by_descriptors(*matrices: Tensor) -> bool:
    """float32 has no tensor cores' precision, and so nothing to hurry for."""
    if matrices[0].dtype is torch.float32 or gpu.architecture(matrices[0].device) not in _DESCRIPTORS:
        return False
    return all(
        matrix.numel() > 0
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        for matrix in matrices
    )


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_LAST_WORD = 2**32 - 1


def _keys(logits: Tensor, first: int) -> Tensor:
    """int64 whose order is that of the logits, NaN above all, and the smaller word above where they are equal."""
    bits = logits.add(0.0).nan_to_num_(math.nan, math.inf, -math.inf).view(torch.int32)  # no -0, one NaN
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    word = torch.arange(first, first + logits.shape[1], device=logits.device)
    return (ordered << 32) | (_LAST_WORD - word)


def _values_of(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), _LAST_WORD - (keys & _LAST_WORD)


def _work(dtype: str, kind: str) -> Work:
    """Of 8192 rows, D 4096 and V 131072; of the backward, one chunk: each input and output once, and the products."""
    rows, dim, vocab = 8192, 4096, 131072
    if kind == "bwd":
        vocab = GPU_CHUNK_BYTES // SIZES[dtype] // rows
    moved, count = (rows + vocab) * dim * SIZES[dtype] + 8 * rows, rows * vocab
    if kind == "fwd":  # the state of one split at least
        return Work(f"[{rows}, {dim}] × [{vocab}, {dim}]", moved + 3 * 4 * rows, count * (2 * dim + 4))
    moved += 4 * 6 * rows + count * SIZES[dtype]
    return Work(f"[{rows}, {dim}] × [{vocab}, {dim}]", moved, count * (2 * dim + 4))


def _signature(kind: str, config: Config, flags: dict[str, bool]) -> str:
    def matrix(*blocks: str) -> str:
        sizes = ",".join(str(config.constexprs[name]) for name in blocks)
        return f"tensordesc<T[{sizes}]>" if flags["DESCRIPTORS"] else "*T/16"

    weights = "*fp32/16" if flags["WEIGHTED"] else "*i64/16"
    both = f"{matrix('BLOCK_T', 'BLOCK_D')} i32/16 {matrix('BLOCK_V', 'BLOCK_D')} i32/16"
    start = f"{both} *T/16 {weights} *i64/16 *i64/16"
    if kind == "fwd":
        return f"{start} *fp32/16 i32 i32 i32/16 i32 fp32 fp32"
    parts = "*fp32/16" if flags["NEED_BIAS"] or flags["LOGITS"] else "*T/16"
    made = "*i64/16 *fp32/16" if flags["LOGITS"] else f"*fp32/16 {matrix('BLOCK_T', 'BLOCK_V')}"
    return f"{start} {made} i32/16 {parts} i32 i32 i32/16 i32 i32 i32 fp32 fp32"


_FLAGS = ("HAS_BIAS", "ROUNDED", "SCALED", "CAPPED", "WEIGHTED")
_FORWARD = (*_FLAGS, "CENTRED", "TOTAL")
_BACKWARD = (*_FLAGS, "GENERAL", "NEED_BIAS", "LOGITS")
# What is declared of each kernel, in bf16, besides the plainest; the last one is nobody's call.
FORWARDS = {
    "entropy": ("CENTRED",),
    "hf": ("ROUNDED",),
    "temperature, entropy": ("SCALED", "CENTRED"),
    "hf, bias, temperature": ("ROUNDED", "HAS_BIAS", "SCALED"),
    "softcap": ("CAPPED",),
    "total": ("TOTAL",),
    "all": _FORWARD,
}
BACKWARDS = {
    "entropy": ("GENERAL",),
    "hf": ("ROUNDED",),
    "temperature, entropy": ("SCALED", "GENERAL"),
    "hf, bias, temperature": ("ROUNDED", "HAS_BIAS", "NEED_BIAS", "SCALED"),
    "softcap": ("CAPPED",),
    "all": _BACKWARD[:-1],
    "logits": ("LOGITS",),
}


def _declared() -> list[Build]:
    """Every row of the tables for every dtype that it serves; in bf16 with what a call may ask for."""
    builds: list[Build] = []

    def declare(kind: str, dtype: str, descriptors: bool, note: str, chosen: tuple[str, ...]) -> None:
        kernel, names = {
            "fwd": (_linear_logprob_fwd_kernel, _FORWARD),
            "bwd": (_linear_logprob_bwd_kernel, _BACKWARD),
        }[kind]
        flags = {"DESCRIPTORS": descriptors, **{name: name in chosen for name in names}}
        for wide in (False, True)[: 1 + descriptors]:
            table = _table(f"linear_logprob_{kind}", flags, wide)
            if wide and not table.endswith("wide"):
                continue
            light = _table("", flags, True) == "_wide"
            only = _WIDE if wide else tuple(t for t in _DESCRIPTORS if not light or t not in _WIDE)
            for row, targets in configs.shipped(table, dtype):
                served = tuple(target for target in targets if not descriptors or target in only)
                # AMD's matrix units have float32's precision.
                parts = ([t for t in served if t.startswith("sm")], [t for t in served if not t.startswith("sm")])
                for some, matrix in zip(parts if dtype == "fp32" else (served,), (dtype != "fp32", True), strict=False):
                    title = (table.partition(f"_{kind}")[2].strip("_"), note, "mfma" * (matrix and dtype == "fp32"))
                    build = Build(
                        kernel,
                        dtype,
                        _signature(kind, row.config, flags),
                        {**flags, **row.config.constexprs},
                        row.config.num_warps,
                        row.config.num_stages,
                        hot=note not in ("all", "logits"),
                        note=", ".join(part for part in title if part),
                        work=_work(dtype, kind),
                        matrix=matrix,
                        targets=tuple(some),
                    )
                    builds.append(build)

    for dtype in SIZES:
        for descriptors in (False, True)[: 1 + (dtype != "fp32")]:
            for kind, variants in (("fwd", FORWARDS), ("bwd", BACKWARDS)):
                declare(kind, dtype, descriptors, "", ())
                for note, chosen in variants.items() if dtype == "bf16" else ():
                    declare(kind, dtype, descriptors, note, chosen)
    for row, targets in configs.shipped("linear_logprob_merge", "fp32"):
        splits, rows = 128, 8192
        for centred, total in ((False, False), (True, False), (True, True)):
            read = 3 + centred + total
            builds.append(
                Build(
                    _linear_logprob_merge_kernel,
                    "fp32",
                    "*fp32/16 *fp32/16 i32 i32",
                    {"CENTRED": centred, "TOTAL": total, **row.config.constexprs},
                    row.config.num_warps,
                    row.config.num_stages,
                    note=", ".join(["entropy"] * centred + ["total"] * total),
                    work=Work(f"[{splits}, {read}, {rows}]", 4 * rows * (splits * read + 5), 4 * splits * rows),
                    targets=targets,
                )
            )
    return builds


KERNELS = _declared()
