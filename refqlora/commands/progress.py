"""The progress of long work: a bar on a terminal, a line from time to time in a pipe, nothing with --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training import Row

SILENCE = 30  # seconds without a line in a pipe, at most
SHARE = 0.05  # the share of the steps between two lines in a pipe
SLOW = 4  # a step that takes this many times as long as the first ones shares the processors with another process
BUSY = (
    "a step now takes {:.0f} times as long as the first ones. If another process is busy too, the BLAS's threads wait "
    "for one another, and OPENBLAS_NUM_THREADS=1 in the environment is often faster"
)


@contextmanager
def progress(title: str, total: int, quiet: bool = False) -> Iterator[Callable[[Row | int], None]]:
    """Show the progress of `total` steps: call the function that this yields with each row of `train`, or with the
    number of steps done.

    It is shown on stderr: if that is a terminal, as a bar; elsewhere as a line at the first row, at the last, and after
    every twentieth of the steps or 30 seconds (for numbers, only after 30 seconds).
    """
    if quiet or sys.stderr is None:
        yield lambda _: None
        return
    with (_bar if sys.stderr.isatty() else _lines)(title, Meter(total)) as update:
        yield update


@contextmanager
def _bar(title: str, meter: Meter) -> Iterator[Callable[[Row | int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    words = TextColumn("{task.fields[words]}")
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), words)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=meter.total, words="")

        def update(now: Row | int) -> None:
            done, words = meter.read(now)
            bar.update(task, completed=done, words=words)
            if advice := meter.advice():
                bar.console.print(f"Warning: {advice}", highlight=False, markup=False)

        yield update


@contextmanager
def _lines(title: str, meter: Meter) -> Iterator[Callable[[Row | int], None]]:
    def update(now: Row | int) -> None:
        done, words = meter.read(now)
        lines = [f"{title} {done:,}/{meter.total:,}  {words}"] if meter.line_is_due(done, isinstance(now, int)) else []
        lines += [f"Warning: {advice}"] if (advice := meter.advice()) else []
        with suppress(OSError):  # nobody reads stderr any more
            print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr, flush=True)

    yield update


class Meter:
    """Rows of metrics in a few words: smoothed loss and tokens a second, and the time left."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.begin = self.last_line = time.monotonic()
        self.first_done: int | None = None  # where a resumed run begins
        self.loss = self.speed = 0.0
        self.costs: list[tuple[float, float]] = []  # of the first and last steps: seconds, and seconds a token
        self.told = False
        self.next_line = 0.0

    def read(self, now: Row | int) -> tuple[int, str]:
        """-> the number of steps done, and the words."""
        done = now if isinstance(now, int) else now["step"]
        began = self.first_done is None
        if self.first_done is None:
            self.first_done = 0 if isinstance(now, int) else done - 1
        each = (time.monotonic() - self.begin) / max(1, done - self.first_done)
        left = f"{duration(each * (self.total - done))} left"
        if isinstance(now, int):
            return done, left
        loss, speed = now["loss"], now["tokens"] / max(now["seconds"], 1e-9)
        self.loss = loss if began else 0.9 * self.loss + 0.1 * loss
        self.speed = speed if began else 0.9 * self.speed + 0.1 * speed
        self.costs.append((now["seconds"], now["seconds"] / max(1, now["tokens"])))
        return done, f"loss {self.loss:.3f}  {self.speed:,.0f} tokens/s  {left}"

    def line_is_due(self, done: int, by_time_only: bool) -> bool:
        """Whether to print a line at this step; then the next line is due later."""
        by_steps = not by_time_only and (done >= self.next_line or done == self.total)
        if not by_steps and time.monotonic() - self.last_line < SILENCE:
            return False
        self.last_line, self.next_line = time.monotonic(), done + SHARE * self.total
        return True

    def advice(self) -> str | None:
        """Advice, given once, when three steps in a row were slow, and slow for their number of tokens."""
        if self.told or len(self.costs) < 8:
            return None
        first, last = self.costs[:5], self.costs[-3:]
        factor = min(min(cost[i] for cost in last) / max(median(cost[i] for cost in first), 1e-9) for i in (0, 1))
        self.costs = [*first, *last]
        self.told = factor > SLOW
        return BUSY.format(factor) if self.told else None


def duration(seconds: float) -> str:
    """12 s, 3 min, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
