"""`tests.faults` for a workspace that is served: what goes on by itself is waited for, and serve is started again."""

from __future__ import annotations

import shutil
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

import psutil

from pipeline.health.server import answers
from pipeline.journal import lease
from tests.faults import (
    GONE_SECONDS,
    TOKEN,
    Case,
    Halting,
    MissedError,
    Role,
    Row,
    edit,
    end_all,
    go_on,
    held_leases,
    ours,
)
from tests.service import Service
from tests.workspace import Workspace

VALUES = (40, 48)
"""For `tests.faults.edit`, in turn: what uninterrupted runs make of them is known."""


class ServedBed:
    """A served workspace, which goes from one kill to the next."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        self.lock, self.digests = {}, {}
        edit(workspace, VALUES[0])
        workspace.dvc("repro", "-q")
        twin = copy(workspace)
        twin.folder = folder / "twin"
        shutil.copytree(workspace.folder, twin.folder, symlinks=True)
        for value in (*VALUES[1:], VALUES[0]):
            edit(twin, value)
            twin.dvc("repro", "-q")
            self.lock[value], self.digests[value] = (twin.folder / "dvc.lock").read_text(), twin.digests(".")
        self.token = uuid.uuid4().hex
        self.halting = Halting(folder / "halt.json")
        (folder / "prefect").mkdir()
        environment = {"CLEVRCAST_GPUS": "fake:0", TOKEN: self.token, **self.halting.environment(workspace.environment)}
        self.value = VALUES[0]
        self.service = Service(workspace, folder / "prefect", **environment)
        self.workspace = workspace

    def edit(self) -> None:
        """What makes stages run that were not run before."""
        self.value = next(value for value in VALUES if value != self.value)
        shutil.rmtree(self.workspace.folder / ".dvc/cache/runs", ignore_errors=True)
        edit(self.workspace, self.value)

    def as_wanted(self) -> bool:
        """Whether the workspace is what an uninterrupted run makes of it, and nothing is at work."""
        if (self.workspace.folder / "dvc.lock").read_text() != self.lock[self.value] or self.flow_runs():
            return False
        return self.workspace.digests(".") == self.digests[self.value]

    def whole(self) -> bool:
        """Whether server and worker are there, and nothing is to be done."""
        there = ours(self.token)
        servants: tuple[Role, ...] = ("serve", "Prefect's worker", "Prefect's server")
        if not all(any(process.plays(role) for process in there) for role in servants):
            return False
        return answers(f"http://127.0.0.1:{self.service.port}/api") and self.as_wanted()

    def flow_runs(self) -> list[int]:
        return [process.pid for process in ours(self.token) if process.plays("flow run")]

    def end(self) -> None:
        self.service.process.send_signal(signal.SIGINT)
        try:
            self.service.process.wait(60)
        finally:
            end_all(self.token)


def carry_out_served(case: Case, bed: ServedBed) -> Row:
    """Edit, kill in the middle of what follows, look, and wait until everything is as if nothing had happened.

    Raises:
        MissedError: the phase was not hit.
    """
    row, service = Row.of(case), bed.service
    if case.phase.startswith("starting"):
        service.process.send_signal(signal.SIGINT)
        service.process.wait(60)
        wait(lambda: not ours(bed.token), 15, "the end of what was served")
    wait(lambda: case.phase.startswith("starting") or bed.whole(), 120, "server and worker")
    bed.halting.ask(case)
    with ExitStack() as held:
        if case.held:
            held.enter_context(lease(bed.workspace.folder / case.held, "a test"))
        if case.phase != "idle":
            bed.edit()
        if case.phase.startswith("starting"):
            service.launch()
        if case.halt:
            wait(lambda: bed.halting.pids() or service.process.poll() is not None, 90, "the phase")
        doomed = strike(case, bed)
    began = time.monotonic()
    if case.victim == "serve":
        row.outcome = f"ended with {service.process.wait(60)}"
        wait(lambda: not ours(bed.token), GONE_SECONDS, "")
        row.failures += [f"left running: {process.command}" for process in ours(bed.token)]
        row.failures += [f"still held: {name}" for name in held_leases(bed.workspace)]
        row.gone_seconds = round(time.monotonic() - began, 1)
        end_all(bed.token)
        service.start()
        row.next_run = "served again: "
    else:
        wait(lambda: not alive(doomed), GONE_SECONDS, "")
        row.failures += [f"left running: {process}" for process in alive(doomed)]
        row.gone_seconds = round(time.monotonic() - began, 1)
        row.outcome = "ended with what it had started, if anything"
    settle(case, bed, row)
    return row


def settle(case: Case, bed: ServedBed, row: Row) -> None:
    """Wait for the result, ask for it where nobody else does, and look."""
    service = bed.service
    if case.phase == "idle":
        bed.edit()
        row.next_run += "an edit was built"
    else:
        row.next_run += "went on by itself"
    if not wait(bed.as_wanted, 120, ""):
        row.failures.append("not what an uninterrupted run makes of it")
        row.failures.append(service.said()[-3000:])
    wait(lambda: not idle_leases(bed), 10, "")
    row.failures += [f"still held: {name}" for name in idle_leases(bed)]


def idle_leases(bed: ServedBed) -> list[str]:
    """Those that nobody should hold when nothing runs."""
    return [name for name in held_leases(bed.workspace) if not name.startswith("serve.lock")]


def strike(case: Case, bed: ServedBed) -> list[psutil.Process]:
    """Send the signal; returns the victim, and all that it had started by then."""
    halted = bed.halting.pids() if case.halt else []
    if case.halt and not halted:
        raise MissedError("the phase was not hit")
    found = [process for process in ours(bed.token) if process.plays(case.victim)]
    if not found:
        raise MissedError(f"there is no {case.victim}: {ours(bed.token)}")
    found.sort(key=lambda process: process.pid not in halted)
    victim = psutil.Process(found[0].pid)
    doomed = [victim, *victim.children(recursive=True)]
    victim.send_signal(signal.Signals[f"SIG{case.sign}"])
    go_on(halted, bed.token)
    return doomed


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait(true: Callable[[], Any], seconds: float, what: str) -> bool:
    """Whether it became true in time; where ``what`` is named, an error if not."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            if what:
                raise MissedError(f"waited {seconds} s for {what}")
            return False
        time.sleep(0.1)
    return True
