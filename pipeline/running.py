"""`clevrcast run`: every stage that does not stay as it is, in the order of the graph, independent ones side by side.

Each stage is one `pipeline.reproduce.reproduce`, so the result is that of `dvc repro`: the same ``dvc.lock``, the same
bytes. Stages that the plan keeps are not started at all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.dag import Foreseen
from pipeline.devices import DEVICE
from pipeline.errors import PipelineError
from pipeline.journal import Plan, missing
from pipeline.leases import leased
from pipeline.plan import foreseen
from pipeline.reproduce import RETRIED, Outcome, reproduce
from pipeline.stage import WORK
from pipeline.upkeep import newest

DEVICES = "CLEVRCAST_GPUS"
"""Devices that stages with ``meta: gpus`` may lease, as in ``cuda:0,cuda:1``; else every CUDA device, unless
``CLEVRCAST_DEVICE`` names one for everything."""
TRIES = 3
LAST_LINES = 15
LOOK_SECONDS = 1.0

Work = Callable[[Foreseen], Outcome]


def leasable() -> list[str]:
    """The devices of this machine that stages share. None on a machine without GPUs."""
    if (named := os.environ.get(DEVICES)) is not None:
        return [name for name in named.split(",") if name]
    if os.environ.get(DEVICE):
        return []  # one for everything, as it was asked for
    import torch  # imported late: the command line answers without waiting for it

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


@dataclass
class Board:
    """What stands about every stage, for whoever shows it."""

    stages: Sequence[Foreseen]
    running: dict[str, str] = field(default_factory=dict)
    """Title -> what it runs on."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)

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


def stage_work(board: Board, devices: Sequence[str], *, jobs: int, stopped: Callable[[], bool]) -> Work:
    """What is done for one stage: wait for one of ``jobs`` places, lease its devices, run it, try again where that may
    help. It never raises; how it ended also stands on the board."""
    places = threading.BoundedSemaphore(jobs)

    def work(stage: Foreseen) -> Outcome:
        with places:
            try:
                with leased(devices, stage.gpus, stopped=stopped) as held:
                    outcome = attempts(stage, held)
            except InterruptedError:
                outcome = Outcome(stage.title, "stopped")
        board.outcomes[stage.title] = outcome
        return outcome

    def attempts(stage: Foreseen, held: Sequence[str]) -> Outcome:
        environment = {DEVICE: held[0]} if held else {}
        board.running[stage.title] = ", ".join(held)
        try:
            outcome = Outcome(stage.title, "stopped")
            for _ in range(TRIES):
                if stopped():
                    return Outcome(stage.title, "stopped")
                outcome = reproduce(
                    stage.title, environment=environment, limit_seconds=stage.limit_seconds, stopped=stopped
                )
                if outcome.exit_code not in RETRIED:
                    break
            return outcome
        finally:
            del board.running[stage.title]

    return work


def in_threads(stages: Sequence[Foreseen], work: Work, board: Board) -> None:
    """Run the stages, each after those before it. What stands behind one that did not end well is skipped; everything
    else goes on."""
    futures: dict[str, Future[Outcome]] = {}

    def after(stage: Foreseen, earlier: Sequence[Future[Outcome]]) -> Outcome:
        if all(future.result().good for future in earlier):
            return work(stage)
        board.outcomes[stage.title] = skipped = Outcome(stage.title, "skipped")
        return skipped

    # A thread for each, most of which wait: that is how Prefect's runner does it too.
    with ThreadPoolExecutor(max(1, len(stages))) as pool:
        for stage in stages:
            earlier = [futures[title] for title in stage.upstream if title in futures]
            futures[stage.title] = pool.submit(after, stage, earlier)
    for future in futures.values():
        future.result()


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; a second one has its usual effect."""
    event, before = threading.Event(), {}

    def ask(number: int, frame: object) -> None:
        event.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shown(board: Board, console: Console) -> Iterator[None]:
    """The board, alive, on a terminal; else a line whenever a stage ends."""
    if console.is_terminal:
        with Live(get_renderable=board.table, console=console, refresh_per_second=1 / LOOK_SECONDS):
            yield
        return
    ended, told = threading.Event(), set[str]()

    def tell() -> None:
        last = False
        while not last:
            last = ended.wait(LOOK_SECONDS)
            for title, outcome in list(board.outcomes.items()):
                if title not in told:
                    told.add(title)
                    print(f"{title}: {outcome.what}, {outcome.seconds:.1f} s", file=sys.stdout, flush=True)

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def report_failures(board: Board) -> None:
    """Raise for the stages that did not end well, with the last lines of what they said.

    Raises:
        PipelineError: there are any.
    """
    failed = [outcome for outcome in board.outcomes.values() if outcome.what in ("failed", "late")]
    if not failed:
        return
    parts = []
    for outcome in failed:
        lines = outcome.log.read_text(errors="replace").splitlines() if outcome.log else []
        said = "\n".join(f"    {line}" for line in lines[-LAST_LINES:])
        end = f"exit code {outcome.exit_code}" if outcome.what == "failed" else f"over its {outcome.seconds:.0f} s"
        parts.append(f"{outcome.title}: {outcome.what} ({end}), {outcome.log}:\n{said}")
    skipped = sum(outcome.what == "skipped" for outcome in board.outcomes.values())
    raise PipelineError(
        "\n".join(parts) + (f"\n{skipped} stages behind were not tried" if skipped else ""),
        remedy="mend what the last lines name and run the same command again: finished units are kept",
    )


def default_jobs(devices: Sequence[str]) -> int:
    """As many stages at once as there are devices; without any, one for each two cores, since a stage uses several."""
    return max(1, len(devices) or (os.cpu_count() or 1) // 2)


def run(root: Path, *, jobs: int | None, prefect: bool, console: Console) -> int:
    """Bring everything up to date; 0, or 130 where it was asked to stop.

    Raises:
        PipelineError: a stage failed; everything that does not need it is up to date all the same.
    """
    stages = [stage for stage in foreseen(root) if stage.state != "kept"]
    if not stages:
        console.print("everything is up to date")
        return 0
    devices = leasable() if any(stage.gpus for stage in stages) else []
    board = Board(stages)
    with asked_to_stop() as stop:
        work = stage_work(board, devices, jobs=jobs or default_jobs(devices), stopped=stop.is_set)
        with shown(board, console):
            if prefect:
                from pipeline.orchestrate import in_prefect  # loads in a second

                in_prefect(stages, work, board)
            else:
                in_threads(stages, work, board)
        if stop.is_set():
            console.print("stopped; finished units are kept, and the same command goes on")
            return 130
    report_failures(board)
    return 0
