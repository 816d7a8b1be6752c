"""The certificate: each layout against one process, and its collectives against those that are written down."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from m4ov.parallel import hang, ranks
from m4ov.parallel.mesh import Layout, Mesh, ModelSizes, check
from m4ov.parallel.parallelize import parallelize
from m4ov.parallel.parity import cases, steps
from m4ov.parallel.parity.cases import Draw
from m4ov.parallel.parity.steps import Difference, Record

TOLERANCE, ADAMW_TOLERANCE, MARGIN = 1e-6, 1e-2, 1e-4
# Fixed, because what is sent depends on lengths, images and routing. Chosen because float32 on one process is within
# 6e-7 of float64 with them (others: up to 1e-6), and no router within 2e-4 of another choice.
SEEDS = {"dense": 2, "moe": 11}
Table = dict[str, dict[str, list[int]]]  # axis → kind → [calls, bytes]
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
    ledger: Table
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
    """Row by row; ``timeout``: seconds for one layout.

    Raises:
        RankError: a rank failed or hung.
        ValueError: a router's margin is not above :data:`MARGIN`.
    """
    with tempfile.TemporaryDirectory(prefix="m4ov-parity-") as name:
        folder = Path(name)
        seeds = ranks.run(references, 1, sorted({kind for _, kind in todo}), folder, timeout=timeout)[0]
        for layout in dict.fromkeys(layout for layout, _ in todo):  # each in processes of its own
            draws = [Draw(kind=kind, seed=seeds[kind]) for other, kind in todo if other == layout]
            yield from ranks.run(job, layout.world, layout, draws, folder, timeout=timeout)[0]


def references(kinds: Sequence[str], folder: Path) -> dict[str, int]:
    """Writes what one process does, for each model; returns their seeds."""
    for kind in kinds:
        made = reference(Draw(kind=kind, seed=SEEDS[kind]))
        if not made.margin > MARGIN:  # rounding would decide which expert a token goes to
            raise ValueError(f"parity: a router of the {kind} model is {made.margin:.1e} from another choice")
        torch.save(made, folder / f"{kind}.pt")
    return {kind: SEEDS[kind] for kind in kinds}


def reference(draw: Draw, *, train: int = steps.STEPS, dtype: torch.dtype = torch.float32) -> Record:
    """What one process does with all samples in one batch."""
    return steps.record(lambda: cases.model(draw, dtype), cases.share(draw), None, steps=train)


def mesh_of(layout: Layout) -> Mesh:
    """One in the life of a process: DTensor remembers the first of two that are equal."""
    return Mesh(layout, timeout=timedelta(seconds=30))


def parallel(mesh: Mesh, draw: Draw, *, train: int = steps.STEPS, dtype: torch.dtype = torch.float32) -> Record:
    """What this rank and the others do, on a mesh, with the same samples dealt out."""
    batch = cases.share(draw, mesh.data_rank, mesh.layout.data)
    with hang.named(mesh.axis_of_group()):
        made = steps.record(lambda: parallelize(cases.model(draw, dtype), mesh), batch, mesh, steps=train)
        dist.barrier()
    return made


def job(layout: Layout, draws: Sequence[Draw], folder: Path) -> list[Row] | None:
    """On every rank; the rows are rank 0's."""
    mesh, rows = mesh_of(layout), []
    for draw in draws:
        began = time.perf_counter()
        made = parallel(mesh, draw)
        seconds = time.perf_counter() - began
        alike = steps.alike_on_all_ranks([made.loss, made.norm])
        if dist.get_rank() == 0:
            wanted = torch.load(folder / f"{draw.kind}.pt", weights_only=False)
            rows.append(Row(str(layout), draw.kind, steps.compare(made, wanted), alike, made.ledger, seconds))
    return rows or None


def golden() -> dict[str, Table]:
    """The collectives that are written down, by layout and model; none, if they are another torch's."""
    found = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"torch": None, "ledger": {}}
    ledger: dict[str, Table] = found["ledger"] if found["torch"] == _torch() else {}
    return ledger


def ledger_differences(rows: Sequence[Row]) -> list[str]:
    """Where the collectives are not those of the golden file, as lines; another torch's are not compared."""
    known, lines = golden(), []
    for row in rows:
        wanted = known.get(f"{row.layout} {row.kind}", row.ledger)
        keys = sorted({(axis, kind) for table in (row.ledger, wanted) for axis in table for kind in table[axis]})
        for axis, kind in keys:
            now, then = (table.get(axis, {}).get(kind, [0, 0]) for table in (row.ledger, wanted))
            if now != then:
                before, after = (f"{calls} calls, {size} bytes" for calls, size in (then, now))
                lines.append(f"{row.layout} {row.kind}: {kind} over {axis}: {before} → {after}")
    return lines


def compared(rows: Sequence[Row]) -> str:
    """What of the ledger was compared, in words."""
    known = golden()
    if not known:
        return f"not compared: none is written down for torch {_torch()}"
    return f"{sum(f'{row.layout} {row.kind}' in known for row in rows)} of {len(rows)} rows compared"


def write_ledger(rows: Sequence[Row]) -> None:
    """Make these the golden ones; layouts that were not run stay, if they are the same torch's."""
    kept = golden() | {f"{row.layout} {row.kind}": row.ledger for row in rows}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
    GOLDEN.write_text(f'{{\n "torch": {json.dumps(_torch())},\n "ledger": {{\n{lines}\n }}\n}}\n')


def _torch() -> str:
    return ".".join(torch.__version__.split(".")[:2])
