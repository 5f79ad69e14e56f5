"""Videos out of CLEVRER's official archives: whole, or only the wanted members by range, whichever moves fewer bytes.

Archives and their directories are kept in ``.work/acquire/archives`` under names that change when the server's file
does. Both ways give the same units under the same keys, so they mix, and a run goes on where another one stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from data.archive import Archive, Member
from data.clevrer import KNOWN_BAD, Kind, Split, annotation_path, official_split, proposal_path, video_path
from data.download import Remote, download, part_of, probe
from data.errors import ArchiveError, MemberError, SourceError
from data.official import OfficialArchive, archives_for
from data.remote_zip import RangedFile, open_remote, runs
from pipeline.errors import DiskFullError
from pipeline.journal import BadItem, Unit
from pipeline.progress import Tick, progress
from pipeline.size_estimate import readable
from pipeline.stage import WORK

FOLDER: Final = WORK / "acquire" / "archives"
BLOCK: Final = 4096
"""Bytes by which files grow on a disk."""
PLACES: Final[dict[Kind, Callable[[Split, int], PurePosixPath]]] = {
    "video": video_path,
    "annotation": annotation_path,
    "proposal": proposal_path,
}


@dataclass
class Source:
    """One archive, as it is on the server and, once ``local`` exists, here."""

    official: OfficialArchive
    remote: Remote
    archive: Archive

    @property
    def local(self) -> Path:
        return _kept(self.official, self.remote, ".zip")

    def wanted(self, ids: Iterable[int]) -> list[Member]:
        """Its members of these videos."""
        return [self.archive.members[i] for i in ids if i in self.archive.members]

    def extract(self, member: Member, target: Path) -> None:
        """Write one member; if it is damaged, fetch it from the server once more before giving up."""
        try:
            self.archive.extract(member, target)
        except MemberError:
            if not self.remote.ranges:
                raise
            again = open_remote(self.remote, self.official, _kept(self.official, self.remote, ".directory"))
            prefetch(again, member.first, member.end)
            again.extract(member, target)


class Archives:
    """The archives that hold the wanted videos; opening them reads their directories only.

    Local files are closed by ``stack``.

    Raises:
        SourceError: a split is wanted whole, and its archive does not hold all of it.
        ArchiveError: an archive is hostile or unreadable.
        DownloadError: the server does not deliver.
    """

    def __init__(self, url: str, wanted: Mapping[int, str], proposals: bool, stack: ExitStack) -> None:
        self.stack = stack
        self.sources = [_open(url, official, stack) for official in archives_for(wanted, proposals)]
        for source in self.sources:
            _check_complete(source, wanted)
        self.absent = [BadItem(i, reason) for i in wanted if (reason := self._absence(i))]
        gone = {item.id for item in self.absent}
        self.inputs = {i: tuple(m.digest for s in self.sources for m in s.wanted([i])) for i in wanted if i not in gone}

    def without(self, kind: Kind) -> list[int]:
        """Ids of acquired videos for which the archives hold no such file."""
        having = {i for s in self.sources if s.official.kind == kind for i in s.archive.members}
        return sorted(set(self.inputs) - having)

    def prepare(self, units: Sequence[Unit]) -> None:
        """Say what these units will take, and download the archives of which they want the greater part.

        Raises:
            DiskFullError: it cannot fit.
        """
        ids = [i for unit in units for i in unit.ids]
        if not ids:
            return
        whole: list[Source] = []
        moved = kept = 0
        for source in self.sources:
            members, entire = source.wanted(ids), _left(source.remote, source.local)
            ranged = sum(m.end - m.first for m in members)
            kept += sum(-(-m.unpacked // BLOCK) * BLOCK for m in members)
            if ranged * 2 > entire > 0:
                whole.append(source)
                kept += entire
                moved += entire
            elif entire:
                moved += ranged
        if whole:
            print(f"acquire: whole archives: {', '.join(s.official.name for s in whole)}")
        check_space(f"{len(ids)} videos", moved, kept)
        for source in whole:
            _bring(source.official, source.remote)
            source.archive = _agreeing(source, self.stack)

    def make(self, unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        """Write the unit's files in the official layout; items with a damaged member are left out whole."""
        bad: dict[int, str] = {}
        for source in sorted(self.sources, key=lambda s: s.official.kind == "video"):
            for group in runs(source.wanted(unit.ids)):
                prefetch(source.archive, group[0].first, group[-1].end)
                for member in group:
                    try:
                        source.extract(member, folder / place(source.official.kind, member.id))
                    except MemberError as error:
                        bad.setdefault(member.id, error.message)
                    if source.official.kind == "video":
                        tick(1, f"video {member.id}")
        for video in bad:
            for kind in PLACES:
                (folder / place(kind, video)).unlink(missing_ok=True)
        return [BadItem(video, reason) for video, reason in sorted(bad.items())]

    def _absence(self, video: int) -> str:
        if video in KNOWN_BAD:
            return f"known to be bad: {KNOWN_BAD[video]}"
        (holder,) = (s for s in self.sources if s.official.kind == "video" and video in s.official.ids)
        if video in holder.archive.members:
            return ""
        return f"listed in acquire.videos, but {holder.official.name} holds no video_{video:05d}.mp4"


def place(kind: Kind, video: int) -> PurePosixPath:
    """Where a file of a video goes in the official layout."""
    return PLACES[kind](official_split(video), video)


def prefetch(archive: Archive, first: int, end: int) -> None:
    """Bring a part of an archive in one request, unless the archive is here."""
    if isinstance(archive.stream, RangedFile):
        archive.stream.prefetch(first, end)


def check_space(what: str, moved: int, needed: int) -> None:
    """Print what acquiring takes.

    Raises:
        DiskFullError: more than the disk of ``.work`` has free.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(WORK).free
    print(
        f"acquire: {what}: {readable(moved)} to download, {readable(needed)} to write, {readable(free)} free",
        flush=True,
    )
    if needed > free:
        raise DiskFullError(
            f"{what} need {readable(needed)}, the disk that holds {WORK} has {readable(free)} free",
            remedy="free space, move .work, artifacts and .dvc/cache to a larger disk, or list fewer ids in "
            "acquire.videos",
        )


def _open(url: str, official: OfficialArchive, stack: ExitStack) -> Source:
    remote = probe(f"{url.rstrip('/')}/{official.path}")
    if not remote.ranges:
        local = _kept(official, remote, ".zip")
        print(f"acquire: {remote.url}: the server does not send parts of files, so the whole archive is downloaded")
        if not local.exists():
            check_space(official.name, _left(remote, local), _left(remote, local))
            _bring(official, remote)
        return Source(official, remote, _open_local(official, local, stack))
    source = Source(official, remote, open_remote(remote, official, _kept(official, remote, ".directory")))
    if source.local.exists():
        source.archive = _agreeing(source, stack)
    return source


def _bring(official: OfficialArchive, remote: Remote) -> None:
    """Download a whole archive, and drop what is left of other versions of it."""
    local = _kept(official, remote, ".zip")
    for old in FOLDER.glob(f"{PurePosixPath(official.name).stem}-*"):
        if remote.identity not in old.name:
            old.unlink()
    with progress(f"download {official.name}", -(-_left(remote, local) // 2**20), "MiB") as tick:
        moved = 0

        def advance(n: int) -> None:
            nonlocal moved
            tick((moved + n) // 2**20 - moved // 2**20)
            moved += n

        download(remote, local, advance)


def _agreeing(source: Source, stack: ExitStack) -> Archive:
    """The local archive, having checked that it is what the server's directory says, and consistent in itself."""
    archive = _open_local(source.official, source.local, stack)
    listed, found = ({m.digest for m in a.members.values()} for a in (source.archive, archive))
    if listed != found:
        source.local.unlink()
        raise ArchiveError(
            f"{source.local} is not what {source.remote.url} lists now "
            f"({len(listed ^ found)} members differ), so it was removed",
            remedy="run the same command again: the archive is downloaded anew",
        )
    return archive


def _open_local(official: OfficialArchive, local: Path, stack: ExitStack) -> Archive:
    archive = Archive(stack.enter_context(local.open("rb")), official, str(local))
    archive.check_headers()
    return archive


def _check_complete(source: Source, wanted: Mapping[int, str]) -> None:
    official, members = source.official, source.archive.members
    if not official.complete or not wanted.keys() >= set(official.ids):
        return
    missing = [i for i in official.ids if i not in members and i not in KNOWN_BAD]
    if missing:
        raise SourceError(
            f"{source.remote.url} holds {len(members)} files of the {len(official.ids)} that CLEVRER has; "
            f"the first that is missing is {missing[0]:05d}",
            remedy="use the official address, or list the ids that are there in acquire.videos",
        )


def _kept(official: OfficialArchive, remote: Remote, suffix: str) -> Path:
    return FOLDER / f"{PurePosixPath(official.name).stem}-{remote.identity}{suffix}"


def _left(remote: Remote, local: Path) -> int:
    """Bytes still to come until the whole archive is here."""
    if local.exists():
        return 0
    part = part_of(local)
    return remote.size - (part.stat().st_size if remote.validator and part.exists() else 0)
