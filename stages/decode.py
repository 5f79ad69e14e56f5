"""decode: every stride-th frame of every video, resized while decoding, as uint8 RGB on the model's grid."""

from __future__ import annotations

import numpy as np

from data.catalog import Catalog
from data.clevrer import FRAMES
from data.shrink import shrink_bilinear
from data.store import ArraySpec
from data.video import VideoReader
from data.world import HEIGHT, WIDTH
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.kept import Kept
from stages.sharding import build_store


def run(job: Job) -> None:
    decode = job.params.decode
    (h, w), native = decode.resolution, decode.resize == "bilinear"
    spec = ArraySpec(
        "frames", (decode.steps, h, w, 3), "uint8", ("time", "y", "x", "channel"), job.params.shards.clip, "picture"
    )
    catalog = Catalog.load(ARTIFACTS / "acquire")
    kept = Kept(catalog, decode)
    params = decode.model_dump(mode="json", exclude={"timeout"})
    with VideoReader(timeout=decode.timeout) as reader:

        def compute(video: int) -> dict[str, np.ndarray]:
            source = catalog.video(video)
            frames = reader.read(
                catalog.root / source.video,
                kept.frames(video),
                height=HEIGHT if native else h,
                width=WIDTH if native else w,
                expected_frames=FRAMES,
                expected_sha256=source.video_sha256,
            )
            return {"frames": shrink_bilinear(frames, h, w) if native else frames}

        inputs = {v.id: (v.video_sha256, *kept.inputs(v.id)) for v in catalog.videos}
        fingerprint = job.fingerprint([params, job.params.shards])
        build_store(job, [spec], inputs, compute, fingerprint=fingerprint, params=params, computes=False)


if __name__ == "__main__":
    run_stage("decode", run)
