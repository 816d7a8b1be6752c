"""``policy_loss``: GRPO, Dr.GRPO, DAPO, GSPO and CISPO, with KL, entropy and rollout correction, on packed rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.head.losses import corrections, kl
from m4ov_kernels.head.losses import metrics as watched
from m4ov_kernels.head.losses import rows as packed
from m4ov_kernels.head.losses.rows import Rows, option

_OP = "policy_loss"
AGGREGATIONS = ("token", "sequence")


class _Kind(NamedTuple):
    aggregation: str
    clip_low: float | None
    clip_high: float
    sequence_ratio: bool = False
    weighted: bool = False  # the ratio is a constant weight of log π, instead of what is differentiated


KINDS = {
    "grpo": _Kind("sequence", 0.2, 0.2),
    "dr_grpo": _Kind("token", 0.2, 0.2),
    "dapo": _Kind("token", 0.2, 0.28),
    "gspo": _Kind("sequence", 3e-4, 4e-4, sequence_ratio=True),
    "cispo": _Kind("token", None, 4.0, weighted=True),
}


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    normalizer: float | Tensor,
    kind: str = "grpo",
    advantages_per: str | None = None,
    mask: Tensor | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    aggregation: str | None = None,
    ref_logprob: Tensor | None = None,
    exact_kl: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_logprob: Tensor | None = None,
    correction: str | None = None,
    correction_level: str = "token",
    correction_low: float | None = None,
    correction_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a policy on packed responses, to be minimised, and what people watch of it.

    With ``ρ = exp(log π − log π_old)`` of each token and A its advantage:

    =========  ==========================================================  ========================  ================
    kind       term of a token                                             summed, and divided by    clip_low/high
    =========  ==========================================================  ========================  ================
    grpo       ``−min(ρA, clip(ρ, 1 − low, 1 + high) A)``                  means of sequences;       0.2, 0.2
                                                                           number of sequences
    dr_grpo    the same                                                    tokens; ``B · L_max``     0.2, 0.2
    dapo       the same                                                    tokens; number of tokens  0.2, 0.28
    gspo       the same with ``s = exp(mean of log ρ over the sequence)``  means of sequences;       3e-4, 4e-4
               as ``sg[s] · π / sg[π]``                                    number of sequences
    cispo      ``−sg[min(ρ, 1 + high)] · A · log π``                       tokens; number of tokens  None, 4.0
    =========  ==========================================================  ========================  ================

    and then ``+ kl_coef · KL − entropy_coef · H``, summed in the same way. ``log ρ`` is cut at ±20, beyond which a
    ratio is a constant without gradient: no exponential overflows.

    ``normalizer`` is that of the **whole** step: of all micro-batches and ranks. Gradients then add up, over any split
    of the sequences, to those of one call (where ranks' gradients are averaged, multiply by their number).

    Args:
        logprob: ``[T]`` float32 or float64, nats: log-probabilities of the response tokens under the policy that is
            trained, as :func:`linear_logprob` gives them.
        old_logprob: ``[T]``, of the policy before this step's updates; ``None``: there were none, the ratio is 1.
        advantages: ``[n]``, one a sequence, or ``[T]``, one a token.
        cu_seqlens: ``[n + 1]`` int32 or int64, on the device of ``logprob``: sequence ``i`` has the rows
            ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``. Starts at 0, never falls, ends at ``T``. Sequences may be empty.
        normalizer: what the sum is divided by, see the table: a number, or a tensor with one element (on the device of
            ``logprob`` or the CPU).
        kind: of the table.
        advantages_per: ``"sequence"`` or ``"token"``; ``None``: by their shape, a sequence where ``n = T``.
        mask: bool ``[T]``, True in rows that count (``targets != ignore_index``). Others may hold anything, NaN too,
            and have no gradient. ``None``: all count.
        clip_low, clip_high: other distances of the bounds from 1 than the kind's. ``clip_low`` gives CISPO a lower
            bound.
        dual_clip: with a negative advantage, a token's term is at most ``−dual_clip · A``; above 1; not with "cispo".
        aggregation: ``"token"``: sum of tokens. ``"sequence"``: sum of the sequences' means over the tokens that count.
            ``None``: the kind's.
        ref_logprob: ``[T]``, of a reference policy; gives the metrics ``ref_kl_*``, and with ``kl_coef`` the KL term.
        exact_kl: ``[T]``, the divergence from the reference over the whole vocabulary, for ``kl_kind="exact"``:
            ``linear_kl(…, kind="reverse", mask=mask)``.
        kl_coef: of the KL term, 0 or more.
        kl_kind: ``"k1"``, ``"k2"``, ``"k3"`` (:func:`kl_estimate`) or ``"exact"``.
        entropy: ``[T]``, nats, of the policy that is trained.
        entropy_coef: of the entropy bonus; subtracted from the loss.
        rollout_logprob: ``[T]``, as the sampler computed them; gives the metrics of mismatch.
        correction: ``"tis"``, ``"icepop"`` or ``"mis"``: multiply each token's policy term by
            :func:`rollout_weights` of ``old_logprob`` to ``rollout_logprob``. Divisors stay as they are.
        correction_level, correction_low, correction_high: of :func:`rollout_weights`.

    Returns:
        The loss: a scalar of the dtype of ``logprob``, differentiable in ``logprob``, ``entropy`` and ``exact_kl``
        (all else is detached). And the metrics, 0-dim float32 tensors on the device, detached; means are over the
        tokens that count, 0 where there are none:

        - ``loss``, and its parts ``policy_loss``, ``kl_loss``, ``entropy_loss`` (the last two before their
          coefficients), with the normaliser: these add up over micro-batches. ``tokens``, ``sequences``: how many
          count, by which the means below are to be weighted;
        - ``ratio_mean``, ``ratio_min``, ``ratio_max`` (gspo: of s); ``clip_fraction_low`` and ``_high``: tokens whose
          lower or upper bound was in force (with A < 0, A > 0; cispo: any); ``clip_fraction_dual``;
        - ``policy_kl_k1``, ``policy_kl_k3``: how far this step has gone from the old policy; ``effective_sample_size``:
          ``(Σρ)²/(N Σρ²)``, 1 where all weigh the same;
        - ``ref_kl_k1``, ``ref_kl_k3``, with ``ref_logprob``; ``ref_kl_exact`` and ``entropy``, if given;
        - with ``rollout_logprob``, of w = π_old/π_rollout: ``mismatch_mean`` and ``_max`` of \\|log w\\|,
          ``mismatch_k3``: mean of ``w − 1 − log w``, ``rollout_effective_sample_size``; with ``correction`` also
          ``rollout_weight_mean``, ``rollout_dropped``: share of tokens with weight 0, ``rollout_capped``: share with a
          bound in force.

    Saves for backward: a few ``[T]``. Never waits for a device. Deterministic; the gradient of a row depends on its own
    sequence alone.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes, devices or options do not fit, or (CPU) bounds are wrong, with the position. With wrong
            bounds on a GPU the loss is NaN and :func:`m4ov_kernels.check` raises the error.

    Source: GRPO arXiv 2402.03300, Dr.GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585, dual clip
    1912.09729.
    """
    if advantages_per is not None:
        checks.one_of(_OP, "advantages_per", advantages_per, AGGREGATIONS)
    preset = _preset(kind, clip_low, clip_high, dual_clip, aggregation)
    _check_terms(ref_logprob, exact_kl, kl_coef, kl_kind, entropy, entropy_coef)
    bounds = None
    if correction is not None:
        bounds = corrections.bounds(_OP, "correction_", correction, correction_level, correction_low, correction_high)
        if rollout_logprob is None:
            checks.refuse(ValueError, _OP, "rollout_logprob", f"given with correction={correction!r}", "None")
    rows = packed.packed_rows(
        _OP,
        logprob,
        cu_seqlens,
        mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        exact_kl=exact_kl,
        entropy=entropy,
        rollout_logprob=rollout_logprob,
    )
    divisor = packed.normalizer(_OP, normalizer, logprob.device)
    advantage = packed.per_row(_OP, "advantages", advantages, advantages_per, rows).to(logprob.dtype)

    def constant(values: Tensor) -> Tensor:
        return rows.kept(values.detach(), logprob.dtype)

    new = rows.kept(logprob)
    old = new.detach() if old_logprob is None else constant(old_logprob)
    found = watched.Statistics(rows)
    metrics: watched.Metrics = {"tokens": found.tokens, "sequences": found.sequences}

    term = _policy_term(rows, found, metrics, preset, new, old, advantage, dual_clip)
    if rollout_logprob is not None:
        mismatch = old - constant(rollout_logprob)
        weights = capped = None
        if bounds is not None and correction is not None:
            weights, capped = corrections.weights(rows, mismatch, correction, correction_level, *bounds)
            term = term * weights
        metrics |= watched.of_mismatch(found, mismatch, weights, capped)

    def total(values: Tensor) -> Tensor:
        per_sequence = rows.means(values) if preset.aggregation == "sequence" else rows.sums(values)
        return rows.segments.or_nan(per_sequence.sum()) / divisor

    loss = metrics["policy_loss"] = total(term)
    reference = None if ref_logprob is None else constant(ref_logprob)
    if reference is not None:
        for name in ("k1", "k3"):
            metrics[f"ref_kl_{name}"] = found.mean(kl.divergence(new.detach(), reference, name))
    if exact_kl is not None:
        metrics["ref_kl_exact"] = found.mean(exact_kl.detach())
    if kl_coef:
        if kl_kind == "exact":
            divergence = rows.kept(exact_kl)  # type: ignore[arg-type]
        else:
            divergence = kl.divergence(new, reference, kl_kind)  # type: ignore[arg-type]
        metrics["kl_loss"] = total(divergence)
        loss = loss + kl_coef * metrics["kl_loss"]
    if entropy is not None:
        kept = rows.kept(entropy)
        metrics["entropy"] = found.mean(kept.detach())
        if entropy_coef:
            metrics["entropy_loss"] = total(kept)
            loss = loss - entropy_coef * metrics["entropy_loss"]
    metrics["loss"] = loss
    return loss.to(logprob.dtype), watched.finished(metrics)


def _policy_term(
    rows: Rows,
    found: watched.Statistics,
    metrics: watched.Metrics,
    preset: _Kind,
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    dual_clip: float | None,
) -> Tensor:
    """Of each token, 0 in ignored rows; adds to ``metrics``."""
    log_ratio = new - old
    if preset.sequence_ratio:
        mean = rows.segments.spread(rows.means(log_ratio.detach())).to(new.dtype)
        # The value of the sequence's ratio, the gradient of the token: new − sg[new] is 0.
        used = kl.ratio(mean) * (new - new.detach()).exp()
    else:
        used = kl.ratio(log_ratio)
    value = used.detach()
    low = -float("inf") if preset.clip_low is None else 1.0 - preset.clip_low
    clipped = value.clamp(low, 1.0 + preset.clip_high)
    if preset.weighted:
        at_low, at_high = value < low, value > 1.0 + preset.clip_high
        term = -(clipped * advantage) * new
    else:
        at_low = (value < low) & (advantage < 0)
        at_high = (value > 1.0 + preset.clip_high) & (advantage > 0)
        # The minimum of both products; where they are equal all of the gradient belongs to the ratio.
        term = -torch.where(at_low | at_high, clipped, used) * advantage
        if dual_clip is not None:
            at_dual = (advantage < 0) & (value > dual_clip)
            term = torch.where(at_dual, -dual_clip * advantage, term)
            metrics["clip_fraction_dual"] = found.mean(at_dual)
    metrics |= watched.of_ratio(found, log_ratio.detach(), value, at_low, at_high)
    return rows.kept(term)


def _preset(
    kind: str, clip_low: float | None, clip_high: float | None, dual_clip: float | None, aggregation: str | None
) -> _Kind:
    checks.one_of(_OP, "kind", kind, tuple(KINDS))
    preset = KINDS[kind]
    if clip_low is not None:
        option(_OP, "clip_low", clip_low, 0.0, 1.0)
        preset = preset._replace(clip_low=float(clip_low))
    if clip_high is not None:
        option(_OP, "clip_high", clip_high)
        preset = preset._replace(clip_high=float(clip_high))
    if dual_clip is not None:
        option(_OP, "dual_clip", dual_clip)
        if preset.weighted or not dual_clip > 1:
            expected = f"None with kind={kind!r}" if preset.weighted else "greater than 1"
            checks.refuse(ValueError, _OP, "dual_clip", expected, repr(dual_clip))
    if aggregation is not None:
        checks.one_of(_OP, "aggregation", aggregation, AGGREGATIONS)
        preset = preset._replace(aggregation=aggregation)
    return preset


def _check_terms(
    ref_logprob: Tensor | None,
    exact_kl: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    entropy: Tensor | None,
    entropy_coef: float,
) -> None:
    option(_OP, "kl_coef", kl_coef)
    option(_OP, "entropy_coef", entropy_coef, -float("inf"))
    checks.one_of(_OP, "kl_kind", kl_kind, (*kl.KINDS, "exact"))
    if (exact_kl is not None) != (kl_kind == "exact"):
        checks.refuse(ValueError, _OP, "exact_kl", 'given with kl_kind="exact" alone', f"kl_kind={kl_kind!r}")
    if kl_coef and kl_kind != "exact" and ref_logprob is None:
        checks.refuse(ValueError, _OP, "ref_logprob", f"given with kl_coef={kl_coef:g}", "None")
    if entropy_coef and entropy is None:
        checks.refuse(ValueError, _OP, "entropy", f"given with entropy_coef={entropy_coef:g}", "None")
