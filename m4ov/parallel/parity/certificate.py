"""The certificate: each layout against one process, and its collectives against those that are written down."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from m4ov.parallel import hang, ranks
from m4ov.parallel.mesh import Layout, Mesh, ModelSizes, check
from m4ov.parallel.parallelize import parallelize
from m4ov.parallel.parity import cases, steps
from m4ov.parallel.parity.cases import Draw
from m4ov.parallel.parity.steps import Difference, Record

TOLERANCE, ADAMW_TOLERANCE, MARGIN = 1e-6, 1e-2, 1e-4
GOLDEN = Path(__file__).with_name("ledger.json")
#: Every kind alone at 2 and 4, all pairs, and all together at 8.
LAYOUTS = (
    *("dp2", "fsdp2", "tp2", "fsdp2-ep2", "tp2-ep2"),
    *("dp4", "fsdp4", "dp2-fsdp2", "tp4", "fsdp4-ep4", "tp4-ep4"),
    *("dp2-tp2", "fsdp2-tp2", "fsdp4-ep2", "dp2-fsdp2-ep2", "tp4-ep2", "fsdp2-tp2-ep2", "fsdp2-tp2-ep4", "dp2-tp2-ep2"),
    *("dp2-fsdp2-tp2", "fsdp4-tp2-ep2", "fsdp4-tp2-ep4", "fsdp2-tp4-ep8", "dp2-fsdp2-tp2-ep4"),
)


@dataclass(frozen=True)
class Row:
    """One layout and one model.

    Attributes:
        difference: from one process.
        alike: whether loss and norm have the same bits on all ranks.
        ledger: of rank 0, one step.
        seconds: of the parallel side, models built and steps made.
    """

    layout: str
    kind: str
    difference: Difference
    alike: bool
    ledger: dict[str, dict[str, list[int]]]
    seconds: float

    @property
    def good(self) -> bool:
        return self.alike and self.difference.largest <= TOLERANCE and self.difference.adamw <= ADAMW_TOLERANCE


def plan(labels: Iterable[str], world: int) -> list[tuple[Layout, str]]:
    """Which layouts are run with which models; checked before there is any process.

    Raises:
        LayoutError: a layout does not fit either model.
    """
    found = []
    for label in labels:
        layout = Layout.parse(label)
        if layout.world > world:
            continue
        kinds = [kind for kind in cases.KINDS if kind == "moe" or layout.ep == 1]
        for kind in kinds:
            check(layout, layout.world, ModelSizes.of(cases.config(kind)))
            found.append((layout, kind))
    return found


def certify(todo: Sequence[tuple[Layout, str]], timeout: float = 120.0) -> Iterator[Row]:
    """Row by row, worlds in order of size; ``timeout``: seconds for one world.

    Raises:
        RankError: a rank failed or hung.
        ValueError: no seed gives router margins above :data:`MARGIN`.
    """
    with tempfile.TemporaryDirectory(prefix="m4ov-parity-") as name:
        folder = Path(name)
        seeds = ranks.run(references, 1, sorted({kind for _, kind in todo}), folder, timeout=timeout)[0]
        for world in sorted({layout.world for layout, _ in todo}):
            jobs = [(str(layout), kind, seeds[kind]) for layout, kind in todo if layout.world == world]
            yield from ranks.run(job, world, jobs, folder, timeout=timeout * len(jobs) / 4 + 30)[0]


def references(kinds: Sequence[str], folder: Path) -> dict[str, int]:
    """Writes what one process does, for each model with the first seed whose router margins are large enough."""
    seeds = {}
    for kind in kinds:
        config = cases.config(kind)
        for seed in range(20):
            made = reference(kind, Draw(seed=seed))
            if made.margin > MARGIN:
                break
        else:
            raise ValueError(f"{config}: no seed below 20 has router margins above {MARGIN}")
        torch.save(made, folder / f"{kind}.pt")
        seeds[kind] = seed
    return seeds


def reference(kind: str, draw: Draw, *, train: int = steps.STEPS, dtype: torch.dtype = torch.float32) -> Record:
    """What one process does with all samples in one batch."""
    config = cases.config(kind)
    batch = cases.share(cases.samples(draw, config), 0, 1, config)
    return steps.record(lambda: cases.model(config, draw.seed).to(dtype), batch, None, steps=train)


def parallel(
    layout: Layout, kind: str, draw: Draw, *, train: int = steps.STEPS, dtype: torch.dtype = torch.float32
) -> Record:
    """What this rank and the others do, on a layout, with the same samples dealt out."""
    config = cases.config(kind)
    mesh = Mesh(layout, model=ModelSizes.of(config), timeout=timedelta(seconds=30))
    batch = cases.share(cases.samples(draw, config), mesh.data_rank, layout.data, config)
    with hang.named(mesh.axis_of_group()):
        made = steps.record(
            lambda: parallelize(cases.model(config, draw.seed).to(dtype), mesh), batch, mesh, steps=train
        )
        dist.barrier()
    mesh.close()
    return made


def job(jobs: Sequence[tuple[str, str, int]], folder: Path) -> list[Row] | None:
    """On every rank; the rows are rank 0's."""
    rows = []
    for label, kind, seed in jobs:
        began = time.perf_counter()
        made = parallel(Layout.parse(label), kind, Draw(seed=seed))
        seconds = time.perf_counter() - began
        alike = steps.alike_on_all_ranks([made.loss, made.norm])
        if dist.get_rank() == 0:
            wanted = torch.load(folder / f"{kind}.pt", weights_only=False)
            rows.append(Row(label, kind, steps.compare(made, wanted), alike, made.ledger, seconds))
    return rows or None


def ledger_differences(rows: Sequence[Row]) -> list[str]:
    """Where the collectives are not those of the golden file, as lines; another torch's are not compared."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"torch": "none", "ledger": {}}
    if golden["torch"] != _torch():
        return []
    lines = []
    for row in rows:
        wanted = golden["ledger"].get(f"{row.layout} {row.kind}")
        if wanted is None:
            continue
        keys = sorted({(axis, kind) for table in (row.ledger, wanted) for axis in table for kind in table[axis]})
        for axis, kind in keys:
            now, then = (table.get(axis, {}).get(kind, [0, 0]) for table in (row.ledger, wanted))
            if now != then:
                line = f"{row.layout} {row.kind}: {kind} over {axis}: {then[0]} calls, {then[1]} bytes → {now[0]}, {now[1]}"
                lines.append(line)
    return lines


def compared(rows: Sequence[Row]) -> str:
    """What of the ledger was compared, in words."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"torch": "none", "ledger": {}}
    if golden["torch"] != _torch():
        return f"not compared: it is torch {golden['torch']}'s, this is {_torch()}"
    count = sum(f"{row.layout} {row.kind}" in golden["ledger"] for row in rows)
    return f"{count} of {len(rows)} rows compared"


def write_ledger(rows: Sequence[Row]) -> None:
    """Make these the golden ones; layouts that were not run stay, if they are the same torch's."""
    old = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"torch": _torch(), "ledger": {}}
    kept: dict[str, Any] = old["ledger"] if old["torch"] == _torch() else {}
    kept |= {f"{row.layout} {row.kind}": row.ledger for row in rows}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
    GOLDEN.write_text(f'{{\n "torch": {json.dumps(_torch())},\n "ledger": {{\n{lines}\n }}\n}}\n')


def _torch() -> str:
    return ".".join(torch.__version__.split(".")[:2])

