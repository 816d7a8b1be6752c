"""The language model's layers over a cache: the operations of :class:`m4ov.models.qwen3_vl.Qwen3VL`, in its order, with
fewer calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from m4ov.generate import cache
from m4ov.generate.cache import Slab
from m4ov.generate.step import native_step
from m4ov.generate.weights import linear_of
from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.models.qwen3_vl.text import Placed
from m4ov_kernels import deepstack_add, invariant, qk_norm_mrope, scatter_vision, swiglu, varlen_attention
from m4ov_kernels.attention import VARLEN_ATTENTION
from m4ov_kernels.dispatch import requested, requesting_invariance
from m4ov_kernels.nn.quantized_pair import quantized_swiglu
from m4ov_kernels.packing import PackedBatch

# ``(layer, q, k, v)`` → ``[T, H, D]``: keeps keys and values, and attends.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class _Layer:
    """A decoder layer's modules, looked up once."""

    def __init__(self, layer: Any, shared: bool, weights: str) -> None:
        def of(module: nn.Module) -> Any:
            return linear_of(module, shared=shared, weights=weights)

        attention = layer.self_attn
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q, self.k, self.v, self.o = (of(getattr(attention, f"{name}_proj")) for name in "qkvo")
        self.attention, self.shared = attention, shared
        self.mlp = layer.mlp if layer.sparse else None
        if self.mlp is None:
            self.gate, self.up, self.down = (of(getattr(layer.mlp, f"{name}_proj")) for name in ("gate", "up", "down"))

    def project(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`m4ov_kernels.nn.TextAttention.project`."""
        attention = self.attention
        shape = (hidden_states.shape[0], -1, attention.head_dim)
        q, k, v = (linear(hidden_states).view(shape) for linear in (self.q, self.k, self.v))
        rotation, norm = attention.rotation, attention.q_norm
        q, k = qk_norm_mrope(
            q,
            k,
            norm.weight,
            attention.k_norm.weight,
            position_ids,
            mrope_section=rotation.mrope_section,
            theta=rotation.theta,
            eps=float(norm.variance_epsilon),
            interleaved=rotation.interleaved,
        )
        return q, k, v

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        if self.mlp is not None:
            if not self.shared:
                made: Tensor = self.mlp(hidden_states)[0]
                return made
            with invariant():
                made = self.mlp(hidden_states)[0]
            return made
        activated = quantized_swiglu(self.gate, self.up, hidden_states)
        if activated is None:
            activated = swiglu(self.gate(hidden_states), self.up(hidden_states))
        return self.down(activated)  # type: ignore[no-any-return]


class Places(NamedTuple):
    """Where n samples stand, int64 ``[n]`` each, in the order of ``offset``; together ``[6, n]``.

    Attributes:
        token: that comes next.
        position: of it, in all three axes.
        prefix, prompt: their prompt's run of the slab, and its length.
        offset, length: their own run, and how much of it is filled.
    """

    token: np.ndarray
    position: np.ndarray
    prefix: np.ndarray
    prompt: np.ndarray
    offset: np.ndarray
    length: np.ndarray


class Decoder:
    """Hidden states of prompts and of single tokens, with a :class:`Slab` that remembers.

    Args:
        shared: the bits of the model's own packed forward inside :func:`m4ov_kernels.invariant`.
        weights: see :class:`m4ov.generate.Engine`.
    """

    def __init__(self, model: Qwen3VL, slab: Slab, *, shared: bool, weights: str) -> None:
        text = model.model.language_model
        self.model, self.slab, self.shared = model, slab, shared
        self.embedding, self.norm = text.embed_tokens, text.norm
        self.layers = [_Layer(layer, shared, weights) for layer in text.layers]
        self._step = native_step(text, slab) if shared and weights == "model" else None

    def prefill(self, batch: PackedBatch, target: Tensor) -> Tensor:
        """Read prompts: normalised hidden states ``[N, D]`` of the last token of each. The tower sees each image once,
        whoever asks. ``target``: int64 ``[T]``, where in the slab the tokens' keys and values are kept."""
        embeddings, placed = self._see(batch)
        scale = self.layers[0].attention.scaling

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.slab.keys[layer].index_copy_(0, target, k)
            self.slab.values[layer].index_copy_(0, target, v)
            return varlen_attention(
                q, k, v, batch.cu_seqlens, causal=True, max_seqlen=batch.max_seqlen, scale=scale, invariant=self.shared
            )

        return self._run(embeddings, batch.position_ids, attend, placed, batch.cu_seqlens[1:].long() - 1)

    def decode(self, table: np.ndarray) -> Tensor:
        """One token of each sample; ``table``: :class:`Places`, int64 ``[6, n]``: normalised hidden states ``[n, D]``.

        By one native call where the model is plain (:mod:`m4ov.generate.step`), else operator by operator: the same
        bits."""
        if self._step is not None and requested() in (None, "native"):
            made: Tensor = self._step(torch.from_numpy(table))
            return made
        places, device = Places(*table), self.slab.keys[0].device
        target = torch.from_numpy(places.offset + places.length).to(device)
        position_ids = torch.from_numpy(np.broadcast_to(places.position, (3, table.shape[1])).copy()).to(device)
        attention = self._attention(places)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept_keys, kept_values = self.slab.keys[layer], self.slab.values[layer]
            kept_keys.index_copy_(0, target, k)
            kept_values.index_copy_(0, target, v)
            return attention(q, kept_keys, kept_values)

        embeddings = self.embedding(torch.from_numpy(places.token).to(device))
        return self._run(embeddings, position_ids, attend, None, None)

    def _attention(self, places: Places) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Of single queries over the slab, whose next tokens are in it: keys and values where they lie, by the compiled
        kernel; by others, gathered."""
        slab, text = self.slab.keys[0], self.model.config.text
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        scale, lengths = self.layers[0].attention.scaling, places.length + 1
        implementation = VARLEN_ATTENTION.select(slab.device, slab.dtype)
        if implementation is not None and implementation.backend == "native":
            from m4ov_kernels.attention.native import FEW_LANES, decode_attention

            if heads // kv_heads <= FEW_LANES:
                table = torch.from_numpy(np.stack([places.prefix, places.prompt, places.offset, lengths]))
                return partial(decode_attention, places=table, scale=scale)
        tokens, keys = (x.to(slab.device) for x in cache.gathered(places.offset, lengths, places.prefix, places.prompt))
        queries = torch.arange(len(lengths) + 1, device=slab.device)
        longest = int((places.prompt + lengths).max())

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k.index_select(0, tokens), v.index_select(0, tokens)
            return varlen_attention(
                q,
                k,
                v,
                queries,
                cu_seqlens_k=keys,
                causal=True,
                max_seqlen=1,
                max_seqlen_k=longest,
                scale=scale,
                invariant=self.shared,
            )

        return attend

    def _see(self, batch: PackedBatch) -> tuple[Tensor, Placed | None]:
        embeddings: Tensor = self.embedding(batch.input_ids)
        if batch.images is None and batch.videos is None:
            return embeddings, None
        if self.shared:
            with invariant():
                seen = self.model.model.see(batch)
        else:
            seen = self.model.model.see(batch)
        assert seen is not None
        features, positions = seen
        embeddings = scatter_vision(embeddings, features.merged.to(embeddings.dtype), positions)
        return embeddings, Placed(positions, features.deepstack)

    def _run(
        self, hidden: Tensor, position_ids: Tensor, attend: Attend, placed: Placed | None, last: Tensor | None
    ) -> Tensor:
        """``last``: the rows that are asked for; ``None``: all. A layer's sum of two branches is left to the norm that
        follows it."""
        made: Tensor | None = None
        deep = () if placed is None else placed.layers
        for index, layer in enumerate(self.layers):
            if made is None:
                normed = layer.input_norm(hidden)
            else:
                normed, hidden = layer.input_norm(made, residual=hidden)
            q, k, v = layer.project(normed, position_ids)
            attended = attend(index, q, k, v).flatten(1)
            if last is not None and index == len(self.layers) - 1 and index >= len(deep):
                attended, hidden = attended.index_select(0, last), hidden.index_select(0, last)
                last = None
            normed, hidden = layer.post_norm(layer.o(attended), residual=hidden)
            made = layer.feed_forward(normed)
            if placed is not None and index < len(deep):
                hidden = deepstack_add(hidden + made, deep[index].to(hidden.dtype), placed.positions)
                made = None
        if last is not None:
            hidden, made = hidden.index_select(0, last), None if made is None else made.index_select(0, last)
        normed = self.norm(hidden) if made is None else self.norm(made, residual=hidden)[0]
        return normed  # type: ignore[no-any-return]


@contextmanager
def quietly(shared: bool) -> Iterator[None]:
    """The block in which a :class:`Decoder` runs: without gradients; where numerics are shared, operators that would
    choose by the number of rows do not."""
    with torch.no_grad(), requesting_invariance() if shared else nullcontext():
        yield
