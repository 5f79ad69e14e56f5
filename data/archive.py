"""Zip archives from elsewhere: every member is judged before any is read, and one hostile member condemns the whole.

Names in an archive never become paths here: a member is found by its id, and the caller says where it goes. So nothing
can be written outside the target; an archive that tries is refused all the same, since nothing in it can be trusted.
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from data.clevrer import member_id
from data.errors import ArchiveError, MemberError
from data.official import OfficialArchive

LARGEST_MEMBER: Final = 64 << 20
"""Bytes unpacked; CLEVRER's largest files are below 2 MB."""
LARGEST_RATIO: Final = 100
"""Unpacked to packed, of members above `SMALL`; JSON reaches about 10, video 1."""
SMALL: Final = 1 << 20
LARGEST_DIRECTORY: Final = 64 << 20
"""That of 20,000 members takes 2 MB."""
_LOCAL: Final = struct.Struct("<4s2xHH4xIIIHH")
"""A local header: signature, flags, method, CRC, packed and unpacked bytes, lengths of name and extra field."""
_SLACK: Final = 2 * 65535 + 24
"""A local header's name and extra field, and a data descriptor, are at most this long together."""
_ENCRYPTED: Final = 0x1 | 0x20 | 0x40 | 0x2000
"""Encrypted, in any way, or a patch to another file."""
_STREAMED: Final = 0x8
"""CRC and sizes follow the data and may be zero in the local header."""
_UTF8: Final = 0x800
_DOS_VOLUME: Final = 0x8


@runtime_checkable
class Readable(Protocol):
    """What an archive is read from: a file, or `data.remote_zip.RangedFile`."""

    def read(self, n: int | None = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...
    def seekable(self) -> bool: ...


class _Bounded:
    """Refuses the reads by which a directory that claims to be huge would fill the memory."""

    def __init__(self, stream: Readable) -> None:
        self._read, self.seek, self.tell, self.seekable = stream.read, stream.seek, stream.tell, stream.seekable

    def read(self, n: int | None = -1, /) -> bytes:
        if n is not None and n > LARGEST_DIRECTORY:
            raise ValueError(f"it claims to take {n} bytes, more than {LARGEST_DIRECTORY}")
        return self._read(n)


@dataclass(frozen=True)
class Member:
    """One file of the data set inside an archive."""

    id: int
    name: str
    crc: int
    unpacked: int
    """Bytes once extracted."""
    first: int
    end: int
    """The archive's bytes ``[first, end)`` hold the member and its header."""
    info: zipfile.ZipInfo

    @property
    def digest(self) -> str:
        """What the member is, by the archive's directory: changes when its content does."""
        return f"{self.name}:{self.crc:08x}:{self.unpacked}"


class Archive:
    """An archive of the data set, judged when it is opened. ``members`` are its files by id; others are ignored.

    Raises:
        ArchiveError: naming the archive and, where one is to blame, the member.
    """

    def __init__(self, stream: Readable, official: OfficialArchive, where: str) -> None:
        self.stream, self.official, self.where = stream, official, where
        try:
            self._zip = zipfile.ZipFile(_Bounded(stream))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError) as error:
            raise self._refused(f"its directory cannot be read: {error}") from error
        self.directory = self._zip.start_dir
        """Where the central directory begins; from here to the end is what `members` was read from."""
        self._infos = sorted(self._zip.infolist(), key=lambda info: info.header_offset)
        self._judge()
        self.members = dict(sorted((m.id, m) for m in self._found()))

    def check_headers(self, members: Iterable[Member] | None = None) -> None:
        """Compare the local headers (of ``members``, else of everything) with the central directory.

        Raises:
            ArchiveError: they disagree, so two programs would read two different things.
        """
        for info in self._infos if members is None else (m.info for m in members):
            self._check_header(info)

    def extract(self, member: Member, target: Path) -> None:
        """Write one member's bytes to ``target``, whose folders are made.

        Raises:
            ArchiveError: the member's local header contradicts the directory.
            MemberError: its bytes do not give what the directory promises (CRC, length).
        """
        self._check_header(member.info)
        target.parent.mkdir(parents=True, exist_ok=True)
        left = member.unpacked
        try:
            with target.open("wb") as out:
                for chunk in self._chunks(member):
                    out.write(chunk)
                    left -= len(chunk)
            if left:
                raise self._damaged(member, f"{left} of {member.unpacked} bytes are missing")
        except MemberError:
            target.unlink()
            raise

    def _chunks(self, member: Member) -> Iterator[bytes]:
        """zipfile stops at the promised length and compares the CRC there, so no member grows beyond it."""
        try:
            with self._zip.open(member.info) as source:
                while chunk := source.read(SMALL):
                    yield chunk
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise self._damaged(member, str(error) or "it ends early") from error

    def _judge(self) -> None:
        seen: set[str] = set()
        for info in self._infos:
            name = info.orig_filename
            if info.header_offset < 0:
                raise self._refused(f"member {name!r} begins {-info.header_offset} bytes before the archive")
            if reason := _hostile(info):
                raise self._refused(f"member {name!r} {reason}")
            if name in seen:
                raise self._refused(f"member {name!r} exists twice")
            seen.add(name)
        ends = [(i.orig_filename, i.header_offset, _least_end(i)) for i in self._infos]
        for (name, _, end), (after, first, _) in pairwise([*ends, ("the directory", self.directory, 0)]):
            if end > first:
                raise self._refused(f"member {name!r} reaches to byte {end}, {after} begins at {first}")

    def _found(self) -> Iterator[Member]:
        names: dict[int, str] = {}
        starts = [i.header_offset for i in self._infos] + [self.directory]
        for info, following in zip(self._infos, starts[1:], strict=True):
            name = info.orig_filename
            video = member_id(name, self.official.kind)
            if video is None:
                continue
            if video not in self.official.ids:
                ids = self.official.ids
                raise self._refused(f"member {name!r} is outside its ids {ids.start}-{ids.stop - 1}")
            if video in names:
                raise self._refused(f"members {names[video]!r} and {name!r} have one id")
            names[video] = name
            end = min(following, _least_end(info) + _SLACK)
            yield Member(video, name, info.CRC, info.file_size, info.header_offset, end, info)

    def _check_header(self, info: zipfile.ZipInfo) -> None:
        self.stream.seek(info.header_offset)
        head = self.stream.read(_LOCAL.size)
        if len(head) < _LOCAL.size:
            raise self._refused(f"member {info.orig_filename!r} has no local header at byte {info.header_offset}")
        signature, flags, method, crc, packed, unpacked, name_length, _ = _LOCAL.unpack(head)
        name = self.stream.read(name_length)
        expected = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        free = {0} if flags & _STREAMED else set()  # given after the data
        zip64 = 0xFFFFFFFF  # given in the extra field
        agree = (
            signature == b"PK\x03\x04"
            and name == expected
            and flags == info.flag_bits
            and method == info.compress_type
            and crc in {info.CRC, *free}
            and packed in {info.compress_size, zip64, *free}
            and unpacked in {info.file_size, zip64, *free}
        )
        if not agree:
            raise self._refused(f"member {info.orig_filename!r}: its local header contradicts the directory")

    def _refused(self, reason: str) -> ArchiveError:
        return ArchiveError(
            f"{self.where} is refused: {reason}",
            remedy="nothing of it is used; download it from the official address, or report it to the mirror",
        )

    def _damaged(self, member: Member, reason: str) -> MemberError:
        return MemberError(f"{self.where}: {member.name} is damaged: {reason}", remedy="download the archive again")


def _hostile(info: zipfile.ZipInfo) -> str | None:
    """What no honest archive of this data set has, in words."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    size, packed = info.file_size, info.compress_size
    if reason := _hostile_name(info.orig_filename):
        return reason
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.external_attr & _DOS_VOLUME:
        return "is a symbolic link" if kind == stat.S_IFLNK else "is a special file"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted or a patch"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type}, not stored or deflated"
    if size > LARGEST_MEMBER:
        return f"declares {size} bytes, more than {LARGEST_MEMBER}"
    if size > max(SMALL, LARGEST_RATIO * packed):
        return f"declares {size} bytes out of {packed}, more than {LARGEST_RATIO}-fold"
    if info.compress_type == zipfile.ZIP_STORED and size != packed:
        return f"is stored, but declares {size} bytes out of {packed}"
    return None


def _hostile_name(name: str) -> str | None:
    if not name or any(ord(c) < 32 for c in name):
        return "has a name that is empty or holds control characters"
    if "\\" in name or re.match("[A-Za-z]:", name):
        return "has a name with a backslash or a drive"
    if name.startswith("/"):
        return "has an absolute path"
    if ".." in name.split("/"):
        return "leads out of the archive by '..'"
    return None


def _least_end(info: zipfile.ZipInfo) -> int:
    return info.header_offset + _LOCAL.size + len(info.orig_filename) + info.compress_size
