"""How good the flow teacher and the occlusion masks are, against the truth cast from the annotations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from data.page import TeacherRow
from data.resize import resize_field, resize_flow
from data.store import Store
from models.metrics import score
from models.statistics import State, flow_statistics, merge, state_of, visibility_statistics
from pipeline.stage import ARTIFACTS, Job, read_runs

SHOWN = ("epe", "epe_moving", "epe_background", "epe_visible", "nonvisible_f1")


def measure_teacher(job: Job, videos: Sequence[int]) -> tuple[TeacherRow | None, dict[str, float]]:
    """Accuracy over the labelled ones of ``videos``, at the teacher's resolution; nothing where none is labelled."""
    flow, occlusion, labels = (Store(ARTIFACTS / name) for name in ("flow", "occlusion", "label"))
    states = [
        _of_video(video, flow, occlusion, labels) for video in videos if video in labels.ids and video in occlusion.ids
    ]
    if not states:
        return None, {}
    scores = score(merge(*states), np.random.default_rng(job.params.evaluate.seed), names=SHOWN)
    figures = {name: s.overall.value for name, s in scores.items()}
    known = {name: round(value, 5) for name, value in figures.items() if math.isfinite(value)}
    run = read_runs().get("flow", {})
    row = TeacherRow(
        f"{job.params.flow.teacher} at {job.params.flow.resolution[0]} x {job.params.flow.resolution[1]}",
        known.get("epe"),
        known.get("epe_moving"),
        known.get("epe_background"),
        known.get("nonvisible_f1"),
        run.get("pairs_per_second"),
    )
    return row, known


def _of_video(video: int, flow: Store, occlusion: Store, labels: Store) -> State:
    """Sums over all pairs of one video, as one window of one step."""
    estimate = torch.from_numpy(flow.read_flow("flow_bwd", video))
    h, w = estimate.shape[-2:]
    truth = resize_flow(torch.from_numpy(labels.read_flow("flow_bwd", video)), h, w)
    seen = torch.from_numpy(occlusion.read("visible", video)).float()[:, None] / 255
    true_seen = resize_field(torch.from_numpy(labels.read("visible", video)).float()[:, None] / 255, h, w)
    statistics = {
        **flow_statistics(estimate[None], truth[None], true_seen[None]),
        **visibility_statistics(seen[None], true_seen[None]),
    }
    return state_of(np.array([video]), statistics)
