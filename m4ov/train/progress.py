"""What a person sees while a run trains: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 15.0


class TrainingProgress:
    """Loss, tokens a second and time left.

    Args:
        total: steps of the whole run.
        done: steps that are behind us already.
    """

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.done = console, total, done
        self.seconds_a_step = 0.0
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} · {task.fields[rate]} tokens/s ·"),
            TimeElapsedColumn(),
            TextColumn("· {task.fields[left]} left"),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("training", total=total, completed=done, loss="–", rate="–", left="–")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """After ``step`` steps in all; the last took ``seconds`` for ``tokens``."""
        smooth = 0.95 if self.seconds_a_step else 0.0
        self.seconds_a_step = smooth * self.seconds_a_step + (1 - smooth) * seconds
        rate = f"{tokens / self.seconds_a_step:,.0f}"
        left = clock((self.total - step) * self.seconds_a_step)
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", rate=rate, left=left)
        if not self.console.is_terminal and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"step {step}/{self.total} · loss {loss:.3f} · {rate} tokens/s · {left} left")


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
