"""How good a flow teacher and the masks made of its flows are, against the truth cast from the annotations.

One measurement for the report (the stored flows) and for `clevrcast teachers` (any teacher, before it is chosen):
backward flow, which is what warps, and the visibility from both. Sums over all pairs and videos come first, then the
ratio: pairs in which much moves weigh more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.page_content import TeacherRow
from data.resize import resize_field, resize_flow
from data.store import Store
from models.metrics import score
from models.statistics import State, flow_statistics, merge, state_of, visibility_statistics
from pipeline.stage import ARTIFACTS, Job, read_runs

SHOWN = ("epe", "epe_moving", "epe_background", "epe_visible", "nonvisible_f1")


def state_of_pairs(
    video: int,
    flow_bwd: Float[Tensor, "p 2 h w"],
    true_flow_bwd: Float[Tensor, "p 2 h w"],
    visible: Float[Tensor, "p h w"],
    true_visible: Float[Tensor, "p h w"],
) -> State:
    """Sums over pairs of one video: every pair is a window of one step."""
    seen, true_seen = visible[:, None, None], true_visible[:, None, None]
    statistics = {
        **flow_statistics(flow_bwd[:, None], true_flow_bwd[:, None], true_seen),
        **visibility_statistics(seen, true_seen),
    }
    return state_of(np.full(len(flow_bwd), video), statistics)


def accuracy(states: Sequence[State]) -> dict[str, float]:
    """`SHOWN` over all pairs behind ``states``, without those that are undefined (nothing moved, nothing hid)."""
    scores = score(merge(*states), np.random.default_rng(0), names=SHOWN, resamples=0)  # no intervals: nothing drawn
    figures = {name: s.overall.value for name, s in scores.items()}
    return {name: round(value, 5) for name, value in figures.items() if math.isfinite(value)}


def measure_teacher(job: Job, videos: Sequence[int]) -> tuple[TeacherRow | None, dict[str, float]]:
    """Accuracy over the labelled ones of ``videos``, at the teacher's resolution; nothing where none is labelled."""
    flow, occlusion, labels = (Store(ARTIFACTS / name) for name in ("flow", "occlusion", "label"))
    states = [
        _of_video(video, flow, occlusion, labels) for video in videos if video in labels.ids and video in occlusion.ids
    ]
    if not states:
        return None, {}
    known, p = accuracy(states), job.params.flow
    row = TeacherRow(
        f"{p.teacher}{f' ({p.weights} weights)' if p.weights else ''} at {p.resolution[0]} x {p.resolution[1]}",
        known.get("epe"),
        known.get("epe_moving"),
        known.get("epe_background"),
        known.get("nonvisible_f1"),
        read_runs().get("flow", {}).get("pairs_per_second"),
    )
    return row, known


def _of_video(video: int, flow: Store, occlusion: Store, labels: Store) -> State:
    estimate = torch.from_numpy(flow.read_flow("flow_bwd", video))
    h, w = estimate.shape[-2:]
    truth = resize_flow(torch.from_numpy(labels.read_flow("flow_bwd", video)), h, w)
    seen = torch.from_numpy(occlusion.read("visible", video)).float() / 255
    true_seen = resize_field(torch.from_numpy(labels.read("visible", video)).float()[:, None] / 255, h, w)[:, 0]
    return state_of_pairs(video, estimate, truth, seen, true_seen)
