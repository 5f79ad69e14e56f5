"""Who builds the units of a stage: this process alone, or with helpers that take what is free.

A helper is the same program, ``python -m stages.NAME [KEY]``, told by ``CLEVRCAST_HELPER`` to build units that nobody
holds and to end without publishing anything. Leases keep two from building one unit, and the parent comes back for
whatever a helper left undone, so a helper that dies costs time and nothing else.

Every worker computes with one thread: sums then do not depend on how many cores a machine has, and neither does any
byte of a store (and on two cores two workers are about twice as fast as two threads).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HELPER = "CLEVRCAST_HELPER"
WORKERS = "CLEVRCAST_WORKERS"
MOST_BY_DEFAULT = 8
"""A worker takes about 1 GB; more than this many are started only when asked for."""


def is_helper() -> bool:
    """Whether this process was started by `helpers`."""
    return bool(os.environ.get(HELPER))


def worker_count(device: str, units: int) -> int:
    """Workers for so many units: ``CLEVRCAST_WORKERS``, else one per core (at most 8), else one on a GPU."""
    asked = os.environ.get(WORKERS, "")
    default = min(os.cpu_count() or 1, MOST_BY_DEFAULT) if device == "cpu" else 1
    return max(1, min(int(asked) if asked else default, units))


def single_thread() -> None:
    """Make this process compute with one thread; see the module's docstring."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@contextmanager
def helpers(count: int, name: str, key: str, log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start ``count`` helpers of a stage; what they print goes to ``log``. Those still there at the end are killed."""
    command = [sys.executable, "-m", f"stages.{name}", *([key] if key else [])]
    started: list[subprocess.Popen[bytes]] = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        try:
            for _ in range(count):
                environment = {**os.environ, HELPER: "1"}
                started.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=stream))
            yield started
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()
