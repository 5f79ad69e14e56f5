"""The course of a training as a picture: every term of the loss by step, also of a run that is not finished."""

from __future__ import annotations

import json
from dataclasses import dataclass

import altair
import numpy as np
import vl_convert

from data.errors import EmptyError
from models.training_state import load_state
from pipeline.shards import kept_state, unfinished
from pipeline.stage import WORK
from pipeline.upkeep import newest
from stages.model_views import folder_of
from stages.shelf import Progress
from stages.train import STATE

_POINTS = 400
"""At most as many points a curve are drawn, each the mean of the steps around it."""


@dataclass(frozen=True)
class Course:
    """Values by step of every term, and whether the run is at its end."""

    curves: dict[str, list[float]]
    steps: int
    planned: int

    def told(self) -> str:
        loss = self.curves["loss"]
        tenth = max(1, len(loss) // 10)
        state = "finished" if self.steps >= self.planned else f"at step {self.steps} of {self.planned}"
        return (
            f"{self.steps} steps ({state}); loss {np.mean(loss[:tenth]):.4f} over the first tenth, "
            f"{np.mean(loss[-tenth:]):.4f} over the last, lowest {min(loss):.4f} at step {int(np.argmin(loss)) + 1}"
        )


def course(title: str) -> Course:
    """What ``train@NAME`` has kept of its course: the curves of the finished run, else those of its last saved state.

    Raises:
        WorkspaceError: it has never run here.
        EmptyError: nothing is kept: the model learns nothing, or no state was saved yet.
    """
    try:
        file = folder_of(title) / "curves.json"
    except EmptyError:
        return _interrupted(title)
    curves = json.loads(file.read_text()) if file.exists() else {}
    if not curves.get("loss"):
        raise EmptyError(f"{title} has nothing to learn, so there is no curve", remedy="choose another predictor")
    return Course(curves, len(curves["loss"]), len(curves["loss"]))


def _interrupted(title: str) -> Course:
    (unit, _), *_ = Progress.of(title).units
    folder = newest(WORK, title)
    assert folder is not None
    state = load_state(kept_state(unfinished(folder, unit)) / STATE)
    if state is None or not state.curves.get("loss"):
        raise EmptyError(
            f"{title} has not saved a state yet", remedy="wait for CLEVRCAST_SAVE_SECONDS, or look at its live curves"
        )
    return Course(state.curves, state.step, unit.items)


def draw(title: str, found: Course) -> bytes:
    """A PNG: the loss, and its terms on scales of their own."""
    rows = []
    for name, values in found.curves.items():
        parts = np.array_split(np.arange(len(values)), min(_POINTS, len(values)))
        rows += [
            {"term": name, "step": float(p.mean() + 1), "value": float(np.mean(np.array(values)[p]))} for p in parts
        ]
    line = altair.Chart(altair.Data(values=rows)).mark_line(strokeWidth=1.2, clip=True)
    base = line.encode(
        x=altair.X("step:Q", title="step", scale=altair.Scale(domain=[0, found.planned])),
        y=altair.Y("value:Q", title=None, scale=altair.Scale(zero=False), axis=altair.Axis(minExtent=48)),
    )
    facets = base.properties(width=360, height=200).facet(
        facet=altair.Facet("term:N", title=None, sort=list(found.curves)), columns=2
    )
    chart = facets.resolve_scale(y="independent").properties(title=f"{title}: {found.told()}")
    return vl_convert.vegalite_to_png(chart.to_dict(), scale=1.5)
