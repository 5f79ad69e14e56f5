"""One stage through DVC: ``dvc --wait-for-lock repro -s STAGE`` as a process group that never outlives its starter."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import BusyError
from pipeline.process import killed_with_starter

LOGS = Path(".work/logs")
RETRIED = {BusyError.exit_code, -signal.SIGKILL, 128 + signal.SIGKILL}
"""Exit codes of stages after which another try may succeed: somebody else was at it, or the kernel ran out of memory.
Bad input, wrong parameters and a full disk are as they were."""
PATIENCE = 0.1
GRACE = 10.0
"""Seconds between asking a stage to stop and killing it."""

What = Literal["kept", "restored", "ran", "failed", "stopped", "late", "skipped"]
"""Unchanged; back from the cache; run; failed; stopped from outside; over its time; not tried, since one before it
failed."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. ``exit_code`` is that of the stage's own command where it failed, else 0."""

    title: str
    what: What
    seconds: float = 0.0
    exit_code: int = 0
    log: Path | None = None

    @property
    def good(self) -> bool:
        return self.what in ("kept", "restored", "ran")


def reproduce(
    title: str,
    *,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    logs: Path = LOGS,
) -> Outcome:
    """Bring one stage up to date, if those before it are, and wait for it. What it says goes into ``logs``.

    Once ``stopped()`` is true, or after ``limit_seconds``, the whole group is asked to end and then killed; finished
    units stay. If this process dies, the kernel kills the group's first process, and with it the stage.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log, began = logs / f"{title}.log", time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s", title],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=killed_with_starter,  # the starting thread waits for it
        )
        ended: What | None = None
        try:
            while ended is None and process.poll() is None:
                if stopped():
                    ended = "stopped"
                elif limit_seconds is not None and time.monotonic() - began > limit_seconds:
                    ended = "late"
                else:
                    time.sleep(PATIENCE)
        finally:
            if process.poll() is None:
                _end(process)
    seconds = time.monotonic() - began
    if ended:
        return Outcome(title, ended, seconds, log=log)
    what, code = read_log(log.read_text(errors="replace"), process.returncode)
    return Outcome(title, what, seconds, code, log)


def read_log(said: str, exit_code: int) -> tuple[What, int]:
    """What `dvc repro` did, by what it printed, and the exit code of the stage's own command."""
    if exit_code != 0:
        found = re.search(r"failed to run: .*, exited with (-?\d+)", said)
        return "failed", int(found[1]) if found else exit_code
    if re.search(r"^Stage '.*' is cached - skipping run", said, re.MULTILINE):
        return "restored", 0
    return ("ran" if re.search(r"^Running stage '", said, re.MULTILINE) else "kept"), 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """The group is asked, and after `GRACE` killed; nothing of it is left."""
    for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()
