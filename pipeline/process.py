"""Who started this process, and ending with it; starting one that ends with us.

`stages/__init__.py` imports this module before anything else, since loading PyTorch takes seconds in which whoever
started the stage may die: a parent that is asked for only then would be the wrong one, and the stage would live on as
a second writer. Python takes a moment to start, too. So what we start ourselves is bound to us before that
(`ended_with_us`), and what DVC or Prefect start looks whether its parent is one of these, and not who adopts orphans.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Literal

STARTED_BY: Final = os.getppid()
PATIENCE = 0.1
GRACE = 10.0
"""Seconds between asking a process to stop and killing it."""
LOGS = Path(".work/logs")
"""What programs that we start have said, below the workspace."""

Said = Callable[[str], object]
"""Gets what is said, line by line."""


PR_SET_PDEATHSIG = 1


def ended_with_us() -> Callable[[], None]:
    """For ``preexec_fn``: on Linux, have the kernel kill the new process when the thread that starts it ends, also if
    that is before it could ask for it; elsewhere nothing."""
    if sys.platform != "linux":
        return lambda: None
    starter, prctl = os.getpid(), ctypes.CDLL(None, use_errno=True).prctl  # nothing is loaded after the fork

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != starter:
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


def die_with_parent(*called: str) -> None:
    """Ask Linux to kill this process when its parent ends; elsewhere there is no such thing and nothing is done.

    ``called``: words, one of which is in the command of the right parent. Whoever has adopted this process before it
    could look who had started it is another one.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != STARTED_BY or not _is_called(STARTED_BY, called):  # it ended before the request
        os.kill(os.getpid(), signal.SIGKILL)


def _is_called(pid: int, words: Sequence[str]) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # not to be known
        return True
    return not words or any(word in command for word in words)


def supervise(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    said: Said = lambda line: None,
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
            preexec_fn=ended_with_us(),  # the starting thread waits for it
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


def last_lines(said: Path | str, most: int) -> str:
    """The end of a log or a text, indented, for an error message."""
    text = said.read_text(errors="replace") if isinstance(said, Path) else said
    return "\n".join(f"    {line}" for line in text.splitlines()[-most:])


@contextmanager
def meanwhile(look: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call ``look`` every so many seconds, in a thread, as long as the block lasts."""
    ended = threading.Event()

    def looks() -> None:
        while not ended.wait(seconds):
            look()

    thread = threading.Thread(target=looks)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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


def _pass_on(stream: BinaryIO, said: Said) -> None:
    """The lines that have been written since; one that is not finished waits for the rest of it."""
    while line := stream.readline():
        if not line.endswith(b"\n"):
            stream.seek(-len(line), os.SEEK_CUR)
            return
        said(line.decode(errors="replace").rstrip("\n").rsplit("\r", 1)[-1])
