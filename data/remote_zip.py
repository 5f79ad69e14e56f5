"""A zip archive on a server, read by range: its directory first, then only the members that are wanted.

The directory is at the archive's end, so its last bytes come first; if they do not hold the whole directory, what lies
before them follows in a second request. Members that lie close together come in one request.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from data.archive import LARGEST_DIRECTORY, Archive, Member
from data.download import RETRY, Remote, Retry, fetch
from data.errors import ArchiveError
from data.official import OfficialArchive

TAIL: Final = 66 << 10
"""Bytes that hold every end-of-directory record, zip64's among them, with the longest comment that there can be."""
LARGEST_REQUEST: Final = 16 << 20
GAP: Final = 64 << 10
"""Unwanted bytes between two members that are cheaper than another request."""


class RangedFile:
    """A seekable file on a server that keeps its tail in memory, and one window that `prefetch` moves."""

    def __init__(self, remote: Remote, *, retry: Retry = RETRY, tail: bytes = b"") -> None:
        self.remote, self.retry = remote, retry
        self._position = 0
        self._window = (0, b"")
        start = max(0, remote.size - TAIL)
        self._tail = tail or self._bytes(start, remote.size)

    def prefetch(self, first: int, end: int) -> None:
        """Bring bytes ``[first, end)`` in one request, in place of the window before."""
        self._window = (first, self._bytes(first, end))

    def tail(self, first: int) -> bytes:
        """Bytes from ``first`` to the end of the file."""
        start = self._tail_start
        if first < start:
            if self.remote.size - first > LARGEST_DIRECTORY:
                raise ArchiveError(
                    f"{self.remote.url}: its directory would take {self.remote.size - first} bytes, "
                    f"more than {LARGEST_DIRECTORY}",
                    remedy="download the archive from the official address, or report it to the mirror",
                )
            self._tail = self._bytes(first, start) + self._tail
        return self._tail[first - self._tail_start :]

    def read(self, n: int | None = -1, /) -> bytes:
        first, end = self._position, self.remote.size
        if n is not None and n >= 0:
            end = min(end, first + n)
        if first >= end:
            return b""
        start, window = self._window
        if start <= first and end <= start + len(window):
            data = window[first - start : end - start]
        else:
            data = self.tail(first)[: end - first]
        self._position = end
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.remote.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as a file does, and zipfile expects
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    @property
    def _tail_start(self) -> int:
        return self.remote.size - len(self._tail)

    def _bytes(self, first: int, end: int) -> bytes:
        return b"".join(fetch(self.remote, first, end, self.retry))


def open_remote(remote: Remote, official: OfficialArchive, kept: Path, retry: Retry = RETRY) -> Archive:
    """The archive, by its directory alone, which is kept in the file ``kept`` (name it by `Remote.identity`).

    Raises:
        ArchiveError: see `Archive`.
        DownloadError: see `data.download.fetch`.
    """
    # Without a validator nothing says that the directory is still the one that was kept.
    known = kept.read_bytes() if remote.validator and kept.exists() else b""
    stream = RangedFile(remote, retry=retry, tail=known)
    archive = Archive(stream, official, remote.url)
    if not known:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
        temporary.write_bytes(stream.tail(archive.directory))
        temporary.replace(kept)
    return archive


def runs(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Members by ascending place, grouped so that each group is worth one request (see `LARGEST_REQUEST`, `GAP`)."""
    group: list[Member] = []
    for member in sorted(members, key=lambda m: m.first):
        if group and (member.first - group[-1].end > GAP or member.end - group[0].first > LARGEST_REQUEST):
            yield group
            group = []
        group.append(member)
    if group:
        yield group
