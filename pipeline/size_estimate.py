"""How many bytes a store will take, before it is built: from measured ratios, then from the shards that are finished.

The ratios were measured on real CLEVRER by ``benchmarks/codecs.py``; docs/storage.md holds them, and a test compares
the two. What moves decides most of it: true flow of a few objects is nearly all zeros, a teacher's without the static
gate has noise in every pixel.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pipeline.errors import DiskFullError

Motion = Literal["true", "gated", "ungated"]
"""Where flow and visibility come from: annotations, a teacher behind the static gate, a teacher without it."""

MARGIN = 1.5
"""The videos that were measured are few, and simulated ones differ: the range is theirs, wider by this factor."""

SHARD_MARGIN = 1.1
"""Likewise for the range of finished shards, which are of the data set itself."""


class Stored(Protocol):
    """An array of a store, as far as its size depends on it (`data.store.ArraySpec`)."""

    @property
    def name(self) -> str: ...
    @property
    def item(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def codec(self) -> str: ...


@dataclass(frozen=True)
class Ratio:
    """Stored bytes per 1000 raw bytes: of all measured videos, of the smallest and of the largest."""

    mean: float
    least: float
    most: float


TABLE = Ratio(260.0, 130.0, 520.0)
"""Boxes, states and the like: 8 kB a video on five real ones, halved and doubled for the range."""

RATIOS: dict[str, Ratio] = {
    "frames 160x240": Ratio(80.24, 42.53, 103.23),
    "latents 160x240": Ratio(231.22, 145.24, 310.53),
    "instances": Ratio(3.77, 3.21, 4.7),
    "true flow": Ratio(4.5, 3.6, 5.41),
    "true visibility": Ratio(1.64, 1.29, 1.9),
    "flow, dis, gated": Ratio(14.13, 11.0, 15.93),
    "visibility, dis, gated": Ratio(10.3, 7.16, 12.59),
    "flow, dis": Ratio(75.74, 66.99, 83.29),
    "visibility, dis": Ratio(37.88, 28.8, 41.0),
    "flow, raft_small, gated": Ratio(15.94, 15.24, 16.63),
    "visibility, raft_small, gated": Ratio(16.91, 16.23, 17.59),
    "flow, raft_small": Ratio(95.72, 94.87, 96.58),
    "visibility, raft_small": Ratio(74.64, 73.46, 75.82),
}
"""By row of the table in docs/storage.md."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of the whole store: best guess and range; ``raw`` is uncompressed, ``basis`` says what it rests on."""

    bytes: int
    low: int
    high: int
    raw: int
    basis: str


def estimate(
    specs: Sequence[Stored],
    videos: int,
    finished: Sequence[tuple[int, int]] = (),
    *,
    motion: Motion = "gated",
) -> Estimate:
    """The size of a store of ``videos`` videos; ``finished`` holds (videos, bytes) of each finished shard.

    Without finished shards the measured ratios decide, and ``motion`` among them; with any, they are counted as they
    are and the rest is extrapolated: the guess from all of them, the range from the leanest and the fattest.
    """
    raw = [math.prod(spec.item) * np.dtype(spec.dtype).itemsize for spec in specs]
    done = [(n, size) for n, size in finished if n > 0]
    if not done:
        ratios = [_ratio(spec, motion) for spec in specs]
        mean, least, most = (
            sum(r * getattr(ratio, name) for r, ratio in zip(raw, ratios, strict=True)) / 1000 * videos
            for name in ("mean", "least", "most")
        )
        basis = "ratios measured on real videos"
        return Estimate(round(mean), round(least / MARGIN), round(most * MARGIN), sum(raw) * videos, basis)
    count, size = (sum(column) for column in zip(*done, strict=True))
    left = max(videos - count, 0)
    rates = [size / n for n, size in done]
    return Estimate(
        round(size + left * size / count),
        round(size + left * min(rates) / SHARD_MARGIN),
        round(size + left * max(rates) * SHARD_MARGIN),
        sum(raw) * videos,
        f"{count} finished videos",
    )


def _ratio(spec: Stored, motion: Motion) -> Ratio:
    """The measured row that is nearest to an array, by its type and place in a store."""
    if spec.codec == "table":
        return TABLE
    if spec.codec == "picture":
        return RATIOS["latents 160x240" if spec.dtype == "float16" else "frames 160x240"]
    if spec.name == "instances":
        return RATIOS["instances"]
    kind = "flow" if spec.dtype == "int16" else "visibility"
    if motion == "true":
        return RATIOS[f"true {kind}"]
    names = (f"{kind}, {teacher}{', gated' if motion == 'gated' else ''}" for teacher in ("dis", "raft_small"))
    rows = [RATIOS[name] for name in names if name in RATIOS]
    mean = sum(row.mean for row in rows) / len(rows)
    return Ratio(mean, min(row.least for row in rows), max(row.most for row in rows))


def announce(title: str, size: Estimate, there: int, work: Path) -> None:
    """Print what a store will take beside what is free, before its first shard is built.

    Raises:
        DiskFullError: even the least that it may still take is more than the disk has.
    """
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    print(
        f"{title}: the store will take about {readable(size.bytes)} ({readable(size.low)} to {readable(size.high)}, "
        f"from {size.basis}), {readable(there)} of it are there; {readable(free)} free",
        flush=True,
    )
    if size.low - there > free:
        raise DiskFullError(
            f"{title} still needs at least {readable(size.low - there)} and {work.resolve()} has {readable(free)} free",
            remedy="free space (`clevrcast clean`, `dvc gc -w`, or move .work and .dvc/cache), or choose fewer "
            "acquire.videos, a smaller resolution or a larger decode.stride",
        )


def readable(size: float) -> str:
    """Bytes in the largest unit that leaves at least one: ``999 B``, ``1.5 kB``, ``31.0 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
