"""A step of GRPO: rollouts, rewards, advantages and the update, against TRL's GRPOTrainer on the same model, prompts,
rewards, numbers of tokens and machine.

The quickstart's model (3.2 M parameters), random weights; 8 prompts of one 64×64 image and 12 words, 8 samples of each,
32 tokens every sample, whatever end token is drawn; AdamW for every weight. Each is a whole loop in a process of its
own, and they take their steps by turns. Memory is that of one update, over what the process holds at its beginning.
Before that, on answers of several lengths of which some are clipped: our loss and gradients against the formula over
whole logits of transformers' class, and TRL's own code, by float64; then, that all were given as many tokens.
"""

from __future__ import annotations

import importlib.util
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from m4ov_bench import gate, generate, measure, rl_gate, rl_sides
from m4ov_bench.peers import grpo
from m4ov_bench.rl_sides import End, GrpoCase
from m4ov_bench.row import Peer, Row
from m4ov_bench.session import OURS, Session
from m4ov_bench.turns import Side, by_turns
from m4ov_kernels.dispatch import native_extension

CASES = (
    GrpoCase(8, 8, 32, 64, torch.float32, quick=True),
    GrpoCase(8, 8, 32, 64, torch.bfloat16, quick=True),
    GrpoCase(8, 8, 32, 8, torch.float32),
    GrpoCase(8, 8, 32, 8, torch.bfloat16),
)
_SHORT, _FULL = (2, 3), (3, 9)  # steps that warm up (the second one's memory is measured), and that count


def benchmark(session: Session) -> Iterator[Row]:
    wanted = [case for case in CASES if session.wants(case)]
    missing = [package for package in ("transformers", "tensorboard") if importlib.util.find_spec(package) is None]
    for case in wanted:
        if missing:
            note = f"{missing[0]} is not installed: pip install 'm4ov[train]'"
            yield _row(session, case, gate.Gate({}), note=note)
            return
        yield measured(session, case)


def measured(session: Session, case: GrpoCase) -> Row:
    session.say(f"GRPO {case}: gate")
    seed = session.machine.seed
    model, _ = rl_sides.begin(case, seed)
    given = rl_gate.judged(model)
    truth = rl_gate.truth(model, given, case.dtype, seed)
    checked = truth.judge(rl_gate.ours(generate.ours_of(model).to(case.dtype).train(), given, seed))
    if not checked.green:
        return _row(session, case, checked)
    session.say(f"GRPO {case}: steps by turns")
    with tempfile.TemporaryDirectory(prefix="m4ov-bench-") as folder:
        file = Path(folder) / "judged"
        torch.save(given, file)
        times, ends, absent = _measure(session, case, file)
    peers = {name: Peer(absent=reason) for name, reason in absent.items()}
    taken, own = times[OURS], ends[OURS]
    shares = []
    for name in grpo.names(case.dtype):
        if name not in ends:
            continue
        found, memory = ends[name].found, ends[name].update_mib
        error = float("inf") if found is None else max(truth.judge(pickle.loads(found)).errors.values())
        ratio = times[name].ratio_to(taken) if error <= 1 else None
        peers[name] = Peer(times[name].seconds, ratio, memory, error=error)
        if memory and own.update_mib:
            shares.append(f"{own.update_mib / memory:.0%}")
    note = f"{own.tokens:,} tokens in the update, {own.completions:,} of them drawn; memory: of the update"
    if shares:
        note += f", {', '.join(shares)} of the peers'"
    return _row(
        session,
        case,
        checked,
        seconds=taken.seconds,
        faults=taken.faults,
        disturbed=taken.disturbed,
        rate=own.completions / taken.seconds,
        unit="tokens",
        tokens=own.completions,
        memory_mib=own.update_mib,
        peers={name: peers[name] for name in grpo.names(case.dtype)},
        note=note,
    )


def _measure(
    session: Session, case: GrpoCase, file: Path
) -> tuple[dict[str, measure.Times], dict[str, End], dict[str, str]]:
    """Times and ends of the loops that ran, by name; and why the others did not.

    Raises:
        RuntimeError: ours did not, or a loop had other work than ours.
    """
    warm, rounds = _SHORT if session.quick else _FULL
    seed, threads = session.machine.seed, torch.get_num_threads()
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        sides: dict[str, Side] = {}

        def start(name: str, *loop: Any) -> None:
            sides[name] = Side(f"GRPO {name}", *loop)
            stack.callback(sides[name].close)

        start(OURS, rl_sides.ours, case, seed, threads)
        for place, name in enumerate(grpo.names(case.dtype)):
            reason = "left out of the short run" if session.quick and place else grpo.absent()
            if reason is not None:
                absent[name] = str(reason)
            else:
                start(name, rl_sides.theirs, name, case, seed, threads, warm + rounds + 1, file)
        times, ends, failed = by_turns(sides, warm=warm, rounds=rounds)
    if OURS in failed:
        raise RuntimeError(f"our step of GRPO: {failed[OURS]}")
    absent |= {name: f"fails: {reason}" for name, reason in failed.items()}
    own: End = ends[OURS]
    for name, end in ends.items():
        if (end.tokens, end.completions) != (own.tokens, own.completions):
            given, expected = f"{end.tokens} tokens, {end.completions} drawn", f"{own.tokens}, {own.completions} drawn"
            raise RuntimeError(f"{name} was given {given}; ours {expected}")
    return times, ends, absent


def _row(session: Session, case: GrpoCase, checked: gate.Gate, **given: Any) -> Row:
    extension, _ = native_extension()
    return Row(
        family="rl",
        operator="GRPO step",
        case=str(case),
        what="rollouts, rewards, update" if "seconds" in given else "not measured",
        implementation=f"native {extension.isa()}" if extension else "reference",
        machine=session.machine,
        green=checked.green,
        errors=dict(checked.errors),
        problem=checked.problem,
        **given,
    )
