"""What the stages that write a store share: one unit per bucket of videos, bad videos quarantined, links at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import AnnotationError, VideoError
from data.store import ArraySpec, ShardPlace, assemble, bucket_ids, read_shard, write_shard
from pipeline.journal import BadItem, Unit, finished_sizes
from pipeline.progress import Tick
from pipeline.shards import previous_attempt
from pipeline.size_estimate import Motion, announce, estimate
from pipeline.stage import Job

Compute = Callable[[int], Mapping[str, np.ndarray]]


def build_store(
    job: Job,
    specs: Sequence[ArraySpec],
    inputs: Mapping[int, tuple[str, ...]],
    compute: Compute,
    *,
    fingerprint: str,
    params: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    computes: bool = True,
) -> None:
    """Build the stage's store from ``compute(video) -> arrays`` for every video in ``inputs`` (id -> input digests).

    A video whose `VideoError` or `AnnotationError` says that it is bad is quarantined with the reason; any other
    error stops the stage.
    """
    per_shard = job.params.shards.videos
    units = [
        Unit(ids, tuple(d for i in ids for d in inputs[i]), f"videos {ids[0]}-{ids[-1]}", bucket)
        for bucket, ids in bucket_ids(inputs, per_shard).items()
    ]

    def make(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        bad = []
        previous = previous_attempt(unit, folder)  # of a retry: only what was bad is computed again
        keep = {i for i in unit.ids if i in previous.good} if previous is not None else set()

        def good() -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
            for video in unit.ids:
                try:
                    if previous is not None and video in keep:
                        yield video, read_shard(previous.folder, specs, [video], per_shard)[video]
                    else:
                        yield video, compute(video)
                except (VideoError, AnnotationError) as error:
                    bad.append(BadItem(video, f"{type(error).__name__}: {error.message}", inputs[video][0]))
                tick(1, f"video {video}")

        write_shard(folder, specs, good(), per_shard)
        return bad

    def announce_size(missing: Sequence[Unit]) -> None:
        finished = finished_sizes(job.work / fingerprint, units)
        videos = sum(len(unit.ids) for unit in units)
        size = estimate(specs, videos, finished, motion=motion_of(job))
        announce(job.title, size, sum(stored for _, stored in finished), job.work)

    built = job.build(fingerprint, units, make, before=announce_size, computes=computes)
    quarantine = [{"id": b.id, "reason": b.reason, "digest": b.digest} for unit in built for b in unit.bad]
    places = [ShardPlace(b.unit.bucket, b.folder, b.good, b.unit.key(), b.files) for b in built if b.good]
    manifest = {
        "stage": job.title,
        "fingerprint": fingerprint,
        "params": dict(params),
        **(facts or {}),
        "quarantine": quarantine,
    }
    assemble(job.out, specs, places, per_shard, manifest=manifest)


def motion_of(job: Job) -> Motion:
    """Where the flow comes from that this stage stores, or makes its masks of."""
    if job.name == "label" or job.params.flow.teacher == "scene":
        return "true"
    return "gated" if job.params.flow.gate.enabled else "ungated"
