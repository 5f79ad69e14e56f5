"""What the stages with one result in files share: one resumable unit, linked into the output with a manifest."""

from __future__ import annotations

import shutil

from data.store import FORMAT, MANIFEST, file_digest, write_json
from pipeline.shards import Make, Unit, link_tree
from pipeline.stage import Job


def build_folder(
    job: Job, unit: Unit, make: Make, *, fingerprint: str, counted: str = "steps", private: tuple[str, ...] = ()
) -> None:
    """Build ``unit`` unless it is there already, and publish its files with their digests.

    Files named in ``private`` (what differs from run to run, such as timings) stay in the unit's folder.
    """
    (built,) = job.build(fingerprint, [unit], make, counted=counted)
    if job.out.exists():
        shutil.rmtree(job.out)
    link_tree(built.folder, job.out, without=private)
    files = {str(f.relative_to(job.out)): file_digest(f) for f in sorted(job.out.rglob("*")) if f.is_file()}
    write_json(job.out / MANIFEST, {"format": FORMAT, "stage": job.title, "fingerprint": fingerprint, "files": files})
