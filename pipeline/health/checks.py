"""What `clevrcast doctor` is made of: checks, what they found, and running all of them at once without ever failing.

A check is a function of the checkout that yields `Finding`s. It may raise, hang, or load a library that takes the
process along: that is a bad finding too. Those that load such libraries run ``apart``, in a process of their own.

This module and those of the checks import nothing but the standard library until a check needs more, so that they can
speak where packages are missing: ``python -m stages.doctor``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

State = Literal["good", "warning", "bad"]
STATES: tuple[State, ...] = ("good", "warning", "bad")
STYLES: Mapping[State, str] = {"good": "green", "warning": "yellow", "bad": "bold red"}
PROGRAM = "stages.doctor"
SECONDS = 30.0
"""Which all checks together may take: then those that have not answered are bad."""
WORK, ARTIFACTS = Path(".work"), Path("artifacts")
INSTALL = "pip install -c constraints.txt -e '.[dev]'"


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it."""

    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """``apart`` names the process that makes it, with others of that name; "" is this one."""

    name: str
    look: Callable[[Path], Iterable[Finding]]
    apart: str = ""


@dataclass(frozen=True)
class Line:
    """One finding of one check, as it is shown."""

    check: str
    finding: Finding


def good(found: str) -> Finding:
    return Finding("good", found)


def warning(found: str, remedy: str) -> Finding:
    return Finding("warning", found, remedy)


def bad(found: str, remedy: str) -> Finding:
    return Finding("bad", found, remedy)


def findings(check: Check, root: Path) -> list[Finding]:
    """What a check found; where it raises, that, behind what it had found before."""
    found: list[Finding] = []
    try:
        found += check.look(root)
    except Exception as error:  # noqa: BLE001 - a check that fails is a finding, whatever it raises
        told, remedy = getattr(error, "message", None), getattr(error, "remedy", None)
        why = told if remedy else f"the check failed: {type(error).__name__}: {one_line(str(error))}"
        found.append(bad(str(why), remedy or f"`clevrcast doctor --trace '{check.name}'` shows where"))
    return found


def look_at(checks: Sequence[Check], root: Path, seconds: float = SECONDS) -> list[Line]:
    """All checks at once, each as far as it comes within ``seconds``; their lines in the order of the checks."""
    until, answers = time.monotonic() + seconds, dict[str, list[Finding]]()

    def here(check: Check) -> None:
        answers[check.name] = findings(check, root)

    def there(name: str) -> None:
        answers.update(_apart([check for check in checks if check.apart == name], root, until))

    apart = dict.fromkeys(check.apart for check in checks if check.apart)  # first: they take longest
    threads = [threading.Thread(target=there, args=(name,), daemon=True) for name in apart]
    threads += [threading.Thread(target=here, args=(c,), daemon=True) for c in checks if not c.apart]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(until + 0.5 - time.monotonic(), 0))  # the others give up by themselves
    late = [_late(f"it gave no answer within {seconds:g} s")]
    return [Line(check.name, finding) for check in checks for finding in answers.get(check.name, late)]


def _late(why: str) -> Finding:
    """Of a check that did not answer: no fault where processes wait for a processor anyway."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores:
        return warning(f"{why}, on a busy machine (load {load:.1f}, {cores} cores)", "clevrcast doctor --seconds 120")
    return bad(why, "look at what it waits for (a file system, a driver, a server): clevrcast doctor --seconds 120")


def serve(checks: Sequence[Check], root: Path, out: IO[str]) -> None:
    """Make the checks, one after the other, for the process that asked: a line of JSON for each."""
    for check in checks:
        body = {"check": check.name, "findings": [asdict(finding) for finding in findings(check, root)]}
        print(json.dumps(body), file=out, flush=True)


def _apart(checks: Sequence[Check], root: Path, until: float) -> dict[str, list[Finding]]:
    """The answers of the process that makes these checks; bad ones for those that it did not come to."""
    command = [sys.executable, "-m", PROGRAM, "--apart", *(check.name for check in checks)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # pipes would be held by its children too
        process = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            code = process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            process.wait()
        out.seek(0)
        answers = dict(_answers(out.read().decode(errors="replace").splitlines()))
        err.seek(0)
        said = err.read().decode(errors="replace")
    left = [check.name for check in checks if check.name not in answers]
    if left:
        trace = f"`clevrcast doctor --trace '{left[0]}'` shows where"
        died = bad(f"its process {_end(code or 0)}{_last(said)}", trace)
        answers[left[0]] = [_late("it gave no answer in time and was killed") if code is None else died]
        for name in left[1:]:
            answers[name] = [warning(f"not looked at: {left[0]} did not come to its end", f"see {left[0]}")]
    return answers


def _answers(lines: Iterable[str]) -> Iterator[tuple[str, list[Finding]]]:
    for line in lines:
        try:
            body = json.loads(line)
            yield body["check"], [Finding(**finding) for finding in body["findings"]]
        except (ValueError, KeyError, TypeError):  # what a library had to say
            continue


def _end(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""


def one_line(text: str) -> str:
    """The first line that is not blank, cut at 300 characters."""
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "no message")


def listed(things: Sequence[str], most: int = 6) -> str:
    """The first few, separated by commas, and how many more there are."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(things[:most]) + more


def writable(folder: Path) -> bool:
    """Whether a file can be made in the folder. Tried: permissions do not tell of a disk that is mounted read-only."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A folder for trials on the workspace's file system, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=nearest(root / WORK)) as folder:
        yield Path(folder)


def nearest(path: Path) -> Path:
    """The path itself, or the lowest folder above it that exists."""
    return path if path.exists() else nearest(path.parent)


def worst(lines: Iterable[Line]) -> State:
    states = {line.finding.state for line in lines}
    return next(state for state in reversed(STATES) if state in states or state == "good")


def as_json(lines: Sequence[Line]) -> str:
    """For programs."""
    checks = [{"check": line.check, **asdict(line.finding)} for line in lines]
    return json.dumps({"state": worst(lines), "checks": checks}, indent=1)


def show(lines: Sequence[Line]) -> None:
    """For people: a table, or plain lines where rich is missing."""
    try:
        table, console = _table(lines)
    except ImportError:
        for line in lines:
            print(f"{line.finding.state:8}{line.check}: {line.finding.found}")
            if line.finding.remedy:
                print(f"{'':8}what to do: {line.finding.remedy}")
        return
    console.print(table)


def _table(lines: Sequence[Line]) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    counts = {state: sum(line.finding.state == state for line in lines) for state in STATES}
    told = f"{counts['good']} good, {counts['warning']} with a warning, {counts['bad']} bad"
    table = Table(title="this machine and this workspace", caption=told)
    for title in ("check", "", "found", "what to do"):
        table.add_column(title, no_wrap=title in ("check", ""), overflow="fold")
    for line in lines:
        found = line.finding
        # Text, since brackets in a message would be taken for markup.
        table.add_row(line.check, Text(found.state, STYLES[found.state]), Text(found.found), Text(found.remedy))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a log has no width
    return table, console
