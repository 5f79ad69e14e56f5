"""decode: every stride-th frame of every video, resized while decoding, as uint8 RGB on the model's grid."""

from __future__ import annotations

import numpy as np

from data.catalog import Catalog
from data.clevrer import FRAMES
from data.store import ArraySpec
from data.video import VideoReader
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.sharding import build_store


def run(job: Job) -> None:
    decode = job.params.decode
    (h, w), kept = decode.resolution, range(0, decode.frames, decode.stride)
    spec = ArraySpec(
        "frames", (len(kept), h, w, 3), "uint8", ("time", "y", "x", "channel"), job.params.shards.clip, "picture"
    )
    catalog = Catalog.load(ARTIFACTS / "acquire")
    videos = {v.id: v for v in catalog.videos}
    params = {"resolution": decode.resolution, "stride": decode.stride, "frames": decode.frames}
    with VideoReader(timeout=decode.timeout) as reader:

        def compute(video: int) -> dict[str, np.ndarray]:
            path, digest = catalog.root / videos[video].video, videos[video].video_sha256
            return {
                "frames": reader.read(path, kept, height=h, width=w, expected_frames=FRAMES, expected_sha256=digest)
            }

        inputs = {v.id: (v.video_sha256,) for v in catalog.videos}
        fingerprint = job.fingerprint([params, job.params.shards])
        build_store(job, [spec], inputs, compute, fingerprint=fingerprint, params=params, computes=False)


if __name__ == "__main__":
    run_stage("decode", run)
