"""Which token comes next: by counter-based random numbers, so that a sample's draws follow from its seed and the place
of the token, and a row's result from nothing but its own logits and draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4ov.generate.head import Logits

Array = np.ndarray[Any, Any]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_CANDIDATES = 1024  # of the likeliest tokens, in which top-p looks first


def _mixed(x: Array) -> Array:
    """SplitMix64's output function."""
    x = (x ^ (x >> _SHIFTS[0])) * _FACTORS[0]
    x = (x ^ (x >> _SHIFTS[1])) * _FACTORS[1]
    mixed: Array = x ^ (x >> _SHIFTS[2])
    return mixed


def keys(seed: int, samples: Array) -> Array:
    """uint64 ``[n]``: where the draws of some samples begin. Sample ``i`` of ``seed`` is sample 0 of ``seed + i``."""
    return _mixed(np.uint64(seed % 2**64) + samples.astype(np.uint64))


def uniforms(key: Array, places: Array) -> Array:
    """float64 ``[n]`` in [0, 1), multiples of 2^-53: the draw of the ``places[n]``-th token (from 0) of a sample.

    Source: output ``places + 1`` of SplitMix64 with the state ``key`` (Steele, Lea, Flood, "Fast Splittable
    Pseudorandom Number Generators", 2014).
    """
    drawn = _mixed(key + (places.astype(np.uint64) + np.uint64(1)) * _STEP)
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def tokens(made: Logits, which: Array, rows: Array, finite: Array) -> Array:
    """What is drawn for some samples (:data:`m4ov.generate.requests.ROW`), int64 ``[n]``; 0 where logits are not
    finite. ``which``: of the logits' rows each sample's own.

    A sample without ``top_k`` and ``top_p`` draws by a compiled kernel where the head's is one, others by
    :func:`choose`: the two round exponentials differently, and no sample goes from one to the other.
    """
    found = np.zeros(len(rows), dtype=np.int64)
    greedy, top_k = rows["temperature"] == 0, rows["top_k"]
    plain = ~greedy & (rows["top_p"] >= 1) & ((top_k == 0) | (top_k >= made.values.shape[1]))
    if made.columns is None:
        plain[:] = False
    others = ~greedy & ~plain & finite

    def of(places: Array) -> Tensor:
        return torch.from_numpy(which[places]).to(made.values.device)

    if made.columns is not None and plain.any():
        from m4ov_kernels.decoding.native import choose_tokens

        column, draws = of(plain), torch.from_numpy(uniforms(rows["key"][plain], rows["count"][plain]))
        found[plain] = choose_tokens(made.columns, column, made.largest[column], draws).numpy()
    if greedy.any():
        found[greedy] = made.values[of(greedy)].argmax(-1).cpu().numpy()
    if others.any():
        some, row = rows[others], of(others)
        values, largest = (x[row].contiguous().cpu().numpy() for x in (made.values, made.largest))
        wanted = uniforms(some["key"], some["count"])
        found[others] = choose(values, largest, wanted, some["top_k"], some["top_p"])
    found[~finite] = 0
    return found


def choose(logits: Array, largest: Array, draws: Array, top_k: Array, top_p: Array) -> Array:
    """Tokens ``[n]`` by inversion: the first whose cumulative probability, in the order of the vocabulary, exceeds the
    draw.

    Every step is elementwise or along a row in one order (NumPy's ``exp`` computes all elements alike; sums are
    sequential, in float64), so a row's token does not depend on other rows. One pass of ``exp`` over the vocabulary and
    one random number a row; Gumbel's trick would need a random number and two logarithms for every word.

    Args:
        logits: float32 ``[n, V]``, contiguous, without NaN; divided by the temperature. Not changed.
        largest: float32 ``[n]``, the largest of each row.
        draws: float64 ``[n]``, in [0, 1).
        top_k: int64 ``[n]``; 0: all.
        top_p: float64 ``[n]``; 1: all.
    """
    weights = np.exp(logits - largest[:, None])
    for k in np.unique(top_k[(top_k > 0) & (top_k < logits.shape[1])]):
        rows = np.nonzero(top_k == k)[0]
        some = logits[rows]
        least = np.partition(some, -k, axis=1)[:, -k]
        weights[rows] = np.where(some >= least[:, None], weights[rows], np.float32(0))
    rows = np.nonzero(top_p < 1)[0]
    if len(rows):
        weights[rows] = _nucleus(weights[rows], top_p[rows], _CANDIDATES)
    sums = np.cumsum(weights, axis=1, dtype=np.float64)
    total = sums[:, -1]
    wanted = np.minimum(draws * total, np.nextafter(total, 0.0))
    chosen: Array = (sums <= wanted[:, None]).sum(1)
    return chosen


def _nucleus(weights: Array, top_p: Array, candidates: int) -> Array:
    """``weights`` ``[n, V]`` with zeros outside the smallest set of the largest (of equals the first) that has
    ``top_p[n]`` of the sum."""
    words = weights.shape[1]
    wanted = top_p * np.cumsum(weights, axis=1, dtype=np.float64)[:, -1]
    if candidates < words:
        places = np.argpartition(weights, -candidates, axis=1)[:, -candidates:]
        # Of weights equal to the least of the candidates some may be outside: a row that needs it is sorted whole.
        least = np.take_along_axis(weights, places, 1).min(1)
        places.sort(axis=1)
    else:
        places, least = np.broadcast_to(np.arange(words), weights.shape), None
    some = np.take_along_axis(weights, places, 1)
    order = np.argsort(-some, axis=1, kind="stable")
    some, places = np.take_along_axis(some, order, 1), np.take_along_axis(places, order, 1)
    before = np.cumsum(some, axis=1, dtype=np.float64) - some
    inside = before < wanted[:, None]
    kept = np.zeros_like(weights)
    np.put_along_axis(kept, places, np.where(inside, some, np.float32(0)), 1)
    if least is not None:
        (whole,) = np.nonzero((inside & (some <= least[:, None])).any(1))
        if len(whole):
            kept[whole] = _nucleus(weights[whole], top_p[whole], words)
    return kept
