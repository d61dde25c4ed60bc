"""How far a fit is: a bar on a terminal, else a line for every batch, since rules write to a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass
class Tally:
    """Lenses that are to be fitted, how many are done and failed, and since when."""

    total: int
    done: int = 0
    failed: int = 0
    began: float = field(default_factory=time.monotonic)

    def count(self, lenses: int, failed: int) -> None:
        self.done += lenses
        self.failed += failed

    def __str__(self) -> str:
        """As in `fit: 120 of 500 lenses done, 3 of them failed, 42.1 a minute, 0:09:01 left`."""
        seconds = max(time.monotonic() - self.began, 1e-3)
        said = f"fit: {self.done} of {self.total} lenses done, {self.failed} of them failed"
        if not self.done:
            return said
        return f"{said}, {60 * self.done / seconds:.3g} a minute, {clock(seconds * (self.total / self.done - 1))} left"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 0:09:01."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def progress(total: int, kept: int = 0, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yields what to call after every batch, with the number of its lenses and of those that failed.

    kept: lenses that an earlier run has fitted, which are not among the `total`.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    tally = Tally(total)
    if kept:
        console.print(f"fit: {kept} lenses need no fit or have theirs, {total} are to be fitted")
    if not console.is_terminal:

        def line(lenses: int, failed: int) -> None:
            tally.count(lenses, failed)
            console.print(str(tally))

        yield line
        return
    with Progress(BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(str(tally), total=total)

        def advance(lenses: int, failed: int) -> None:
            tally.count(lenses, failed)
            bar.update(task, completed=tally.done, description=str(tally))

        yield advance
