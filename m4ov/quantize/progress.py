"""What a person sees meanwhile: a bar for each stage in a terminal, a line for each elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stages:
    """Stages of a known number of steps, one after the other."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("·"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )

    def stage(self, name: str, total: int) -> Callable[[], None]:
        """Begin one; what it returns is called after each step."""
        if not self.console.is_terminal:
            self.console.print(f"{name} ({total})" if total > 1 else name)
        task = self._bars.add_task(name, total=total)
        return lambda: self._bars.advance(task)

    def __enter__(self) -> Stages:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
