"""A step of decoding through the compiled kernels (CPU)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from m4ov_kernels import _C
from m4ov_kernels.attention.native import FEW_LANES
from m4ov_kernels.layout import DTYPES, scratch
from m4ov_kernels.rope.frequencies import tables
from m4ov_kernels.rope.qk_norm_mrope import MAX_DIM

#: Of a layer, in the order of csrc/decoding/kernels.h. Biases may be ``None``.
LAYER = (
    *("input_norm", "q", "q_bias", "k", "k_bias", "v", "v_bias", "q_norm", "k_norm", "o", "o_bias"),
    *("post_norm", "gate", "gate_bias", "up", "up_bias", "down", "down_bias", "keys", "values"),
)


class DecodeStep:
    """One token of each of some samples through an embedding, decoder layers and a last norm, in one call.

    A layer is pre-norm: grouped-query attention with an RMSNorm of each head of queries and keys and a rotation, then
    SwiGLU; norms and activation round as Hugging Face rounds. The bits are those of :func:`m4ov_kernels.rms_norm`,
    ``invariant_linear``, :func:`~m4ov_kernels.qk_norm_mrope` (a position is that of all axes),
    :func:`~m4ov_kernels.varlen_attention` and :func:`~m4ov_kernels.swiglu`, one after the other: a row's depend on
    nothing but its own token, position, keys and the weights. No graph is recorded.

    Args:
        layers: of each layer its tensors by the names of :data:`LAYER`. Projections ``[out, in]``; ``keys``,
            ``values``: ``[..., KV, D]``, into which each call writes the token's own.
        embedding: ``[V, width]``.
        norm: ``[width]``.
        heads, kv_heads, dim: of queries, of keys and values, and the width of one.
        theta: base of the rotation's frequencies.
        eps: of all norms.
        scale: of the scores.

    All tensors: of one dtype (float32, bfloat16, float16), on the CPU, contiguous; they are held, and read where they
    lie at each call.

    Raises:
        ValueError: a tensor is none of these or of another shape, or there are more than ``FEW_LANES`` query heads for
            each key head.
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, Tensor | None]],
        embedding: Tensor,
        norm: Tensor,
        *,
        heads: int,
        kv_heads: int,
        dim: int,
        theta: float,
        eps: float,
        scale: float,
    ) -> None:
        if not heads % kv_heads == 0 or not heads // kv_heads <= FEW_LANES or dim % 2 or not 2 <= dim <= MAX_DIM:
            raise ValueError(
                f"DecodeStep: heads must be at most {FEW_LANES} times kv_heads, a multiple of them, and dim an even "
                f"number up to {MAX_DIM}; got {heads}, {kv_heads} and {dim}"
            )
        width, q_width, k_width = embedding.shape[1], heads * dim, kv_heads * dim
        gate = layers[0]["gate"]
        inner = 0 if gate is None else gate.shape[0]
        projections = {"q": (q_width, width), "k": (k_width, width), "v": (k_width, width), "o": (width, q_width)}
        projections |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        shapes: dict[str, tuple[int, ...]] = {f"{name}_bias": shape[:1] for name, shape in projections.items()}
        shapes |= {**projections, "input_norm": (width,), "post_norm": (width,), "q_norm": (dim,), "k_norm": (dim,)}
        self._like = embedding
        table = [[self._address(name, layer[name], shapes.get(name)) for name in LAYER] for layer in layers]
        self._layers = torch.tensor(table)
        self._frequencies = tables(theta, dim, (), True, embedding.device).widened
        self._alive = [dict(layer) for layer in layers], norm
        self._fixed = (
            self._address("embedding", embedding, (embedding.shape[0], width)),
            self._address("norm", norm, (width,)),
            self._layers.data_ptr(),
        )
        self._sizes = (len(layers), width, heads, kv_heads, dim, inner)
        self._options = (eps, scale, DTYPES[embedding.dtype])
        self._size, self._memory = 0, scratch(0)

    def _address(self, name: str, tensor: Tensor | None, shape: tuple[int, ...] | None) -> int:
        if tensor is None and name.endswith("_bias"):
            return 0
        like = self._like
        fits = tensor is not None and (shape is None or tensor.shape == shape)
        if not fits or tensor.dtype is not like.dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():  # type: ignore[union-attr]
            got = "none" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            expected = "[..., KV, D]" if shape is None else list(shape)
            raise ValueError(f"DecodeStep: {name} must be contiguous {expected} of {like.dtype} on the CPU; got {got}")
        return tensor.data_ptr()  # type: ignore[union-attr]

    def __call__(self, places: Tensor) -> Tensor:
        """Normalised hidden states ``[n, width]``.

        Args:
            places: int64 ``[6, n]``, contiguous, checked: of each sample its token; that one's position; the first
                token and the number of keys of its prompt among ``keys`` and ``values`` (samples may share a prompt);
                the first of its own, and how many of these are there. This token's keys and values are written behind
                them.
        """
        rows = places.shape[1]
        normed = torch.empty(rows, self._sizes[1], dtype=self._like.dtype)
        table = places.data_ptr()
        addresses = [normed.data_ptr(), *self._fixed, *(table + 8 * rows * i for i in range(6))]
        arguments = ((rows, *self._sizes), *self._options, torch.get_num_threads())
        if rows:
            size = _C.decode_step([*addresses, self._frequencies.data_ptr(), 0], *arguments)
            if size > self._size:
                self._size, self._memory = size, scratch(size)
            _C.decode_step([*addresses, self._frequencies.data_ptr(), self._memory[1]], *arguments)
        return normed


def choose_tokens(logits: Tensor, column: Tensor, largest: Tensor, draws: Tensor) -> Tensor:
    """Tokens int64 ``[n]`` by inversion: of each row the first whose cumulative probability, in the order of the
    vocabulary, exceeds the draw; sums in float64. A row's token depends on its own logits and draw alone; where logits
    are not finite it is any.

    Args:
        logits: float32 ``[V, columns]``, contiguous: what softmax is taken of, a state in each column.
        column: int64 ``[n]``: which of them is the row's; checked.
        largest: float32 ``[n]``: of the row's logits.
        draws: float64 ``[n]``, in [0, 1).
    """
    rows = column.shape[0]
    tokens = torch.empty(rows, dtype=torch.int64)
    addresses = [tensor.data_ptr() for tensor in (tokens, logits, column, largest, draws)]
    arguments = ((rows, *logits.shape), torch.get_num_threads())
    _memory, address = scratch(_C.choose_tokens([*addresses, 0], *arguments))
    _C.choose_tokens([*addresses, address], *arguments)
    return tokens
