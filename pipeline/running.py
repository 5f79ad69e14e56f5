"""`clevrcast run`: every stage that does not stay as it is, in the order of the graph, independent ones side by side.

Each stage is one `pipeline.reproduce.reproduce`, so the result is that of `dvc repro`: the same ``dvc.lock``, the same
bytes. Stages that the plan keeps are not started at all. A workspace is run by one process at a time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console

from pipeline import torn
from pipeline.board import LOOK_SECONDS, Board, failures, shown
from pipeline.children import API, unreachable
from pipeline.dag import Foreseen
from pipeline.devices import DEVICE
from pipeline.errors import BusyError, PipelineError, StoppedError, WorkspaceError, explained
from pipeline.health.server import answers
from pipeline.journal import lease
from pipeline.leases import leased
from pipeline.notify import told_if_it_fails
from pipeline.params import load_params
from pipeline.plan import foreseen
from pipeline.process import Said
from pipeline.reproduce import RETRIED, Outcome, reproduce
from pipeline.stage import WORK

DEVICES = "CLEVRCAST_GPUS"
"""Devices that stages with ``meta: gpus`` may lease, as in ``cuda:0,cuda:1``; else every CUDA device, unless
``CLEVRCAST_DEVICE`` names one for everything."""
RUN_LOCK = WORK / "run.lock"
WAIT_SECONDS = 3.0
"""Before a second try; twice as long before a third, and so on: whoever was in the way may have gone."""


class Work(Protocol):
    """Runs one stage; ``said`` gets its lines."""

    def __call__(self, stage: Foreseen, said: Said = ...) -> Outcome: ...


Through = Callable[[Sequence[Foreseen], Work, Board], object]
"""Runs the stages, each after those before it."""


def leasable() -> list[str]:
    """The devices of this machine that stages share. None on a machine without GPUs."""
    if (named := os.environ.get(DEVICES)) is not None:
        return [name for name in named.split(",") if name]
    if os.environ.get(DEVICE):
        return []  # one for everything, as it was asked for
    import torch  # imported late: the command line answers without waiting for it

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def stage_work(board: Board, devices: Sequence[str], *, jobs: int, stopped: Callable[[], bool]) -> Work:
    """What is done for one stage: wait for one of ``jobs`` places, lease its devices, run it, try again where that may
    help. It never raises; how it ended also stands on the board."""
    places = threading.BoundedSemaphore(jobs)

    def work(stage: Foreseen, said: Said = lambda line: None) -> Outcome:
        with places:
            try:
                with leased(devices, stage.gpus, stopped=stopped) as held:
                    outcome = attempts(stage, held, said)
            except InterruptedError:
                outcome = Outcome(stage.title, "stopped")
            except PipelineError as error:
                outcome = Outcome(stage.title, "failed", exit_code=error.exit_code, message=str(error))
            except OSError as error:  # of the machine: no log, no lease, no process
                message = str(explained(error, WORK, "starting the stage") or error)
                outcome = Outcome(stage.title, "failed", exit_code=WorkspaceError.exit_code, message=message)
        return board.end(outcome)

    def attempts(stage: Foreseen, held: Sequence[str], said: Said) -> Outcome:
        environment = {DEVICE: held[0]} if held else {}
        board.running[stage.title] = ", ".join(held)
        try:
            for number in range(1, stage.retries + 2):
                torn.mend(Path.cwd(), said, wait=False)  # a DVC beside this one may have been killed
                board.events.tell("stage started", stage=stage.title, devices=held, attempt=number)
                limit = stage.limit_seconds
                outcome = reproduce(
                    stage.title, environment=environment, limit_seconds=limit, stopped=stopped, said=said
                )
                if outcome.exit_code not in RETRIED or number > stage.retries:
                    return outcome
                said(f"exit code {outcome.exit_code}: tried again in {WAIT_SECONDS * number:.0f} s")
                until = time.monotonic() + WAIT_SECONDS * number
                while time.monotonic() < until and not stopped():
                    time.sleep(LOOK_SECONDS / 10)
                if stopped():
                    break
            return Outcome(stage.title, "stopped")
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
        return board.end(Outcome(stage.title, "skipped"))

    # A thread for each, most of which wait: that is how Prefect's runner does it too.
    with ThreadPoolExecutor(max(1, len(stages))) as pool:
        for stage in stages:
            earlier = [futures[title] for title in stage.upstream if title in futures]
            futures[stage.title] = pool.submit(after, stage, earlier)
        while wait(futures.values(), LOOK_SECONDS).not_done:
            pass  # a signal that another thread was given is seen to here, by the main one, only when it wakes
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


def default_jobs(devices: Sequence[str]) -> int:
    """As many stages at once as there are devices; without any, one for each two cores, since a stage uses several."""
    return max(1, len(devices) or (os.cpu_count() or 1) // 2)


@contextmanager
def only_run(*, wait: bool = False, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """The only right to run the workspace, the current folder; ``wait`` until whoever has it has ended.

    Raises:
        BusyError: another run has it, and ``wait`` is false.
        StoppedError: ``stopped()`` while waiting.
    """
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(lease(RUN_LOCK, "this workspace"))
                break
            except BusyError:
                if not wait:
                    raise
            if stopped():
                raise StoppedError("stopped while another run had the workspace", remedy="run the same command again")
            time.sleep(LOOK_SECONDS)
        yield


def prepared(root: Path, targets: Sequence[str] = (), say: Said = print) -> Board:
    """The stages that a run has to go through: those that do not stay as they are, and only what ``targets`` need.

    What a killed DVC has left half written is mended first, which ``say`` is told.

    Raises:
        ParamsError: ``params.yaml`` is wrong; nothing has been started.
        WorkspaceError: DVC cannot read the pipeline, or there is no such target.
    """
    load_params(root / "params.yaml")
    torn.mend(root, say)
    stages = foreseen(root)
    torn.keep(root)
    titles = [stage.title for stage in stages]
    wanted = set[str]() if targets else set(titles)
    for name in targets:
        if not (found := [title for title in titles if name in (title, title.partition("@")[0])]):
            raise WorkspaceError(f"there is no stage {name}", remedy=f"choose from {', '.join(titles)}; or name none")
        wanted.update(found)
    for stage in reversed(stages):
        wanted.update(stage.upstream if stage.title in wanted else ())
    return Board([stage for stage in stages if stage.title in wanted and stage.state != "kept"], stages)


def carry_out(board: Board, through: Through, *, jobs: int | None, stopped: Callable[[], bool]) -> None:
    """Run what stands on the board.

    Raises:
        PipelineError: a stage failed; everything that does not need it is up to date all the same.
        StoppedError: it was asked to stop.
    """
    devices = leasable() if any(stage.gpus for stage in board.stages) else []
    board.events.tell("run started", stages=[stage.title for stage in board.stages], devices=devices)
    began, how = time.monotonic(), "crashed"
    try:
        work = stage_work(board, devices, jobs=jobs or default_jobs(devices), stopped=stopped)
        through(board.stages, work, board)
        error = failures(board)
        how = "stopped" if stopped() else "failed" if error else "completed"
    finally:
        board.events.tell("run ended", what=how, seconds=round(time.monotonic() - began, 2))
    if how == "stopped":
        raise StoppedError("stopped; finished units are kept", remedy="the same command goes on")
    if error:
        raise error


def run(root: Path, *, targets: Sequence[str], jobs: int | None, prefect: bool, console: Console) -> None:
    """Bring everything up to date, or what ``targets`` need.

    Raises:
        BusyError: another run has the workspace.
        PipelineError: a stage failed, or as `prepared` and `carry_out` tell.
    """
    with only_run(), asked_to_stop() as stop, told_if_it_fails("run"):
        board = prepared(root, targets)
        if not board.stages:
            console.print("everything is up to date")
            return
        if not prefect:
            with shown(board, console):
                carry_out(board, in_threads, jobs=jobs, stopped=stop.is_set)
            return
        if (url := os.environ.get(API)) and not answers(url):
            raise unreachable(url)
        from pipeline.orchestrate import in_prefect  # loads in a second
        from pipeline.own_server import some_server

        with some_server(stop.is_set), shown(board, console):
            carry_out(board, in_prefect, jobs=jobs, stopped=stop.is_set)
