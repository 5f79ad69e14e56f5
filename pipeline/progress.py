"""Progress of long work: a bar with ETA in a terminal, one line per interval in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERVAL = 15.0
"""Seconds between two lines of a log without a terminal."""


class Tick(Protocol):
    def __call__(self, advance: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Tick]:
    """Yield a callable to be told of every finished ``unit``; ``note`` (a loss, a name) is shown beside the bar."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda advance=1, note="": bar.update(task, advance=advance, note=note)
        return
    started = last = time.monotonic()
    done = 0

    def tick(advance: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += advance
        now = time.monotonic()
        if now - last >= INTERVAL or (done >= total and now - started >= INTERVAL):
            last = now
            left = (now - started) / max(done, 1) * (total - done)
            print(f"{what}: {done}/{total} {unit}, {left:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True)

    yield tick
