"""flow: optical flow both ways at the teacher's resolution, stored as int16 in 1/32 px.

The teacher sees the source video at its own resolution, not the model's frames: RAFT on half-resolution CLEVRER loses
a third of its accuracy (docs/teachers.md). The `scene` teacher is the truth that `label` cast from the annotations.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from data.catalog import Catalog
from data.clevrer import FRAMES
from data.errors import AnnotationError
from data.store import Store, pack_flow
from data.video import VideoReader
from models.flow_teachers import FlowPair, FlowTeacher, build_teacher
from models.static_gate import gate_flow
from pipeline.sections import Flow, Gate
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.fields import flow_specs
from stages.kept import Kept
from stages.sharding import build_store

ON_CPU = ("dis", "scene")
"""Teachers that leave a GPU idle: their workers follow the cores."""


@dataclass
class Meter:
    """What this process asked of the teacher, one call per video; calls of other workers are not among them."""

    calls: int = 0
    pairs: int = 0
    seconds: float = 0.0

    def measured(self, teacher: FlowTeacher, frames: UInt8[Tensor, "t h w 3"]) -> FlowPair:
        started = time.monotonic()
        pair = teacher(frames)
        self.seconds += time.monotonic() - started
        self.calls, self.pairs = self.calls + 1, self.pairs + len(frames) - 1
        return pair

    @property
    def facts(self) -> dict[str, float]:
        speed = {"pairs_per_second": round(self.pairs / self.seconds, 3)} if self.calls else {}
        return {"teacher_calls": self.calls, **speed}


def run(job: Job) -> None:
    catalog, meter = Catalog.load(ARTIFACTS / "acquire"), Meter()
    if job.params.flow.teacher == "scene":
        _copy_labels(job, catalog)
    else:
        _estimate(job, catalog, meter)
    job.facts.update(meter.facts)


def _estimate(job: Job, catalog: Catalog, meter: Meter) -> None:
    flow, decode, gate = job.params.flow, job.params.decode, job.params.flow.gate
    (h, w), kept = flow.resolution, Kept(catalog, decode)
    teacher = teacher_of(flow, job.device)
    if teacher.warning:
        print(f"flow: {teacher.name}: {teacher.warning}", file=sys.stderr)
    with VideoReader(timeout=decode.timeout) as reader:

        def compute(video: int) -> dict[str, np.ndarray]:
            source = catalog.video(video)
            path, digest = catalog.root / source.video, source.video_sha256
            read = reader.read(
                path, kept.frames(video), height=h, width=w, expected_frames=FRAMES, expected_sha256=digest
            )
            return taught(partial(meter.measured, teacher), gate, torch.from_numpy(read))

        inputs = {v.id: (v.video_sha256, *kept.inputs(v.id)) for v in catalog.videos}
        _build(job, inputs, compute, identity=teacher.identity, teacher=teacher.facts)


def teacher_of(flow: Flow, device: str) -> FlowTeacher:
    """The teacher of the parameters. Only the digest of its weights is known yet: its network is built when the first
    video is not found ready."""
    return build_teacher(
        flow.teacher,
        device=device,
        iterations=flow.iterations,
        precision=flow.precision,
        compiled=flow.compiled,
        weights=flow.weights,
    )


def taught(
    teacher: Callable[[Tensor], FlowPair],
    gate: Gate,
    frames: UInt8[Tensor, "t h w 3"],
    scene: UInt8[Tensor, "n h w 3"] | None = None,
) -> dict[str, np.ndarray]:
    """Both flows of consecutive frames as they are stored. ``scene`` as in `models.static_gate.static_gate`."""
    pair = teacher(frames)
    if gate.enabled:
        pair = gate_flow(
            pair, frames, threshold=gate.threshold, contrast=gate.contrast, radius=gate.radius, scene=scene
        )
    return {name: pack_flow(getattr(pair, name).cpu().numpy()) for name in ("flow_fwd", "flow_bwd")}


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

    facts = {"name": "scene", "weights_sha256": "", "licence": "none: exact geometry of the annotations"}
    _build(job, inputs, compute, identity="", teacher=facts)


def _build(
    job: Job,
    inputs: dict[int, tuple[str, ...]],
    compute: Callable[[int], dict[str, np.ndarray]],
    *,
    identity: str,
    teacher: Mapping[str, Any],
) -> None:
    (h, w), decode = job.params.flow.resolution, job.params.decode
    build_store(
        job,
        flow_specs(decode.steps - 1, h, w, job.params.shards.clip),
        inputs,
        compute,
        fingerprint=job.fingerprint(
            [job.params.flow, decode.stride, decode.frames, decode.no_entry, job.params.shards], weights=identity
        ),
        params={**job.params.flow.model_dump(mode="json"), "stride": decode.stride, "frames": decode.frames},
        facts={"teacher": dict(teacher)},
        computes=job.params.flow.teacher not in ON_CPU,
    )


if __name__ == "__main__":
    run_stage("flow", run)
