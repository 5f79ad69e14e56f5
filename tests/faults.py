"""Killing one process in one phase of a run, and what is to be seen afterwards: the machinery of tests/test_faults.py.

A phase is not hoped for: a process of the run stops itself at an exact step of its work (`tests/halting`), the signal
is sent, and only then does it go on, if it still can. So every case says of itself whether its phase was hit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.journal import holder, lease
from tests.workspace import Workspace

Way = Literal["dvc repro", "clevrcast run", "clevrcast run --prefect", "clevrcast serve"]
Sign = Literal["KILL", "TERM", "INT", "Ctrl-C"]
Role = Literal["run", "dvc", "stage", "worker", "flow run", "Prefect's worker", "Prefect's server", "serve"]
TOKEN = "CLEVRCAST_TEST_TOKEN"
WORKERS = 2
GONE_SECONDS = 10.0

ROLES: dict[Role, str] = {
    "run": r"-m pipeline\.cli run",
    "serve": r"-m pipeline\.cli serve",
    "dvc": r"-m dvc .*repro",
    "stage": r"python\S* (-m stages\.|stub_stage\.py )",
    "worker": r"python\S* (-m stages\.|stub_stage\.py )",
    "flow run": r"-m pipeline\.orchestrate",
    "Prefect's worker": r"-m prefect worker start",
    "Prefect's server": r"-m uvicorn|-m prefect server start",
}


@dataclass(frozen=True)
class Halt:
    """Where a process of the run stops: one whose command matches ``who``, at the last of the ``steps``, each an audit
    event, what it is about, and the how manieth. ``torn``: a file, and how much of it is written anew by then."""

    who: str
    steps: tuple[tuple[str, str, int], ...]
    torn: tuple[str, int] | None = None
    helper: bool = False


@dataclass(frozen=True)
class Case:
    """One kill: of whom, when, in which way of running, by which signal."""

    victim: Role
    phase: str
    way: Way
    sign: Sign
    halt: Halt | None
    """None: at once, while nothing is to be done."""
    bed: str
    """Which pipeline: see `Bed`."""
    target: str = ""
    """The stage to run; none: all."""
    held: str = ""
    """A lock that somebody else holds meanwhile, so that the run waits for it."""
    meanwhile: Halt | None = None
    """Where another process of the run has to stop too, so that the phase comes about."""
    done: str = ""
    """How many units are finished in that phase: none, some or all of them; "" where there are none."""

    @property
    def id(self) -> str:
        words = f"{self.way} {self.target} {self.victim} {self.phase} {self.sign}"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


@dataclass
class Row:
    """What became of a case."""

    case: str
    process: str
    phase: str
    way: str
    signal: str
    outcome: str = ""
    next_run: str = ""
    gone_seconds: float = 0.0
    kept_units: int = 0
    failures: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case) -> Row:
        pipeline = f" ({case.target})" if case.target else ""
        return cls(case.id, case.victim, case.phase, case.way + pipeline, case.sign)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.case}.json").write_text(json.dumps(asdict(self)))


class MissedError(Exception):
    """The run ended, or went on, without the phase having been hit: the case does not count."""


@dataclass(frozen=True)
class Whole:
    """What an uninterrupted run of a target leaves: ``dvc.lock``, the digests of all outputs, the target's units."""

    lock: str
    digests: dict[str, str]
    units: int


class Bed:
    """A pipeline that is ready to be run, and what an uninterrupted run makes of it."""

    def __init__(self, workspace: Workspace, folder: Path, environment: dict[str, str]) -> None:
        self.workspace, self.folder, self.environment = workspace, folder, environment
        self._whole: dict[str, Whole] = {}

    def fresh(self, folder: Path) -> Workspace:
        """A copy of its own."""
        shutil.copytree(self.workspace.folder, folder, symlinks=True)
        made = copy(self.workspace)
        made.folder = folder
        return made

    def whole(self, target: str) -> Whole:
        """Of a stage and what it needs, or of everything ("")."""
        if target not in self._whole:
            twin = self.fresh(self.folder / f"whole-{target}")
            twin.environment = {**twin.environment, **self.environment}
            twin.dvc("repro", *([target] if target else []))
            units = [unit for unit in finished(twin) if f"/.work/{target}/" in unit]
            self._whole[target] = Whole((twin.folder / "dvc.lock").read_text(), twin.digests("."), len(units))
        return self._whole[target]


@dataclass(frozen=True)
class Process:
    pid: int
    command: str
    helper: bool

    def plays(self, role: Role) -> bool:
        return bool(re.search(ROLES[role], self.command)) and self.helper == (role == "worker")


def ours(token: str) -> list[Process]:
    """Every living process that inherited the token."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            if token.encode() not in environment:
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if command:  # else a zombie: dead, not yet waited for
            found.append(Process(int(folder.name), command, b"CLEVRCAST_HELPER=" in environment))
    return found


def finished(workspace: Workspace) -> dict[str, int]:
    """Time of the marker of every finished unit."""
    markers = (workspace.folder / ".work").glob("*/*/*/unit.json")
    return {str(file.parent): file.stat().st_mtime_ns for file in markers if not file.parent.name.startswith(".")}


def held_leases(workspace: Workspace) -> list[str]:
    """Locks of ours that somebody holds."""
    work = workspace.folder / ".work"
    return [f"{file.relative_to(work)}: {who}" for file in sorted(work.rglob("*.lock")) if (who := holder(file))]


def stopped(pid: int) -> bool:
    """Whether the process has stopped itself."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Halting:
    """The place where a process of the run is to stop, and has."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.hits: list[Path] = []

    def ask(self, case: Case) -> None:
        for hit in self.hits:
            hit.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)
        halts = [halt for halt in (case.halt, case.meanwhile) if halt]
        self.hits = [self.file.with_name(f"{self.file.name}.hit{number}") for number in range(len(halts))]
        if halts:
            self.file.write_text(json.dumps([asdict(halt) for halt in halts]))

    def environment(self, before: dict[str, str]) -> dict[str, str]:
        here = Path(__file__).with_name("halting")
        path = os.pathsep.join(filter(None, [str(here), before.get("PYTHONPATH", "")]))
        return {"CLEVRCAST_HALT": str(self.file), "PYTHONPATH": path}

    def pids(self) -> list[int]:
        """Of the processes that have stopped, the case's first; none before all have."""
        texts = [hit.read_text() if hit.exists() else "" for hit in self.hits]
        there = [int(text) for text in texts if text.endswith("\n")]
        return there if len(there) == len(self.hits) and all(map(stopped, there)) else []


def wait_for_hit(halting: Halting, run: subprocess.Popen[bytes], seconds: float = 120) -> list[int]:
    until = time.monotonic() + seconds
    while not (pids := halting.pids()):
        if run.poll() is not None or time.monotonic() > until:
            raise MissedError(f"the phase was not hit (exit code {run.poll()})")
        time.sleep(0.02)
    return pids


def strike(case: Case, token: str, halted: list[int], run: subprocess.Popen[bytes]) -> None:
    """Send the signal, and let the stopped processes go on."""
    if case.sign == "Ctrl-C":
        os.killpg(run.pid, signal.SIGINT)
    else:
        stopped_one = [p for p in ours(token) if p.pid == halted[0] and p.plays(case.victim)]
        chosen = stopped_one or [p for p in ours(token) if p.plays(case.victim)]
        if not chosen:
            raise MissedError(f"there is no {case.victim}: {ours(token)}")
        os.kill(chosen[0].pid, signal.Signals[f"SIG{case.sign}"])
    go_on(halted, token)


def check_done(case: Case, finished: Iterable[str], of: int) -> None:
    """Whether as many units of the target are finished as the phase says."""
    units = sum(f"/.work/{case.target}/" in unit for unit in finished)
    there = "none" if not units else "all" if units == of else "some"
    if case.done not in ("", there):
        raise MissedError(f"{there} of the units are finished, not {case.done}")


def go_on(halted: list[int], token: str) -> None:
    for process in ours(token):
        if process.pid in halted:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)


def wait_until_gone(token: str, seconds: float = GONE_SECONDS) -> list[Process]:
    """The processes that are left after that time."""
    until = time.monotonic() + seconds
    while (left := ours(token)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def end_all(token: str) -> None:
    """After a case, whatever became of it."""
    while left := ours(token):
        for process in left:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def edit(workspace: Workspace, value: int) -> None:
    """Have decode, label and flow run, and decode give something else."""
    workspace.set("decode.frames", value)
    workspace.set("decode.timeout", float(value))


def command_of(case: Case) -> list[str]:
    options = {
        "dvc repro": ["dvc", "repro"],
        "clevrcast run": ["pipeline.cli", "run", "--jobs", "2"],
        "clevrcast run --prefect": ["pipeline.cli", "run", "--jobs", "2", "--prefect"],
    }[case.way]
    return [sys.executable, "-m", *options, *([case.target] if case.target else [])]


def carry_out(case: Case, bed: Bed, folder: Path) -> Row:
    """Run, kill, look, run again, compare.

    Raises:
        MissedError: the phase was not hit.
    """
    row, token = Row.of(case), uuid.uuid4().hex
    bed.whole(case.target)
    workspace, log = bed.fresh(folder / "checkout"), folder / "run.log"
    halting = Halting(folder / "halt.json")
    halting.ask(case)
    environment = {**workspace.environment, **bed.environment, TOKEN: token}
    environment |= halting.environment(environment)
    if "--prefect" in case.way:
        environment["PREFECT_HOME"] = str(folder / "prefect")
    try:
        with ExitStack() as others, log.open("wb") as out:
            if case.held:  # one of our locks, or DVC's, is in other hands
                others.enter_context(lease(workspace.folder / case.held, "a test"))
            run = subprocess.Popen(
                command_of(case),
                cwd=workspace.folder,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            halted = wait_for_hit(halting, run)
            before, began = finished(workspace), time.monotonic()
            check_done(case, before, bed.whole(case.target).units)
            strike(case, token, halted, run)
            if case.victim == "run":
                run.wait(60)
        code = run.wait(240)  # with nobody in its way
        left = wait_until_gone(token)
        row.gone_seconds = round(time.monotonic() - began, 1)
        row.failures += [f"left running: {process.command}" for process in left]
        end_all(token)
        row.failures += [f"still held: {held}" for held in held_leases(workspace)]
        row.outcome = "went on to its end" if code == 0 else f"ended with {code}"
        row.kept_units = sum(f"/.work/{case.target}/" in unit for unit in before)
        go_on_and_compare(case, bed, workspace, row, before, completed=code == 0)
        row.failures += [f"left running by the next run: {process.command}" for process in ours(token)]
    finally:
        end_all(token)
    if row.failures:
        row.failures.append(log.read_text(errors="replace")[-3000:])
    return row


def go_on_and_compare(
    case: Case, bed: Bed, workspace: Workspace, row: Row, before: dict[str, int], *, completed: bool
) -> None:
    """The next run, and whether everything is as if nothing had happened."""
    command = command_of(case) if case.way == "dvc repro" else [sys.executable, "-m", "pipeline.cli", "run"]
    if case.target and case.target not in command:
        command.append(case.target)
    said = again(workspace, bed, command)
    if said is None and case.way == "dvc repro":  # what DVC refuses to read is mended by our own command
        row.next_run = "`dvc repro` refused; `clevrcast run`: "
        said = again(workspace, bed, [sys.executable, "-m", "pipeline.cli", "run", *command[4:]])
    if said is None:
        row.failures.append(f"the next run failed: {again.last}")
        return
    row.next_run += told(said, completed=completed)
    if case.target and f"{case.target} ran" in row.next_run and "units built" not in row.next_run:
        last = workspace.last_run(case.target)
        row.next_run += f", {last['built']} units built, {last['reused']} found ready"
    after = finished(workspace)
    lost = [unit for unit in before if after.get(unit) != before[unit]]
    row.failures += [f"lost or built again: {unit}" for unit in lost]
    if (workspace.folder / "dvc.lock").read_text() != bed.whole(case.target).lock:
        row.failures.append("dvc.lock is another one")
    if workspace.digests(".") != bed.whole(case.target).digests:
        row.failures.append("other outputs")
    row.failures += [f"left: {file}" for file in (workspace.folder / ".work").rglob(".*.building")]
    row.failures += [f"still held: {held}" for held in held_leases(workspace)]


class _Again:
    last = ""

    def __call__(self, workspace: Workspace, bed: Bed, command: Sequence[str]) -> str | None:
        """What a command says that succeeds; None where it fails."""
        done = subprocess.run(
            command,
            cwd=workspace.folder,
            env={**workspace.environment, **bed.environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        self.last = done.stdout
        return done.stdout if done.returncode == 0 else None


again = _Again()


def told(said: str, *, completed: bool) -> str:
    """What a run did, in few words."""
    ran = re.findall(r"^Running stage '(.+)'", said, re.MULTILINE) + re.findall(r"^(\S+): ran,", said, re.MULTILINE)
    cached = re.findall(r"^Stage '(.+)' is cached", said, re.MULTILINE)
    cached += re.findall(r"^(\S+): restored,", said, re.MULTILINE)
    units = re.findall(r"(\d+) units built, (\d+) found ready", said)
    parts = [f"{name} ran" for name in ran] + [f"{name} from the cache" for name in cached]
    parts += [f"{built} units built, {ready} found ready" for built, ready in units]
    if "dvc.lock was cut off" in said:
        parts.insert(0, "dvc.lock put back")
    if "rwlock could not be read" in said:
        parts.insert(0, "rwlock removed")
    return ", ".join(parts) or ("nothing left to do" if completed else "everything was there")
