"""Who started this process, and ending with it; starting one that ends with us.

`stages/__init__.py` imports this module before anything else, since loading PyTorch takes seconds in which whoever
started the stage may die: a parent that is asked for only then would be the wrong one, and the stage would live on as
a second writer.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Literal

STARTED_BY: Final = os.getppid()
PATIENCE = 0.1
GRACE = 10.0
"""Seconds between asking a process to stop and killing it."""


def killed_with_starter() -> None:
    """On Linux, have the kernel kill this process when the thread that started it ends; elsewhere nothing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends; elsewhere there is no such thing and nothing is done."""
    if sys.platform != "linux":
        return
    killed_with_starter()
    if os.getppid() != STARTED_BY:  # it ended before the request
        os.kill(os.getpid(), signal.SIGKILL)


def supervise(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    said: Callable[[str], object] = lambda line: None,
) -> int | Literal["stopped", "late"]:
    """Run a command to its end as a process group of its own; its exit code, or why it was ended.

    What it says goes into ``log``, where the log before is kept as ``LOG.1``, and line by line to ``said``. Once
    ``stopped()`` is true, or after ``limit_seconds``, the whole group is asked to end and then killed. If this process
    dies, the kernel kills the group's first process, which has to see to the others.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_name(f"{log.name}.1"))
    began = time.monotonic()
    with log.open("wb") as out, log.open("rb") as back:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=dict(os.environ if environment is None else environment),
            start_new_session=True,
            preexec_fn=killed_with_starter,  # the starting thread waits for it
        )
        try:
            while process.poll() is None:
                _pass_on(back, said)
                if stopped():
                    return "stopped"
                if limit_seconds is not None and time.monotonic() - began > limit_seconds:
                    return "late"
                time.sleep(PATIENCE)
        finally:
            end_group(process)
            _pass_on(back, said)
            if rest := back.read():
                said(rest.decode(errors="replace"))
    return process.returncode


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Where it still runs, the group of ``process`` is asked, and after `GRACE` killed; nothing of it is left."""
    for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()


def _pass_on(stream: BinaryIO, said: Callable[[str], object]) -> None:
    """The lines that have been written since; one that is not finished waits for the rest of it."""
    while line := stream.readline():
        if not line.endswith(b"\n"):
            stream.seek(-len(line), os.SEEK_CUR)
            return
        said(line.decode(errors="replace").rstrip("\n").rsplit("\r", 1)[-1])
