"""``m4ov parity``: a tiny Qwen3-VL on every layout against one process, on gloo ranks of this machine."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from m4ov.parallel.mesh import Layout, LayoutError

_DESCRIPTION = """\
Trains a tiny Qwen3-VL (dense, and with experts; DeepStack, packed samples, images of many sizes, ranks without any) on
each layout and on one process, and prints the largest relative difference of loss, gradient norm, every gradient and
the weights after three steps of SGD with momentum (all within 1e-6), and of AdamW (over the learning rate: within
1e-2). Then the collectives of a step against those that are written down. A layout is written fsdp2-tp2-ep4: dp
(replicas), fsdp, tp, ep (folded over fsdp and tp)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("--layouts", metavar="A,B", help="only these, such as fsdp2,tp2 (default: all that are listed)")
    parser.add_argument("--world", type=int, default=8, metavar="N", help="of at most so many ranks (default: 8)")
    parser.add_argument("--fuzz", type=int, metavar="N", help="instead, N random layouts and batches, in float64")
    parser.add_argument("--seed", type=int, metavar="S", help="of the first of them (default: of the clock)")
    parser.add_argument("--write-ledger", action="store_true", help="write down the collectives as they are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")


def prepare(options: argparse.Namespace) -> list[str] | None:
    """The layouts asked for; needs no torch, so that a wrong one is answered at once."""
    if options.world < 1 or (options.fuzz is not None and options.fuzz < 1):
        raise ValueError("--world and --fuzz take a number of at least 1")
    if options.layouts is None:
        return None
    labels = [label.strip() for label in options.layouts.split(",") if label.strip()]
    for label in labels:
        if Layout.parse(label).world > options.world:
            raise LayoutError(f"layout {label} has {Layout.parse(label).world} ranks; --world is {options.world}")
    if not labels:
        raise LayoutError("--layouts names no layout")
    return labels


def execute(options: argparse.Namespace, labels: list[str] | None) -> int:
    """Exit status 1: something is too far, or other collectives than those written down."""
    return _fuzz(options) if options.fuzz is not None else _certify(options, labels)


def _certify(options: argparse.Namespace, labels: list[str] | None) -> int:
    from m4ov.parallel.parity import certificate

    began, rows = time.monotonic(), []
    todo = certificate.plan(labels or certificate.LAYOUTS, options.world)
    print(f"{'layout':18} {'model':6} {'loss':>8} {'norm':>8} {'grad':>8} {'sgd':>8} {'adamw':>8}  tensor farthest off")
    for row in certificate.certify(todo):
        rows.append(row)
        far = row.difference
        numbers = " ".join(f"{value:8.1e}" for value in (far.loss, far.norm, far.grad, far.sgd, far.adamw))
        verdict = "" if row.good else "  ✗" if row.alike else "  ✗ ranks differ"
        print(f"{row.layout:18} {row.kind:6} {numbers}  {far.grad_of}{verdict}", flush=True)
    bad = [row for row in rows if not row.good]
    changed = certificate.ledger_differences(rows)
    took, count = time.monotonic() - began, len(rows) - len(bad)
    print(f"{count} of {len(rows)} rows within {certificate.TOLERANCE:g}, {took:.0f} s")
    print(f"collective ledger: {certificate.compared(rows)}")
    print("".join(f"  {line}\n" for line in changed), end="")
    if options.write_ledger:
        certificate.write_ledger(rows)
        print(f"wrote {certificate.GOLDEN}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(bool(bad or (changed and not options.write_ledger)))


def _fuzz(options: argparse.Namespace) -> int:
    from m4ov.parallel.parity import fuzz

    first = options.seed if options.seed is not None else time.time_ns() % 10**9
    began, bad, worst = time.monotonic(), 0, 0.0
    for count, outcome in enumerate(fuzz.run(range(first, first + options.fuzz)), 1):
        far, one = outcome.difference, outcome.pair
        worst, bad = max(worst, far.largest), bad + (not outcome.good)
        if not outcome.good or count % 10 == 0:
            mark = "ok" if outcome.good else "✗ "
            print(f"{mark} seed {one.seed}: {one.layout} {far.largest:.1e} {far.grad_of} {one.draw}", flush=True)
    took = time.monotonic() - began
    print(f"{options.fuzz} pairs, {bad} beyond {fuzz.TOLERANCE:g}; largest difference {worst:.1e}; {took:.0f} s")
    return int(bad > 0)
