"""Noticing that parameters, the graph or code were edited: by content, and only once the edits have come to rest."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.code import RESULT_PACKAGES

FILES = ("params.yaml", "dvc.yaml")


@dataclass(frozen=True)
class State:
    """What the watched files hold. ``key`` tells one edit from another that has the same result, as an undo has."""

    contents: dict[str, str]
    newest_ns: int

    @property
    def key(self) -> str:
        listed = "\n".join(f"{name} {digest}" for name, digest in sorted(self.contents.items()))
        return hashlib.sha256(f"{listed}\n{self.newest_ns}".encode()).hexdigest()[:32]

    def changed(self, other: State) -> list[str]:
        """Files that differ, appeared or went."""
        names = sorted({*self.contents, *other.contents})
        return [name for name in names if self.contents.get(name) != other.contents.get(name)]


def look(root: Path) -> State:
    """Read every watched file: ``params.yaml``, ``dvc.yaml`` and the code that results come from."""
    contents, newest = {}, 0
    for file in _watched(root):
        try:
            contents[str(file.relative_to(root))] = hashlib.sha256(file.read_bytes()).hexdigest()
            newest = max(newest, file.stat().st_mtime_ns)
        except FileNotFoundError:  # between two writes of an editor that replaces files
            continue
    return State(contents, newest)


class Watcher:
    """Tells an edit once, when nothing has changed for ``settle`` seconds since.

    It looks again and again rather than asking the kernel to be told: that works on network file systems too.
    """

    def __init__(self, root: Path, *, settle: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.root, self.settle, self.clock = root, settle, clock
        self.told = self._seen = look(root)
        self._marks = _marks(root)
        self._since = clock()

    def edited(self) -> list[str]:
        """Files that were edited since this was last asked and answered; empty while edits go on, or without any."""
        marks = _marks(self.root)
        if marks != self._marks:
            self._marks, self._since, self._seen = marks, self.clock(), look(self.root)
        if self.clock() - self._since < self.settle:
            return []
        found = self._seen.changed(self.told)
        self.told = self._seen
        return found


def _watched(root: Path) -> list[Path]:
    code = [file for package in RESULT_PACKAGES for file in (root / package).rglob("*.py")]
    return [*(root / name for name in FILES), *sorted(code)]


def _marks(root: Path) -> dict[str, tuple[int, int, int]]:
    """What tells cheaply that a file may have been written to."""
    marks = {}
    for file in _watched(root):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        marks[str(file)] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return marks
