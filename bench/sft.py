"""A step of supervised training in a recipe: its loop, data and optimizer, against transformers' Trainer and TRL's
SFTTrainer with the same model, weights, samples and machine.

Each is a whole loop in a process of its own, and they take their steps by turns (:mod:`m4ov_bench.turns`). A step is
all that the loop does from one update to the next: data, forward, backward, clipping, update, logging. Ours is measured
with AdamW for every weight, as its peers have it, and with the recipe's Muon, which is more work. Before that: loss and
gradients of our model on the packed batch against transformers' class on the padded one, by float64; then every loop's
loss at its first step, and that it was given as many tokens and labels.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from m4ov_bench import cases, gate, measure, sft_sides, step
from m4ov_bench.peers import trainers
from m4ov_bench.row import Peer, Row
from m4ov_bench.session import Session
from m4ov_bench.sft_sides import ADAMW, RECIPE, End, Work
from m4ov_bench.turns import Side, by_turns
from m4ov_kernels.dispatch import native_extension

if TYPE_CHECKING:
    from m4ov.manifest import CurriculumConfig

_NEEDED = ("transformers", "tokenizers", "tensorboard", "easy_vqa", "sklearn")
_JUDGED = 12  # samples of which gradients are compared
_SHORT, _FULL = (1, 3), (3, 12)  # steps that warm up, and that count


@dataclass(frozen=True)
class Loss:
    """Of a step before the first update: in float64, and by transformers' class in bf16."""

    exact: float
    plain: float

    def judge(self, loss: float) -> gate.Gate:
        ours, plain = (torch.tensor(value).bfloat16() for value in (loss, self.plain))
        return gate.compare("first loss", ours, plain, torch.tensor(self.exact, dtype=torch.float64))


def benchmark(session: Session) -> Iterator[Row]:
    """Two rows for each case: a step of ours with AdamW and, in the full run, as the recipe has it."""
    wanted = [case for case in cases.SFT if session.wants(case)]
    if not wanted:
        return
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        note = f"{missing[0]} is not installed: pip install 'm4ov[quickstart]'"
        yield _row(session, wanted[0], "not measured", gate.Gate({}), note=note)
        return
    from rich.console import Console

    from m4ov import sft

    session.say("SFT: data")
    seed = session.machine.seed
    material = sft.gather(configuration(wanted[0]), Console(quiet=True))
    with tempfile.TemporaryDirectory(prefix="m4ov-bench-") as folder:
        file = Path(folder) / "work"
        for case in wanted:
            config = configuration(case)
            pools = tuple(
                replace(pool, questions=case.questions if name == "general" else 1)
                for name, pool in material.pools.items()
            )
            work = Work(config, material.task, pools, {"general": case.images, "domain": case.digits}, seed)
            file.write_bytes(pickle.dumps(work))
            yield from _rows(session, case, work, file)


def configuration(case: cases.SftCase) -> CurriculumConfig:
    """The recipe's, with a step's samples as the case has them; no checkpoints, which no peer makes either."""
    from m4ov.manifest import ArmConfig, CurriculumConfig, StageConfig
    from m4ov.recipe import DataConfig, TrainConfig

    sources = {"general": "easy-vqa", "domain": "digits"}
    stage = StageConfig(mixture={"general": case.images, "domain": case.digits})
    return CurriculumConfig(
        data=DataConfig(images_per_step=case.images + case.digits, questions_per_image=case.questions),
        train=TrainConfig(checkpoint_seconds=0.0),
        pools=sources,
        skills=sources,
        arms={"bench": ArmConfig(steps=TrainConfig().steps, stages={"all": stage})},
    )


def check(work: Work) -> tuple[gate.Gate, Loss]:
    """Our model against transformers' class, of the same bf16 weights; and the loss of the first step."""
    from m4ov.data import to_hugging_face
    from m4ov.sft.training import loss_of

    task, batch = work.task, work.mixture().batch(0)
    samples = trainers.samples_of(batch)
    pad = trainers.Padded(samples, to_hugging_face(task.tokenizer).pad_token_id)
    ours = work.model().train()
    plain = sft_sides.hugging_face(task, {name: p.detach() for name, p in ours.named_parameters()}, torch.bfloat16)
    exact = copy.deepcopy(plain).double()

    def theirs(model: Any, places: list[int]) -> torch.Tensor:
        inputs = pad([{"place": place} for place in places])
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
        loss: torch.Tensor = model(**inputs).loss
        return loss

    every = list(range(len(samples)))
    with torch.no_grad():
        first = Loss(theirs(exact, every).item(), theirs(plain, every).item())
    some = every[:: max(1, len(every) // _JUDGED)]
    total, labels = loss_of(ours, batch[some])
    results = ((total / labels, ours), (theirs(plain, some), plain), (theirs(exact, some), exact))
    return step.judged(*results), first


def _rows(session: Session, case: cases.SftCase, work: Work, file: Path) -> Iterator[Row]:
    session.say(f"SFT {case}: gate")
    checked, first = check(work)
    if not checked.green:
        yield _row(session, case, "not measured", checked)
        return
    session.say(f"SFT {case}: steps by turns")
    times, ends, absent = _measure(file, session.quick)
    peers = {name: Peer(absent=reason) for name, reason in absent.items()}
    errors = {name: max(first.judge(end.loss).errors.values()) for name, end in ends.items()}
    for ours in (ADAMW, RECIPE):
        if ours not in ends:
            continue
        end, taken, green = ends[ours], times[ours], checked + first.judge(ends[ours].loss)
        if not green.green:
            yield _row(session, case, ours, green)
            continue
        for name in trainers.NAMES:
            if name in ends:
                ratio = times[name].ratio_to(taken) if errors[name] <= 1 else None
                claim = f"{ends[name].tokens / ends[name].slots:.0%} fill"
                options = {"error": errors[name], "claim": claim}
                peers[name] = Peer(times[name].seconds, ratio, ends[name].peak_mib, **options)
        wait = f"{end.wait:.1%} of the time waits for data"
        yield _row(
            session,
            case,
            ours,
            green,
            seconds=taken.seconds,
            faults=taken.faults,
            disturbed=taken.disturbed,
            rate=end.tokens / taken.seconds,
            unit="tokens",
            tokens=end.tokens,
            memory_mib=end.peak_mib,
            peers={name: peers[name] for name in trainers.NAMES},
            note=f"{end.tokens:,} tokens, {end.tokens / end.slots:.0%} fill; {wait}; memory: weights and optimizer too",
        )


def _measure(file: Path, quick: bool) -> tuple[dict[str, measure.Times], dict[str, End], dict[str, str]]:
    """Times and ends of the loops that ran, by name; and why the others did not.

    Raises:
        RuntimeError: one of ours did not, or a loop had other work than ours.
    """
    warm, rounds = _SHORT if quick else _FULL
    threads, steps = torch.get_num_threads(), warm + rounds + 1
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        sides: dict[str, Side] = {}

        def start(name: str, loop: Callable[..., End], *others: Any) -> None:
            sides[name] = Side(f"SFT {name}", loop, name, file, threads, *others)
            stack.callback(sides[name].close)

        for name in (ADAMW,) if quick else (ADAMW, RECIPE):
            start(name, sft_sides.ours)
        for name in trainers.NAMES:
            if quick and name != trainers.TRAINER:
                absent[name] = "left out of the short run"
            elif (reason := trainers.absent(name)) is not None:
                absent[name] = reason
            else:
                start(name, sft_sides.theirs, steps)
        times, ends, failed = by_turns(sides, warm=warm, rounds=rounds)
    for name, reason in failed.items():
        if name in (ADAMW, RECIPE):
            raise RuntimeError(f"our step with {name}: {reason}")
        absent[name] = f"fails: {reason}"
    expected = ends[ADAMW]
    for name, end in ends.items():
        if (end.tokens, end.labels) != (expected.tokens, expected.labels):
            raise RuntimeError(
                f"{name} was given {end.tokens} tokens with {end.labels} labels; "
                f"ours {expected.tokens} with {expected.labels}"
            )
    return times, ends, absent


def _row(session: Session, case: cases.SftCase, what: str, checked: gate.Gate, **measured: Any) -> Row:
    extension, _ = native_extension()
    return Row(
        family="sft",
        operator="SFT step",
        case=str(case),
        what=what,
        implementation=f"native {extension.isa()}" if extension else "reference",
        machine=session.machine,
        green=checked.green,
        errors=dict(checked.errors),
        problem=checked.problem,
        **measured,
    )
