"""kill -9 of a rank at random moments; what goes on must end with the bits of a run that nobody disturbed.

``python -m tests.train.killing --kills 20 --ranks 2`` does so as often as one likes; the suite does it a few times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from m4ov.parallel import ranks
from m4ov.parallel.checkpoint import checkpoints, read
from m4ov.train.metrics import read as read_metrics
from tests.train import small

STEPS = 40


def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*ranks.PRELOAD, "tests.train.small", "torch.utils.tensorboard"])
    return context


def start(size: int, folder: Path) -> tuple[list[Any], dist.TCPStore]:
    context = server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[Any] = [
        context.Process(target=small.rank_main, args=(rank, size, store.port, folder, STEPS)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, store


def wait(processes: list[Any]) -> list[int]:
    """Exit statuses. As torchrun does, once a rank has died the others are ended too, after a moment to notice."""
    deadline = time.monotonic() + 60
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode == -signal.SIGKILL for process in processes):
            deadline = min(deadline, time.monotonic() + 1.5)
        time.sleep(0.01)
    died = any(process.exitcode == -signal.SIGKILL for process in processes)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert died or not hung, f"ranks {hung} did not end"
    return [process.exitcode for process in processes]


def undisturbed(size: int, folder: Path) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    processes, _ = start(size, folder)
    assert wait(processes) == [0] * size
    return time.monotonic() - began


def generator_of_torch(state: torch.Tensor) -> torch.Tensor:
    """The others (numpy's, Python's) begin anew in every process that nobody has seeded."""
    return torch.tensor(list(bytes.fromhex(json.loads(bytes(state.tolist()))["torch"])))


def same(one: Path, other: Path) -> None:
    """The last checkpoint, bit for bit, and the losses on the way."""
    newest = [checkpoints(folder / "checkpoints")[-1] for folder in (one, other)]
    assert [path.name for path in newest] == [f"step-{STEPS:08d}"] * 2
    states = [dict(read(path, prefix="")) for path in newest]
    for state in states:
        for name in [name for name in state if name.startswith("random.")]:
            state[name] = generator_of_torch(state[name])
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert states[0].keys() == states[1].keys()
    assert not different, different
    losses = [[(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")] for folder in (one, other)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


def kill_often(kills: int, size: int, folder: Path, seed: int) -> str:
    """Runs, killed and started again until they are through, one after the other until there were ``kills`` kills."""
    draw = random.Random(seed)
    first = server().Process(target=int)  # brings the server up, which takes longer than a run
    first.start()
    first.join()
    whole = folder / "whole"
    duration = undisturbed(size, whole)
    done, runs, at = 0, 0, []
    while done < kills:
        run = folder / f"run-{runs}"
        while True:
            processes, _store = start(size, run)
            if done < kills:
                time.sleep(draw.uniform(0.0, duration))
                victim = processes[draw.randrange(size)]
                if all(process.is_alive() for process in processes):
                    os.kill(victim.pid, signal.SIGKILL)
            codes = wait(processes)
            if codes == [0] * size:
                break
            assert -signal.SIGKILL in codes, codes
            assert set(codes) <= {-signal.SIGKILL, 7, 0, 1}, codes
            done += 1
            found = checkpoints(run / "checkpoints")
            at.append(int(found[-1].name[5:]) if found else 0)
        same(whole, run)
        runs += 1
    return f"{done} kills of {size} ranks in {runs} runs of {STEPS} steps, newest checkpoints then {at}: the same bits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        print(kill_often(options.kills, options.ranks, Path(folder), options.seed))


if __name__ == "__main__":
    main()
