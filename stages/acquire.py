"""acquire: videos and annotations in CLEVRER's own layout: simulated, from a local folder or the official archives."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.catalog import Catalog, Video
from data.clevrer import (
    FPS,
    FRAMES,
    HEIGHT,
    KNOWN_BAD,
    SPLITS,
    WIDTH,
    FoundVideo,
    annotation_path,
    discover,
    official_split,
    parse_ids,
    video_path,
    write_annotation,
)
from data.errors import SourceError
from data.files import file_digest
from data.picture import write_video
from data.store import bucket_ids
from pipeline.journal import BadItem, Built, Unit
from pipeline.progress import Tick
from pipeline.shards import Make, link_tree
from pipeline.stage import Job, run_stage
from stages.archives import Archives

VIDEO_QUALITY = 18
"""x264's constant rate factor: CLEVRER's own files are of about this quality (0.3-0.5 MB for 128 frames)."""


@dataclass(frozen=True)
class Origin:
    """What a source can give, and how."""

    params: Mapping[str, Any]
    """Of the fingerprint."""
    inputs: Mapping[int, tuple[str, ...]]
    """Digests of what each video is made of."""
    make: Make
    absent: Sequence[BadItem] = ()
    prepare: Callable[[Sequence[Unit]], None] = lambda units: None
    """Told of the units that are not there yet, before any is made."""
    without_proposal: Sequence[int] = ()


def run(job: Job) -> None:
    wanted = _wanted(job)
    with ExitStack() as stack:
        origin = _origin(job, wanted, stack)
        job.check_bad(origin.absent, len(wanted))
        if not origin.inputs:
            raise SourceError("not one of the videos in acquire.videos can be had", remedy="mend acquire.videos")
        fingerprint = job.fingerprint(origin.params)
        units = [
            Unit(ids, tuple(d for i in ids for d in origin.inputs[i]), f"videos {ids[0]}-{ids[-1]}", bucket)
            for bucket, ids in bucket_ids(origin.inputs, job.params.shards.videos).items()
        ]
        built = job.build(fingerprint, units, origin.make, before=origin.prepare)
    bad = sorted([*origin.absent, *(item for b in built for item in b.bad)], key=lambda item: item.id)
    job.check_bad(bad, len(wanted))
    _publish(job, built, wanted, fingerprint, bad, origin.without_proposal)


def _origin(job: Job, wanted: Mapping[int, str], stack: ExitStack) -> Origin:
    acquire = job.params.acquire
    if acquire.source == "simulated":
        make = _simulate(acquire.seed, job.device)
        return Origin({"seed": acquire.seed}, dict.fromkeys(wanted, ()), make)
    if acquire.source == "clevrer":
        archives = Archives(acquire.url, wanted, acquire.proposals, stack)
        lacking = archives.without("proposal") if acquire.proposals else ()
        made_of = {"source": "clevrer"}
        return Origin(made_of, archives.inputs, archives.make, archives.absent, archives.prepare, lacking)
    found = {v.id: v for v in discover(_root(job))}
    absent = [BadItem(i, _absence(i, found)) for i in wanted if i not in found or i in KNOWN_BAD]
    here = {i: found[i] for i in wanted if i in found and i not in KNOWN_BAD}
    inputs = {i: tuple(file_digest(f) for f in (v.video, v.annotation) if f) for i, v in here.items()}
    return Origin({"source": "local"}, inputs, _copy(here), absent)


def _wanted(job: Job) -> dict[int, str]:
    """Id -> split, for every id that ``acquire.videos`` lists."""
    videos = job.params.acquire.videos
    if videos == "official" and job.params.acquire.source == "clevrer":
        return {i: split for split, ids in SPLITS.items() for i in range(*ids)}
    if videos == "official":
        return {v.id: official_split(v.id) for v in discover(_root(job))}
    wanted: dict[int, str] = {}
    for split, text in videos.items():
        try:
            ids = parse_ids(str(text))
            official_split(ids[-1])
        except ValueError as error:
            raise SourceError(f"acquire.videos.{split}: {error}", remedy="write ids such as 0-8,10") from error
        for i in ids:
            if i in wanted:
                raise SourceError(
                    f"acquire.videos gives id {i} to {wanted[i]} and to {split}",
                    remedy="a video belongs to one split, or training would see what it is tested on",
                )
            wanted[i] = split
    return wanted


def _root(job: Job) -> Path:
    return job.root / (job.params.acquire.root or "")


def _absence(video: int, found: dict[int, FoundVideo]) -> str:
    if video in found:
        return f"known to be bad: {KNOWN_BAD[video]}"
    return f"listed in acquire.videos, but acquire.root holds no video_{video:05d}.mp4"


def _simulate(seed: int, device: str) -> Callable[[Unit, Path, Tick], list[BadItem]]:
    from data.physics import simulate  # Bullet and the renderer are loaded only where they are used
    from data.shading import render

    def make(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        for video in unit.ids:
            # One generator per video: a video does not depend on which others are asked for.
            annotation = simulate(np.random.default_rng((seed, video)), scene_index=video)
            frames = render(annotation, range(FRAMES), HEIGHT, WIDTH, device=device)
            split = official_split(video)
            write_annotation(annotation, folder / annotation_path(split, video))
            write_video(folder / video_path(split, video), frames, FPS, VIDEO_QUALITY)
            tick(1, f"video {video}")
        return []

    return make


def _copy(found: dict[int, FoundVideo]) -> Callable[[Unit, Path, Tick], list[BadItem]]:
    def make(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        for video in unit.ids:
            split = official_split(video)
            item = found[video]
            # Copied, not linked: DVC makes linked outputs read-only, and these files are not ours.
            for source, place in ((item.video, video_path), (item.annotation, annotation_path)):
                if source is not None:
                    target = folder / place(split, video)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
            tick(1, f"video {video}")
        return []

    return make


def _publish(
    job: Job,
    built: Sequence[Built],
    splits: Mapping[int, str],
    fingerprint: str,
    bad: Sequence[BadItem],
    without_proposal: Sequence[int],
) -> None:
    if job.out.exists():
        shutil.rmtree(job.out)
    videos = []
    for unit in built:
        link_tree(unit.folder, job.out)
        for video in unit.good:
            name, note = (str(place(official_split(video), video)) for place in (video_path, annotation_path))
            has_note = note in unit.files
            videos.append(
                Video(
                    id=video,
                    split=splits[video],
                    video=name,
                    video_sha256=unit.files[name],
                    annotation=note if has_note else None,
                    annotation_sha256=unit.files[note] if has_note else None,
                )
            )
    catalog = Catalog(job.out, tuple(videos), tuple(asdict(item) for item in bad))
    proposals = {"without_proposal": list(without_proposal)} if job.params.acquire.proposals else {}
    catalog.save(
        stage=job.title, fingerprint=fingerprint, params=job.params.acquire.model_dump(mode="json"), **proposals
    )


if __name__ == "__main__":
    run_stage("acquire", run)
