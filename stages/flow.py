"""flow: optical flow both ways at the teacher's resolution, stored as int16 in 1/32 px.

The teacher sees the source video at its own resolution, not the model's frames: RAFT on half-resolution CLEVRER loses
a third of its accuracy (docs/teachers.md). The `scene` teacher is the truth that `label` cast from the annotations.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from data.catalog import Catalog
from data.clevrer import FRAMES
from data.errors import AnnotationError
from data.store import Store, pack_flow
from data.video import VideoReader
from models.flow_teachers import FlowTeacher, build_teacher
from models.static_gate import gate_flow
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.fields import flow_specs
from stages.sharding import build_store


def run(job: Job) -> None:
    catalog = Catalog.load(ARTIFACTS / "acquire")
    if job.params.flow.teacher == "scene":
        _copy_labels(job, catalog)
        return
    flow = job.params.flow
    teacher = build_teacher(flow.teacher, device=job.device, iterations=flow.iterations, precision=flow.precision)
    inputs = {v.id: (v.video_sha256,) for v in catalog.videos}
    with VideoReader(timeout=job.params.decode.timeout) as reader:
        compute = _estimate(job, catalog, teacher, reader)
        _build(job, inputs, compute, weights=teacher.weights_digest, licence=teacher.licence)


def _estimate(
    job: Job, catalog: Catalog, teacher: FlowTeacher, reader: VideoReader
) -> Callable[[int], dict[str, np.ndarray]]:
    (h, w), decode, gate = job.params.flow.resolution, job.params.decode, job.params.flow.gate
    kept = range(0, decode.frames, decode.stride)
    videos = {v.id: v for v in catalog.videos}

    def compute(video: int) -> dict[str, np.ndarray]:
        path = catalog.root / videos[video].video
        frames = torch.from_numpy(reader.read(path, kept, height=h, width=w, expected_frames=FRAMES))
        pair = teacher(frames)
        if gate.enabled:
            pair = gate_flow(pair, frames, threshold=gate.threshold, contrast=gate.contrast, radius=gate.radius)
        return {"flow_fwd": pack_flow(pair.flow_fwd.cpu().numpy()), "flow_bwd": pack_flow(pair.flow_bwd.cpu().numpy())}

    return compute


def _copy_labels(job: Job, catalog: Catalog) -> None:
    labels = Store(ARTIFACTS / "label")
    inputs = {v.id: (labels.shard_digest(v.id) if v.id in labels.ids else "unlabelled",) for v in catalog.videos}

    def compute(video: int) -> dict[str, np.ndarray]:
        if video not in labels.ids:
            raise AnnotationError(
                f"video {video} has no labels, which the scene teacher copies",
                remedy="choose another flow.teacher, or leave the video out",
            )
        return {name: labels.read(name, video) for name in ("flow_fwd", "flow_bwd")}

    _build(job, inputs, compute, weights="", licence="none: exact geometry of the annotations")


def _build(
    job: Job,
    inputs: dict[int, tuple[str, ...]],
    compute: Callable[[int], dict[str, np.ndarray]],
    *,
    weights: str,
    licence: str,
) -> None:
    (h, w), decode = job.params.flow.resolution, job.params.decode
    build_store(
        job,
        flow_specs(len(range(0, decode.frames, decode.stride)) - 1, h, w, job.params.shards.clip),
        inputs,
        compute,
        fingerprint=job.fingerprint(
            [job.params.flow, decode.stride, decode.frames, job.params.shards], weights=weights
        ),
        params={**job.params.flow.model_dump(mode="json"), "stride": decode.stride, "frames": decode.frames},
        facts={"teacher": {"weights_sha256": weights, "licence": licence}},
    )


if __name__ == "__main__":
    run_stage("flow", run)
