"""Where the arrays are that a stage made of one video: in its finished store, or in a finished shard in ``.work``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import zarr

from data.errors import StoreError
from data.manifest import MANIFEST
from data.store import FLOW_SCALE, ArraySpec, Store, read_shard
from pipeline.errors import WorkspaceError
from pipeline.journal import Built, Plan, Unit, find
from pipeline.stage import ARTIFACTS, WORK
from pipeline.upkeep import newest


@dataclass(frozen=True)
class Progress:
    """The units of a stage's last run, each with what was built of it, or None."""

    title: str
    units: tuple[tuple[Unit, Built | None], ...]

    @classmethod
    def of(cls, title: str) -> Progress:
        """Read the journal. Raises WorkspaceError where the stage never ran here."""
        folder = newest(WORK, title)
        if folder is None:
            raise WorkspaceError(
                f"{title} has never run here: there is nothing in {output(title)} nor in {WORK / title}",
                remedy=f"run `dvc repro {title}`",
            )
        return cls(title, tuple((unit, find(folder, unit)) for unit in Plan.load(folder).units))

    def of_video(self, video: int) -> Built:
        """The finished unit in which the video is, and is good. Raises StoreError where there is none."""
        for unit, built in self.units:
            if video not in unit.ids:
                continue
            if built is None:
                raise _refusal(
                    f"{self.title} has not finished the shard of video {video} ({unit.label}) yet", self.finished
                )
            for item in built.bad:
                if item.id == video:
                    raise _refusal(f"video {video} is in the quarantine of {self.title}: {item.reason}", self.finished)
            return built
        raise _refusal(f"{self.title} does not work on video {video}", self.finished)

    @property
    def finished(self) -> tuple[int, ...]:
        """The good videos of finished units."""
        return tuple(sorted(video for _, built in self.units if built is not None for video in built.good))

    def __str__(self) -> str:
        done = sum(built is not None for _, built in self.units)
        return f"{self.title} is not finished: {done} of {len(self.units)} shards are"


@dataclass(frozen=True)
class Shelf:
    """The arrays of one video. ``note`` says so where the stage is not finished."""

    video: int
    store: Store | None
    shard: Path = Path()
    note: str = ""
    _read: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        """An array as stored, without the axis of videos. Raises StoreError where it is damaged."""
        if name not in self._read:
            self._read[name] = self._whole(name)
        return self._read[name]

    def flow(self, name: str) -> np.ndarray:
        """Flow in pixels, float32 (t, 2, h, w)."""
        return self[name].astype(np.float32) / FLOW_SCALE

    def _whole(self, name: str) -> np.ndarray:
        if self.store is not None:
            return self.store.read(name, self.video)
        spec, videos_per_shard = self._specs[name]
        return read_shard(self.shard, [spec], [self.video], videos_per_shard)[self.video][name]

    @cached_property
    def _specs(self) -> dict[str, tuple[ArraySpec, int]]:
        """As the arrays of the shard say themselves."""
        found = {}
        for metadata in sorted(self.shard.glob("*/zarr.json")):
            array = zarr.open_array(store=str(metadata.parent), mode="r")
            item, name = tuple(array.shape[1:]), metadata.parent.name
            found[name] = (ArraySpec(name, item, str(array.dtype), (), item[0], "field"), array.shape[0])
        return found


def output(title: str) -> Path:
    """``flow`` -> ``artifacts/flow``, ``encode@frame`` -> ``artifacts/encode/frame``."""
    return ARTIFACTS / title.replace("@", "/")


def is_finished(title: str) -> bool:
    """Whether the stage has published its output."""
    return (output(title) / MANIFEST).exists()


def shelf(title: str, video: int) -> Shelf:
    """What a stage with a store made of a video.

    Raises:
        WorkspaceError: the stage has never run here.
        StoreError: it did nothing of this video: with the reason and the videos that there are.
    """
    if not is_finished(title):
        progress = Progress.of(title)
        return Shelf(video, None, progress.of_video(video).folder, str(progress))
    store = Store(output(title))
    if video in store.ids:
        return Shelf(video, store)
    reasons = {item["id"]: item["reason"] for item in store.manifest["quarantine"]}
    if video in reasons:
        raise _refusal(f"video {video} is in the quarantine of {title}: {reasons[video]}", store.ids)
    if video in store.manifest.get("unlabelled", []):
        raise _refusal(f"video {video} has no annotation, so {title} has nothing of it", store.ids)
    raise _refusal(f"{title} holds no video {video}", store.ids)


def shelf_if_any(title: str, video: int) -> Shelf | None:
    """The same, or None where there is nothing."""
    try:
        return shelf(title, video)
    except (StoreError, WorkspaceError):
        return None


def listed(videos: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` -> ``0-2, 5``; at most a dozen ranges."""
    ranges: list[list[int]] = []
    for video in videos:
        if ranges and ranges[-1][1] == video - 1:
            ranges[-1][1] = video
        else:
            ranges.append([video, video])
    texts = [f"{a}-{b}" if b > a else str(a) for a, b in ranges]
    return ", ".join(texts[:12]) + (f" and {len(texts) - 12} more" if len(texts) > 12 else "") if texts else "none yet"


def _refusal(why: str, there: tuple[int, ...]) -> StoreError:
    return StoreError(why, remedy=f"choose one of its videos: {listed(there)}")
