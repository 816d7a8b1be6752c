"""Numbers of a run as lines of JSON, as TensorBoard scalars and, if asked for, in Weights & Biases; a run that goes on
does not write a step twice."""

from __future__ import annotations

import importlib.util
import json
import secrets
from pathlib import Path
from typing import Any


class MetricsError(ValueError):
    """Numbers cannot be logged as the recipe asks."""


class Metrics:
    """Writes ``metrics.jsonl`` and ``tensorboard/`` of a run folder.

    Args:
        first_step: where the run starts or goes on; what was logged at or behind it is forgotten.
        wandb_project: also log to this project of Weights & Biases; a run that goes on is the same run there.

    Raises:
        MetricsError: the project is asked for and the package ``wandb`` is not installed.
    """

    def __init__(self, folder: Path, first_step: int, wandb_project: str = "") -> None:
        check(wandb_project)
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= first_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._wandb: Any = None
        if wandb_project:
            import wandb

            # A step that is logged again keeps its first value there: the same bits, as a run goes on to the same.
            self._wandb = wandb.init(project=wandb_project, dir=str(folder), id=_run_id(folder), resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Numbers after ``step`` steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check(wandb_project: str) -> None:
    """Refuse early what :class:`Metrics` would refuse.

    Raises:
        MetricsError: see there.
    """
    if wandb_project and importlib.util.find_spec("wandb") is None:
        raise MetricsError(
            f"train.wandb={wandb_project}: the package wandb is not installed; pip install wandb, or leave train.wandb "
            "empty (metrics.jsonl and TensorBoard are always written)"
        )


def _run_id(folder: Path) -> str:
    """Of the run in a folder, made when it is first asked for."""
    file = folder / "wandb-id"
    if not file.exists():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]
