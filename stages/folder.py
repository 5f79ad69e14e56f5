"""What the stages with one result in files share: one resumable unit, linked into the output with a manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from data.manifest import file_entry, write_manifest
from pipeline.journal import Unit
from pipeline.shards import Make, link_tree
from pipeline.stage import Job


def build_folder(
    job: Job,
    unit: Unit,
    make: Make,
    *,
    fingerprint: str,
    counted: str = "steps",
    private: tuple[str, ...] = (),
    further: Callable[[Path], Sequence[str]] = lambda folder: (),
) -> None:
    """Build ``unit`` unless it is there already, and publish its files with their digests.

    Files named in ``private`` (what differs from run to run, such as timings) stay in the unit's folder.
    ``further(folder)`` writes files into the output whenever it is published, and returns their names: cheap ones that
    depend on more than the unit does.
    """
    (built,) = job.build(fingerprint, [unit], make, counted=counted)
    if job.out.exists():
        shutil.rmtree(job.out)
    link_tree(built.folder, job.out, without=private)
    files = {name: file_entry(job.out / name, sha256) for name, sha256 in built.files.items() if name not in private}
    files |= {name: file_entry(job.out / name) for name in further(job.out)}
    write_manifest(job.out, {"stage": job.title, "fingerprint": fingerprint, "files": files})
