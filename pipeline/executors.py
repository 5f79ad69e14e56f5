"""Who builds the units of a stage: this process alone, with workers beside it, or workers on a Ray cluster.

``CLEVRCAST_EXECUTOR`` chooses: ``serial``, ``process`` (the default) or ``ray`` (`pipeline.ray_crew`). A worker is the
same program, ``python -m stages.NAME [KEY]``, told by ``CLEVRCAST_HELPER`` to build units that nobody holds and to end
without publishing anything. ``CLEVRCAST_PART=i/N`` makes any of them build every N-th unit only and publish nothing:
the task of a Slurm array. All share one journal and its leases (`pipeline.journal`), so they mix and resume, and a
worker that dies costs time and nothing else.

Every worker computes with one thread: sums then do not depend on how many cores a machine has, and neither does any
byte of a store (and on two cores two workers are about twice as fast as two threads).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pipeline.devices import DEVICE
from pipeline.errors import WorkspaceError
from pipeline.process import ended_with_us
from pipeline.shards import Crew, NoCrew

Executor = Literal["serial", "process", "ray"]
EXECUTOR = "CLEVRCAST_EXECUTOR"
HELPER = "CLEVRCAST_HELPER"
PART = "CLEVRCAST_PART"
WORKERS = "CLEVRCAST_WORKERS"
MOST_BY_DEFAULT = 8
"""A worker takes about 1 GB; more than this many are started only when asked for."""

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """The stage that workers are to run, and what each of them computes on."""

    name: str
    key: str
    root: Path
    fingerprint: str
    devices: tuple[str, ...]
    """One per GPU, or the CPU alone."""
    log: Path
    computes: bool = True
    """Whether units are made on the device at all, here or elsewhere; else the work is the CPU's on every machine."""
    single: bool = False
    """Whether the stage is one unit (training, evaluation), which may use every core."""

    @property
    def on_gpu(self) -> bool:
        return self.devices[0].startswith("cuda")


def executor() -> Executor:
    """What ``CLEVRCAST_EXECUTOR`` says. Raises WorkspaceError for a name that is none."""
    asked = os.environ.get(EXECUTOR, "") or "process"
    for known in get_args(Executor):
        if asked == known:
            return known
    raise WorkspaceError(
        f"{EXECUTOR}={asked} is no executor", remedy=f"choose one of {', '.join(get_args(Executor))}, or unset it"
    )


def helped_fingerprint() -> str:
    """The fingerprint that this process is to build units of, where it is a worker; else ""."""
    return os.environ.get(HELPER, "")


def part_of(units: Sequence[T], part: str | None = None) -> list[T]:
    """The i-th of every N units, for ``CLEVRCAST_PART=i/N`` (1 to N); all of them where it is unset."""
    text = os.environ.get(PART, "") if part is None else part
    if not text:
        return list(units)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise WorkspaceError(f"{PART}={text} is not i/N with 1 <= i <= N", remedy=f"for example {PART}=1/16")
    return list(units[int(match[1]) - 1 :: int(match[2])])


def is_part() -> bool:
    """Whether this process builds a part only, and publishes nothing."""
    return bool(os.environ.get(PART))


def worker_count(devices: Sequence[str], units: int) -> int:
    """Workers for so many units: ``CLEVRCAST_WORKERS``, else one per GPU, else one per core (at most 8)."""
    asked = os.environ.get(WORKERS, "")
    default = min(os.cpu_count() or 1, MOST_BY_DEFAULT) if devices[0] == "cpu" else len(devices)
    return max(1, min(int(asked) if asked else default, units))


def single_thread() -> None:
    """Make this process compute with one thread; see the module's docstring."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@contextmanager
def crew_for(call: Call, units: int) -> Iterator[Crew]:
    """Whoever builds ``units`` missing units beside this process; those still there at the end are ended."""
    count = worker_count(call.devices, units)
    chosen = executor()
    stays = call.single and (call.on_gpu or os.environ.get(DEVICE) == "cpu")  # nothing to gain elsewhere
    if chosen == "ray" and units and not stays:
        from pipeline.ray_crew import ray_crew

        with ray_crew(call, units) as crew:
            yield crew
    elif chosen == "process" and count > 1:
        with _processes(call, count - 1) as crew:
            yield crew
    else:
        yield NoCrew()


class _Processes:
    """Workers on this machine, beside this process, which builds too."""

    alone = True

    def __init__(self, started: list[subprocess.Popen[bytes]], log: Path) -> None:
        self.started, self.log = started, log
        self._told: set[int] = set()

    def working(self) -> bool:
        for process in self.started:
            code = process.poll()
            if code and process.pid not in self._told:
                self._told.add(process.pid)
                print(
                    f"a worker ended with exit code {code}, its unit is built again (log: {self.log})", file=sys.stderr
                )
        return any(process.poll() is None for process in self.started)


@contextmanager
def _processes(call: Call, count: int) -> Iterator[_Processes]:
    command = [sys.executable, "-m", f"stages.{call.name}", *([call.key] if call.key else [])]
    started: list[subprocess.Popen[bytes]] = []
    call.log.parent.mkdir(parents=True, exist_ok=True)
    with call.log.open("wb") as stream:
        try:
            for k in range(count):
                # This process takes the first device, its workers the others in turn.
                device = call.devices[(k + 1) % len(call.devices)]
                environment = {**os.environ, HELPER: call.fingerprint, DEVICE: device}
                worker = subprocess.Popen(
                    command, env=environment, stdout=stream, stderr=stream, preexec_fn=ended_with_us()
                )
                started.append(worker)
            yield _Processes(started, call.log)
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()
