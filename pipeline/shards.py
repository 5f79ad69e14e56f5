"""Resumable units of work: built one by one in ``.work``, marked when whole, found again after any interruption.

::

    .work/<stage>/<fingerprint>/<unit key>/...          a finished unit: its files and, written last, unit.json
    .work/<stage>/<fingerprint>/.<unit key>.building/   a unit in progress (removed when it is started again)
    .work/<stage>/<fingerprint>/<unit key>.lock         held (flock) by the one process that builds it

The fingerprint stands for everything that makes a result other than its inputs (parameters, code, weights); a unit's
key adds the digests of its inputs. So a crash costs at most the unit in progress, new videos cost their own units
only, and whatever gives the same fingerprint and key again is linked instead of computed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BusyError, DiskFullError
from pipeline.progress import Tick, progress

MARKER = "unit.json"


@dataclass(frozen=True)
class BadItem:
    """A quarantined item: named, with its reason and the digest of the file that was bad ("" where there is none)."""

    id: int
    reason: str
    digest: str = ""


@dataclass(frozen=True)
class Unit:
    """One piece of work: ``inputs`` are the digests that its key is made of, ``label`` is what people read."""

    ids: tuple[int, ...]
    inputs: tuple[str, ...]
    label: str
    bucket: int = 0
    steps: int = 0
    """What progress counts where a unit is not made of items (training steps)."""

    @property
    def items(self) -> int:
        return self.steps or len(self.ids)

    def key(self) -> str:
        return digest_of({"ids": self.ids, "inputs": self.inputs})


@dataclass(frozen=True)
class Built:
    """A finished unit: where its files are, which items are good and which are bad, and whether it was found ready."""

    unit: Unit
    folder: Path
    bad: tuple[BadItem, ...]
    reused: bool
    seconds: float

    @property
    def good(self) -> tuple[int, ...]:
        bad = {item.id for item in self.bad}
        return tuple(i for i in self.unit.ids if i not in bad)


Make = Callable[[Unit, Path, Tick], Sequence[BadItem]]


def digest_of(value: Any) -> str:
    """A short digest of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def build_units(
    folder: Path,
    units: Sequence[Unit],
    make: Make,
    *,
    what: str,
    counted: str = "videos",
    wait_for_others: Callable[[], None] = lambda: None,
) -> list[Built]:
    """Build what is not there yet, in order, and return every unit with its folder.

    ``make(unit, folder, tick)`` writes the unit's files, calls ``tick(1)`` for every finished item and returns what
    it had to quarantine; it raises for anything that is not the fault of one item. Progress counts items. Units that
    another process holds are passed over until ``wait_for_others`` has returned.

    Raises:
        BusyError: another process is building one of these units.
        DiskFullError: no space left; what is finished stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    built: dict[str, Built] = {}

    def collect() -> None:
        for unit in units:
            if unit.key() not in built and (ready := _find(folder, unit)) is not None:
                built[unit.key()] = ready
                tick(unit.items, unit.label)

    with progress(what, sum(unit.items for unit in units), counted) as tick:
        collect()
        for unit in units:
            if unit.key() not in built:
                with suppress(BusyError):
                    built[unit.key()] = _make(folder, unit, make, tick)
                collect()
        wait_for_others()
        collect()
        for unit in units:
            if unit.key() not in built:
                built[unit.key()] = _make(folder, unit, make, tick)
    return [built[unit.key()] for unit in units]


def build_free_units(folder: Path, units: Sequence[Unit], make: Make) -> None:
    """What a helper does: build every unit that is neither finished nor held by another process."""
    folder.mkdir(parents=True, exist_ok=True)
    for unit in units:
        if _find(folder, unit) is None:
            with suppress(BusyError):
                _make(folder, unit, make, lambda advance=1, note="": None)


def _find(folder: Path, unit: Unit) -> Built | None:
    marker = folder / unit.key() / MARKER
    if not marker.exists():
        return None
    record = json.loads(marker.read_text())
    for name, size in record["files"].items():
        file = marker.parent / name
        if not file.exists() or file.stat().st_size != size:
            return None
    bad = tuple(BadItem(**item) for item in record["bad"])
    return Built(unit, marker.parent, bad, reused=True, seconds=record["seconds"])


def _make(folder: Path, unit: Unit, make: Make, tick: Tick) -> Built:
    final, partial = folder / unit.key(), folder / f".{unit.key()}.building"
    with _lease(folder / f"{unit.key()}.lock", unit.label):
        if (found := _find(folder, unit)) is not None:  # finished by another process while this one waited its turn
            return found
        for stale in (final, partial):
            if stale.exists():
                shutil.rmtree(stale)
        started = time.monotonic()
        try:
            partial.mkdir(parents=True)
            bad = tuple(make(unit, partial, tick))
            record = {
                "label": unit.label,
                "ids": unit.ids,
                "bad": [asdict(item) for item in bad],
                "files": {str(f.relative_to(partial)): f.stat().st_size for f in _files(partial)},
                "seconds": round(time.monotonic() - started, 3),
                "host": platform.node(),
                "python": platform.python_version(),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            for file in _files(partial):
                _sync(file)
            (partial / MARKER).write_text(json.dumps(record, indent=1))
            _sync(partial / MARKER)
            partial.rename(final)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(folder).free
                shutil.rmtree(partial, ignore_errors=True)
                raise DiskFullError(
                    f"the disk that holds {folder} is full ({free / 2**20:.0f} MiB free) while writing {unit.label}",
                    remedy="free space (`dvc gc -w`, or move .work and .dvc/cache) and run the same command again: "
                    "every finished unit is kept",
                ) from error
            raise
    return Built(unit, final, bad, reused=False, seconds=record["seconds"])


def _files(folder: Path) -> Iterator[Path]:
    return (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != MARKER)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _lease(path: Path, label: str) -> Iterator[None]:
    """Hold the only right to build one unit; the kernel gives it back however the holder ends."""
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise BusyError(
                f"{label} is being built by another process ({stream.read().strip() or 'unknown'})",
                remedy="wait for it to finish, or stop it, then run the same command again",
            ) from None
        stream.truncate(0)
        stream.write(f"pid {os.getpid()} on {platform.node()}")
        stream.flush()
        yield  # the file stays: removing it would let two holders lock two files of one name


def link_tree(source: Path, target: Path, *, without: Sequence[str] = ()) -> None:
    """Add the files of a finished unit to ``target`` by hard links, without the marker and the named ones."""
    for file in _files(source):
        if str(file.relative_to(source)) in without:
            continue
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, place)
