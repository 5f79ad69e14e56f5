"""The archives in which CLEVRER is released: their addresses, and what each one promises to hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from data.clevrer import SPLITS, Kind, Split, official_split


@dataclass(frozen=True)
class OfficialArchive:
    """One archive; ``path`` is relative to the data set's address, and to that of a mirror."""

    kind: Kind
    path: str
    ids: range
    complete: bool
    """Whether there is a member for every id; proposals may lack some."""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def archives_for(ids: Iterable[int], proposals: bool) -> list[OfficialArchive]:
    """The archives that hold these videos, their annotations (there are none of test videos) and, if asked, proposals.

    Raises ValueError for an id outside 0..19999.
    """
    wanted = {official_split(i) for i in ids}
    out = []
    for split in get_args(Split):
        if split in wanted:
            out.append(_of_split("video", split))
            if split != "test":
                out.append(_of_split("annotation", split))
    if proposals and wanted:
        every = range(SPLITS["train"][0], SPLITS["test"][1])
        out.append(OfficialArchive("proposal", "derender_proposals.zip", every, complete=False))
    return out


def _of_split(kind: Kind, split: Split) -> OfficialArchive:
    return OfficialArchive(kind, f"{kind}s/{split}/{kind}_{split}.zip", range(*SPLITS[split]), complete=True)
