"""Building the units of a stage: one by one, alone or beside others, marked when whole, found again afterwards.

What is written where, and why it survives any interruption, stands in `pipeline.journal`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pipeline.errors import BusyError, disk_full
from pipeline.journal import RETRY, BadItem, Built, Unit, find, lease, missing, read_record, unit_files, write_record
from pipeline.progress import Tick, progress

Make = Callable[[Unit, Path, Tick], Sequence[BadItem]]

PATIENCE = 0.2
"""Seconds between two looks at what others have finished."""


class Crew(Protocol):
    """Other processes that build units of the same stage (see `pipeline.executors`)."""

    @property
    def alone(self) -> bool:
        """Whether this process builds too; else it only looks on, and takes over what the others leave undone."""
        ...

    def working(self) -> bool:
        """Whether anybody is still at work."""
        ...


class NoCrew:
    """Nobody helps."""

    alone = True

    def working(self) -> bool:
        return False


def build_units(
    folder: Path,
    units: Sequence[Unit],
    make: Make,
    *,
    what: str,
    counted: str = "videos",
    crew: Crew | None = None,
) -> list[Built]:
    """Build what is not there yet, in order, and return every unit with its folder.

    ``make(unit, folder, tick)`` writes the unit's files, calls ``tick(1)`` for every finished item and returns what
    it had to quarantine; it raises for anything that is not the fault of one item. Progress counts items. Units that
    another process holds are passed over until the crew has ended.

    Raises:
        BusyError: a process that is not of the crew is building one of these units.
        DiskFullError: no space left; what is finished stays.
    """
    crew = crew or NoCrew()
    folder.mkdir(parents=True, exist_ok=True)
    built: dict[str, Built] = {}
    waiting = {unit.key(): unit for unit in units}

    def collect() -> None:
        """Take what others have finished; one listing of the folder, however many units there are."""
        there = {entry.name for entry in os.scandir(folder)}
        for key in [key for key in waiting if key in there]:
            if (ready := find(folder, waiting[key])) is not None:
                built[key] = ready
                unit = waiting.pop(key)
                tick(unit.items, unit.label)

    def build(unit: Unit) -> None:
        built[unit.key()] = _make(folder, unit, make, tick)
        waiting.pop(unit.key())

    with progress(what, sum(unit.items for unit in units), counted) as tick:
        collect()
        for unit in list(waiting.values()) if crew.alone else []:
            if unit.key() in waiting:
                with suppress(BusyError):
                    build(unit)
                collect()
        while waiting and crew.working():
            time.sleep(PATIENCE)
            collect()
        collect()
        for unit in list(waiting.values()):
            build(unit)
    return [built[unit.key()] for unit in units]


def build_free_units(folder: Path, units: Sequence[Unit], make: Make) -> int:
    """What a member of a crew does: build what nobody holds until every unit is finished; returns how many it built.

    A unit that another one holds is looked at again, so that what a dead worker leaves behind is taken up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = 0
    while absent := missing(folder, units):
        before = made
        for unit in absent:
            if find(folder, unit) is None:
                with suppress(BusyError):
                    made += not _make(folder, unit, make, lambda advance=1, note="": None).reused
        if made == before:
            time.sleep(PATIENCE)
    return made


def previous_attempt(unit: Unit, folder: Path) -> Built | None:
    """For a ``make`` that was asked to try bad items again: the finished unit whose good items it may keep."""
    return read_record(folder.with_suffix(".previous"), unit)


def kept_state(folder: Path) -> Path:
    """Where a ``make`` that was given ``folder`` keeps what an interrupted unit goes on from; gone when it is finished.

    What is in it belongs to the unit's key and fingerprint, and survives any interruption.
    """
    return folder.with_suffix(".state")


def unfinished(folder: Path, unit: Unit) -> Path:
    """Where a unit is while it is being built."""
    return folder / f".{unit.key()}.building"


def _make(folder: Path, unit: Unit, make: Make, tick: Tick) -> Built:
    final, partial = folder / unit.key(), unfinished(folder, unit)
    previous = partial.with_suffix(".previous")
    with lease(folder / f"{unit.key()}.lock", unit.label):
        if (found := find(folder, unit)) is not None:  # finished by another process while this one waited its turn
            return found
        if (final / RETRY).exists():
            _remove(previous)
            final.rename(previous)
        for stale in (final, partial):
            _remove(stale)
        started = time.monotonic()
        try:
            partial.mkdir(parents=True)
            bad = tuple(make(unit, partial, tick))
            seconds = time.monotonic() - started
            digests = write_record(partial, unit, bad, seconds)
            partial.rename(final)
        except OSError as error:
            if full := disk_full(error, folder, f"writing {unit.label}"):
                shutil.rmtree(partial, ignore_errors=True)
                raise full from error
            raise
        for done_with in (previous, kept_state(partial)):
            _remove(done_with)
    return Built(unit, final, bad, reused=False, seconds=seconds, files=digests)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def link_tree(source: Path, target: Path, *, without: Sequence[str] = ()) -> None:
    """Add the files of a finished unit to ``target`` by hard links, without the marker and the named ones."""
    for file in unit_files(source):
        if str(file.relative_to(source)) in without:
            continue
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, place)
