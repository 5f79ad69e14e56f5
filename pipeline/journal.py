"""What is on disk about the units of a stage: which are wanted, which are finished, who builds one, what was bad.

::

    .work/<stage>/stage.lock                            held (flock) by the one process that may publish the stage
    .work/<stage>/<fingerprint>/plan.json               the units that the last run wanted, and what made them
    .work/<stage>/<fingerprint>/<unit key>/...          a finished unit: its files and, written last, unit.json
    .work/<stage>/<fingerprint>/<unit key>/retry        asks for its quarantined items to be tried again
    .work/<stage>/<fingerprint>/.<unit key>.building/   a unit in progress (removed when it is started again)
    .work/<stage>/<fingerprint>/.<unit key>.state/      what an interrupted unit goes on from (training)
    .work/<stage>/<fingerprint>/<unit key>.curves/      TensorBoard's view of a training run
    .work/<stage>/<fingerprint>/.<unit key>.previous/   what a retry keeps the good items of
    .work/<stage>/<fingerprint>/<unit key>.lock         held (flock) by the one process that builds it

The fingerprint stands for everything that makes a result other than its inputs (parameters, code, weights); a unit's
key adds the digests of its inputs. So a crash costs at most the unit in progress, new videos cost their own units
only, and whatever gives the same fingerprint and key again is linked instead of computed.

A finished unit's files are recorded with size, modification time and sha256. A file whose size and time are as
recorded is trusted; one that was touched since is hashed again, and if it differs its unit is not finished any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import BusyError

MARKER = "unit.json"
PLAN = "plan.json"
RETRY = "retry"


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
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every file, as it was when the unit was finished, by path relative to ``folder``."""

    @property
    def good(self) -> tuple[int, ...]:
        bad = {item.id for item in self.bad}
        return tuple(i for i in self.unit.ids if i not in bad)


@dataclass(frozen=True)
class Plan:
    """The units that a run of a stage wants, with what their fingerprint is made of."""

    title: str
    counted: str
    made_of: Mapping[str, Any]
    units: tuple[Unit, ...]
    started: float
    """Seconds since 1970."""

    def save(self, folder: Path) -> None:
        """Write it into the folder of its fingerprint, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / PLAN, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read it back. Raises FileNotFoundError where no run has left one."""
        body = json.loads((folder / PLAN).read_text())
        units = [Unit(**{**u, "ids": tuple(u["ids"]), "inputs": tuple(u["inputs"])}) for u in body.pop("units")]
        return cls(units=tuple(units), **body)


def digest_of(value: Any) -> str:
    """A short digest of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def file_sha256(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the whole new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)


def find(folder: Path, unit: Unit) -> Built | None:
    """The finished unit in the folder of its fingerprint, or None: absent, unfinished, damaged or to be retried."""
    place = folder / unit.key()
    if not (place / MARKER).exists() or (place / RETRY).exists():
        return None
    return read_record(place, unit)


def missing(folder: Path, units: Iterable[Unit]) -> list[Unit]:
    """Those of the units that are not finished in the folder of a fingerprint."""
    return [unit for unit in units if find(folder, unit) is None]


def read_record(place: Path, unit: Unit) -> Built | None:
    """What ``unit.json`` in ``place`` says, if every file that it names is still as it says."""
    try:
        record = json.loads((place / MARKER).read_text())
        entries = {name: _Entry(**entry) for name, entry in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # torn by hand or by the disk: as good as not there
        return None
    if not all(entry.matches(place / name) for name, entry in entries.items()):
        return None
    bad = tuple(BadItem(**item) for item in record["bad"])
    digests = {name: entry.sha256 for name, entry in entries.items()}
    return Built(unit, place, bad, reused=True, seconds=record["seconds"], files=digests)


def write_record(place: Path, unit: Unit, bad: Sequence[BadItem], seconds: float) -> dict[str, str]:
    """Write ``unit.json`` into ``place``, last and with everything on disk; returns the digests of the files."""
    entries = {}
    for file in unit_files(place):
        _sync(file)
        entries[str(file.relative_to(place))] = _Entry.of(file)
    record = {
        "label": unit.label,
        "ids": unit.ids,
        "bad": [asdict(item) for item in bad],
        "files": {name: asdict(entry) for name, entry in entries.items()},
        "seconds": round(seconds, 3),
        "host": platform.node(),
        "python": platform.python_version(),
        "finished": time.time(),
    }
    (place / MARKER).write_text(json.dumps(record, indent=1))
    _sync(place / MARKER)
    return {name: entry.sha256 for name, entry in entries.items()}


def finished_sizes(folder: Path, units: Iterable[Unit]) -> list[tuple[int, int]]:
    """(good items, bytes) of every one of these units that is finished in the folder of a fingerprint."""
    markers = (folder / unit.key() / MARKER for unit in units)
    records = [json.loads(marker.read_text()) for marker in markers if marker.exists()]
    return [(len(r["ids"]) - len(r["bad"]), sum(e["bytes"] for e in r["files"].values())) for r in records]


def unit_files(place: Path) -> Iterator[Path]:
    """The files of a unit, without the journal's own."""
    return (
        f for f in sorted(place.rglob("*")) if f.is_file() and f.relative_to(place).as_posix() not in (MARKER, RETRY)
    )


@contextmanager
def lease(path: Path, label: str) -> Iterator[None]:
    """Hold the only right to build ``label``; the kernel gives it back however the holder ends.

    Raises:
        BusyError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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


def holder(path: Path) -> str:
    """Who holds a lease ("pid 7 on host"), or "" where nobody does."""
    try:
        stream = path.open("r+")
    except FileNotFoundError:
        return ""
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "unknown"
        return ""


@dataclass(frozen=True)
class _Entry:
    bytes: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> _Entry:
        status = file.stat()
        return cls(status.st_size, status.st_mtime_ns, file_sha256(file))

    def matches(self, file: Path) -> bool:
        try:
            status = file.stat()
        except FileNotFoundError:
            return False
        if status.st_size != self.bytes:
            return False
        return status.st_mtime_ns == self.mtime_ns or file_sha256(file) == self.sha256


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
