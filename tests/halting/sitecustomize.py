"""Stops a process at a certain step of its work, for tests of what a kill in that very moment does.

Python imports this by itself in every process whose ``PYTHONPATH`` names the folder. Where the file that
``CLEVRCAST_HALT`` names exists and one of its descriptions (`tests.faults.Halt`) is of this process, the steps are
looked for among Python's audit events (a file opened, renamed, linked, a module imported, a program started), and at
the last of them the process writes its id into ``FILE.hitN`` and stops itself with SIGSTOP. The first process to get
there is the only one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any


class _Halting:
    """An audit hook that stops the process once all steps were seen, one after the other."""

    def __init__(self, steps: list[list[Any]], torn: list[Any] | None, hit: str) -> None:
        self.steps = [(event, re.compile(about), times) for event, about, times in steps]
        self.torn, self.hit = torn, hit
        self.seen = 0
        self.busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy or not self.steps or event != self.steps[0][0]:
            return
        self.busy = True
        try:
            if self.steps[0][1].search(_told(event, arguments)):
                self.seen += 1
                if self.seen == self.steps[0][2]:
                    del self.steps[0]
                    self.seen = 0
                    if not self.steps:
                        self.arrived()
        finally:
            self.busy = False

    def arrived(self) -> None:
        if self.torn is None:
            return self.stop()
        file, least = self.torn
        before = os.stat(file).st_size if os.path.exists(file) else -1  # noqa: PTH110, PTH116 - no audit event

        def inside(frame: Any, event: str, argument: Any) -> None:  # between two instructions of who writes the file
            size = os.stat(file).st_size  # noqa: PTH116
            if least <= size < before:
                sys.setprofile(None)
                self.stop()

        sys.setprofile(inside)
        return None

    def stop(self) -> None:
        self.steps = []
        try:
            with open(self.hit, "x") as stream:  # noqa: PTH123
                stream.write(f"{os.getpid()}\n")
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGSTOP)


def _told(event: str, arguments: tuple[Any, ...]) -> str:
    if event == "open":
        path, _, flags = arguments
        return f"{path} {'w' if flags & (os.O_WRONLY | os.O_RDWR) else 'r'}"
    if event == "import":
        return str(arguments[0])
    if event == "subprocess.Popen":
        return " ".join(map(str, arguments[1]))
    return " ".join(map(str, arguments))


def _install(file: str) -> None:
    try:
        halts = json.loads(Path(file).read_text())
    except FileNotFoundError:
        return
    command = Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    helper = bool(os.environ.get("CLEVRCAST_HELPER"))
    for number, halt in enumerate(halts):
        hit = f"{file}.hit{number}"
        if not Path(hit).exists() and re.search(halt["who"], command) and helper == halt["helper"]:
            sys.addaudithook(_Halting(halt["steps"], halt["torn"], hit))
    asleep = time.sleep

    def sleep(seconds: float) -> None:  # Python tells of it from 3.13 on only
        sys.audit("sleep", seconds)
        asleep(seconds)

    time.sleep = sleep


if "CLEVRCAST_HALT" in os.environ:
    _install(os.environ["CLEVRCAST_HALT"])
