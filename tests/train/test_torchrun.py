"""Under torchrun: a rank that dies is started again with the others, and a request to end reaches all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from m4ov.parallel.checkpoint import checkpoints
from m4ov.train import World
from m4ov.train.metrics import read as read_metrics
from tests.train import small
from tests.train.test_ranks import close

STEPS = 24
# At the sixth step rank 1 is killed, once; at the twelfth, torchrun itself is asked to end.
WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
from m4ov.train import Interrupted, World
from tests.train import small

torch.set_num_threads(1)
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
world = World.start(20)
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rows = 0

def summed_loss(model, batch):
    global rows
    rows += 1
    if attempt == 0 and world.rank == 1 and rows == 2 * 6:  # two rows a step
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt == 1:
        (folder / f"attempt-{world.rank}").touch()
        if world.rank == 0 and rows == 2 * 3:
            os.kill(os.getppid(), signal.SIGTERM)
        if rows >= 2 * 3:
            time.sleep(0.1)  # until torchrun has passed it on
    return original(model, batch)

original, small.summed_loss = small.summed_loss, summed_loss
try:
    small.run(folder, world, steps=steps)
except Interrupted as interrupt:
    (folder / f"interrupted-{world.rank}").write_text(str(interrupt))
    world.close()
    sys.exit(130)
"""


def test_elastic_restart_and_a_request_to_end(tmp_path):
    small.run(tmp_path / "whole", World(), steps=STEPS)
    (tmp_path / "worker.py").write_text(WORKER)
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    child = subprocess.run(
        [*torchrun, "--monitor-interval", "0.1", str(tmp_path / "worker.py"), str(folder), str(STEPS)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (folder / "attempt-0").exists(), child.stderr[-3000:]
    assert (folder / "attempt-1").exists()
    said = [(folder / f"interrupted-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    newest = checkpoints(folder / "checkpoints")[-1]
    assert said[0].startswith(f"stopped after step {int(newest.name[5:])};")
    assert 5 < int(newest.name[5:]) < STEPS
    assert not list((folder / "checkpoints").glob(".writing-*"))
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # none twice
    small.run(folder, World(), steps=STEPS)  # and on one rank to the end
    close(tmp_path / "whole", folder, steps=STEPS)
