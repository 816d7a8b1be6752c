"""A whole number divided in proportion, with nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MOST = 2**40  # beyond it, float64 has too few digits for the remainders


def largest_remainder(weights: Sequence[float] | np.ndarray, total: int) -> np.ndarray:
    """Whole shares of ``total`` in proportion to ``weights`` (Hamilton's method).

    Args:
        weights: ``[N]``, finite and not negative; all zero means equal.
        total: 0 to 2^40; N may be 0 only if it is 0.

    Returns:
        int64 ``[N]``, whose sum is ``total``; each differs from its exact share by less than 1. Of equal remainders the
        first in order gets the one that is left over.

    Raises:
        ValueError: weights or total are not so.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if shares.ndim != 1 or not np.isfinite(shares).all() or (shares < 0).any():
        raise ValueError(f"weights must be finite numbers of at least 0, in one dimension; got {weights!r:.100}")
    if not 0 <= total <= (_MOST if len(shares) else 0):
        raise ValueError(f"total must be 0 to 2^40, and 0 for no weights; got {total} for {len(shares)} weights")
    if not len(shares):
        return np.zeros(0, dtype=np.int64)
    if not shares.any():
        shares = np.ones_like(shares)
    shares = shares / shares.max()  # so that no sum of large weights overflows, and no small one is lost
    exact = total * (shares / shares.sum())
    whole = np.floor(exact).astype(np.int64)
    # Remainders that differ by rounding alone are equal, so that order decides and not the last bit.
    left = np.round(exact - whole, 9)
    whole[np.argsort(-left, kind="stable")[: total - whole.sum()]] += 1
    return whole
