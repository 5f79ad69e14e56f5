"""What the data set holds: the videos of `artifacts/acquire` with their split, digests and annotations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.errors import EmptyError
from data.manifest import file_entry, promised_files, read_manifest, write_manifest


@dataclass(frozen=True)
class Video:
    """One video; paths are relative to the catalog's folder, digests are sha256."""

    id: int
    split: str
    video: str
    video_sha256: str
    annotation: str | None
    annotation_sha256: str | None


@dataclass(frozen=True)
class Catalog:
    """All videos, by ascending id, and what was quarantined on the way in."""

    root: Path
    videos: tuple[Video, ...]
    quarantine: tuple[dict[str, Any], ...]

    @classmethod
    def load(cls, root: Path | str) -> Catalog:
        """Read the manifest in ``root``. Raises StoreError where there is none."""
        manifest = read_manifest(Path(root))
        files = promised_files(manifest)
        videos = []
        for entry in manifest["videos"]:
            digests = (files[name]["sha256"] if name else None for name in (entry["video"], entry["annotation"]))
            video_sha256, annotation_sha256 = digests
            videos.append(Video(**entry, video_sha256=str(video_sha256), annotation_sha256=annotation_sha256))
        return cls(Path(root), tuple(videos), tuple(manifest["quarantine"]))

    def save(self, **facts: Any) -> None:
        """Write the manifest, last of all."""
        splits = sorted({v.split for v in self.videos})
        files = {}
        for video in self.videos:
            files[video.video] = file_entry(self.root / video.video, video.video_sha256)
            if video.annotation is not None:
                files[video.annotation] = file_entry(self.root / video.annotation, video.annotation_sha256)
        body = {
            **facts,
            "counts": {split: sum(v.split == split for v in self.videos) for split in splits},
            "videos": [{k: v for k, v in asdict(video).items() if "sha256" not in k} for video in self.videos],
            "quarantine": list(self.quarantine),
            "files": files,
        }
        write_manifest(self.root, body)

    def video(self, video: int) -> Video:
        """One video by its id. Raises KeyError where there is none."""
        return self._by_id[video]

    @cached_property
    def _by_id(self) -> dict[int, Video]:
        return {v.id: v for v in self.videos}

    def split(self, name: str) -> tuple[int, ...]:
        """Ids of one split.

        Raises:
            EmptyError: the split holds no video.
        """
        ids = tuple(v.id for v in self.videos if v.split == name)
        if not ids:
            raise EmptyError(
                f"the split {name!r} holds no video (splits: {sorted({v.split for v in self.videos})})",
                remedy="assign ids to it in acquire.videos",
            )
        return ids
