"""One stage through DVC: ``dvc --wait-for-lock repro -s STAGE`` as a process group that never outlives its starter."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import BusyError
from pipeline.process import LOGS, Said, supervise

RETRIED = {BusyError.exit_code, -signal.SIGKILL, 128 + signal.SIGKILL}
"""Exit codes of stages after which another try may succeed: somebody else was at it, or the kernel ran out of memory.
Bad input, wrong parameters and a full disk are as they were."""
BUSY = (
    r"it is being blocked by:|Unable to acquire lock|RWLock-file|dvc\.lock' (is invalid|validation failed)"
    r"|^ERROR: unexpected error"
)
"""What DVC says where another one was in its way, or was killed and left behind what `pipeline.torn` mends; the last is
said by one whose claims were in a list that could not be read and was removed."""

What = Literal["kept", "restored", "ran", "failed", "stopped", "late", "skipped"]
"""Unchanged; back from the cache; run; failed; stopped from outside; over its time; not tried, since one before it
failed."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. ``exit_code`` is that of the stage's own command where it failed, else 0; ``message``
    tells why it was not even started."""

    title: str
    what: What
    seconds: float = 0.0
    exit_code: int = 0
    log: Path | None = None
    message: str = ""

    @property
    def good(self) -> bool:
        return self.what in ("kept", "restored", "ran")


def reproduce(
    title: str,
    *,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    said: Said = lambda line: None,
    logs: Path = LOGS,
) -> Outcome:
    """Bring one stage up to date, if those before it are, and wait for it, as `pipeline.process.supervise` tells.

    Finished units stay, whatever happens. DVC dies with this process, and the stage with DVC.
    """
    log, began = logs / f"{title}.log", time.monotonic()
    ended = supervise(
        [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s", title],
        log,
        environment={**os.environ, **(environment or {})},
        limit_seconds=limit_seconds,
        stopped=stopped,
        said=said,
    )
    seconds = time.monotonic() - began
    if isinstance(ended, str):
        return Outcome(title, ended, seconds, log=log)
    what, code = read_log(log.read_text(errors="replace"), ended)
    return Outcome(title, what, seconds, code, log)


def read_log(said: str, exit_code: int) -> tuple[What, int]:
    """What `dvc repro` did, by what it printed, and the exit code of the stage's own command."""
    if exit_code != 0:
        if re.search(BUSY, said, re.MULTILINE):
            return "failed", BusyError.exit_code
        found = re.search(r"failed to run: .*, exited with (-?\d+)", said)
        return "failed", int(found[1]) if found else exit_code
    if re.search(r"^Stage '.*' is cached - skipping run", said, re.MULTILINE):
        return "restored", 0
    return ("ran" if re.search(r"^Running stage '", said, re.MULTILINE) else "kept"), 0
