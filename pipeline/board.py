"""How the stages of a run stand, and showing it: a table on a terminal, lines in a log, the failures at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.dag import Foreseen
from pipeline.errors import BusyError, PipelineError
from pipeline.events import Events
from pipeline.journal import Plan, missing
from pipeline.process import last_lines, meanwhile
from pipeline.reproduce import Outcome
from pipeline.stage import WORK
from pipeline.upkeep import newest

LAST_LINES = 15
LOOK_SECONDS = 1.0


@dataclass
class Board:
    """How the stages of a run stand."""

    stages: Sequence[Foreseen]
    graph: Sequence[Foreseen] = ()
    """Every stage of the pipeline, those that stay as they are too."""
    running: dict[str, str] = field(default_factory=dict)
    """Title -> what it runs on."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    events: Events = field(default_factory=Events)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes.values() if outcome.what in ("failed", "late")]

    def end(self, outcome: Outcome) -> Outcome:
        """Note how a stage ended."""
        self.outcomes[outcome.title] = outcome
        told = {"what": outcome.what, "seconds": round(outcome.seconds, 2), "exit_code": outcome.exit_code}
        self.events.tell("stage ended", stage=outcome.title, **told, log=outcome.log)
        return outcome

    def table(self) -> Table:
        """One line per stage: how it stands, shards, seconds."""
        table = Table(title="stages")
        for name, right in (("stage", False), ("", False), ("units", True), ("seconds", True)):
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        for stage in self.stages:
            outcome = self.outcomes.get(stage.title)
            if outcome is not None:
                table.add_row(stage.title, outcome.what, "", f"{outcome.seconds:.1f}")
            elif stage.title in self.running:
                on = self.running[stage.title]
                table.add_row(stage.title, f"running{f' on {on}' if on else ''}", units(stage.title), "")
            else:
                table.add_row(stage.title, "waiting", "", "")
        return table


def units(title: str) -> str:
    """Finished units of a stage's present run, "3 of 7"; nothing where none are on record."""
    folder = newest(WORK, title)
    if folder is None:
        return ""
    plan = Plan.load(folder)
    return f"{len(plan.units) - len(missing(folder, plan.units))} of {len(plan.units)}"


@contextmanager
def shown(board: Board, console: Console) -> Iterator[None]:
    """The board, alive, on a terminal; else a line whenever a stage ends."""
    if console.is_terminal:
        with Live(get_renderable=board.table, console=console, refresh_per_second=1 / LOOK_SECONDS):
            yield
        return
    told = set[str]()

    def tell() -> None:
        for title, outcome in list(board.outcomes.items()):
            if title not in told:
                told.add(title)
                print(f"{title}: {outcome.what}, {outcome.seconds:.1f} s", file=sys.stdout, flush=True)

    try:
        with meanwhile(tell, LOOK_SECONDS):
            yield
    finally:
        tell()


def failures(board: Board) -> PipelineError | None:
    """The error for the stages that did not end well, with the last lines of what they said; None without any."""
    if not board.failed:
        return None
    parts = []
    for outcome in board.failed:
        end = f"exit code {outcome.exit_code}" if outcome.what == "failed" else f"over its {outcome.seconds:.0f} s"
        said = last_lines(outcome.log or outcome.message, LAST_LINES)
        parts.append(f"{outcome.title}: {outcome.what} ({end}){f', {outcome.log}' if outcome.log else ''}:\n{said}")
    busy = any(outcome.exit_code == BusyError.exit_code for outcome in board.failed)
    skipped = sum(outcome.what == "skipped" for outcome in board.outcomes.values())
    return PipelineError(
        "\n".join(parts) + (f"\n{skipped} stages behind were not tried" if skipped else ""),
        remedy="mend what the last lines name and run the same command again: finished units are kept"
        + ("; `clevrcast doctor` tells who holds a lock, and whether it is alive" if busy else ""),
    )
