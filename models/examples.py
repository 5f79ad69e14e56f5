"""Examples: a few windows kept to be looked at, chosen while all of them stream past."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float64, UInt8

_RESERVOIR = 15


@dataclass(frozen=True)
class Example:
    """One window kept to be looked at, with the rules that chose it (see `Examples`).

    What follows ``mse_copy`` is as in `models.predictor.Rollout` and, with ``true_`` before it, as in
    `models.evaluation.Window`; None where a predictor has no such head or the video no labels.
    """

    rules: tuple[str, ...]
    video: int
    start: int
    context: UInt8[np.ndarray, "x h w 3"]
    truth: UInt8[np.ndarray, "y h w 3"]
    prediction: UInt8[np.ndarray, "y h w 3"]
    mse: Float64[np.ndarray, " y"]
    mse_copy: Float64[np.ndarray, " y"]
    flow_bwd: Float[np.ndarray, "y 2 h w"] | None = None
    visible: Float[np.ndarray, "y h w"] | None = None
    true_flow_bwd: Float[np.ndarray, "y 2 h w"] | None = None
    true_visible: Float[np.ndarray, "y h w"] | None = None
    boxes: Float[np.ndarray, "y s 4"] | None = None
    presence: Float[np.ndarray, "y s"] | None = None
    collision: Float[np.ndarray, " y"] | None = None
    true_boxes: Float[np.ndarray, "y n 4"] | None = None
    true_presence: Float[np.ndarray, "y n"] | None = None
    true_collision: Float[np.ndarray, " y"] | None = None


class Examples:
    """Chooses windows while they stream past, by rules that can be read below a picture.

    ``first``: the first window. ``best``, ``worst``: the largest and smallest gain, which is the MSE of copy_last
    minus that of the prediction, mean over steps. ``most motion``: the largest MSE of copy_last, hence the same window
    for every predictor; so is ``most collisions``, the largest number of steps at which something truly collides (no
    window where nothing ever does). ``median`` (of gain), ``median motion`` (of the MSE of copy_last): the middle one
    of 15 windows drawn at random without regard to the result. Ties go to the earlier window.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._seen = 0
        self._extreme: dict[str, tuple[float, Example]] = {}
        self._drawn: list[Example] = []

    def offer(
        self, gain: float, motion: float, video: int, start: int, make: Callable[[], Example], *, collisions: int = 0
    ) -> None:
        """Considers one window; ``make`` is called at most once and only if some rule keeps it."""
        made: list[Example] = []

        def example() -> Example:
            if not made:
                made.append(make())
            return made[0]

        extremes = [("first", 0.0), ("best", gain), ("worst", -gain), ("most motion", motion)]
        for rule, value in extremes + [("most collisions", collisions)] * (collisions > 0):
            if rule not in self._extreme or value > self._extreme[rule][0]:
                self._extreme[rule] = (value, example())
        # Algorithm R (Vitter 1985): every window is equally likely to be among the drawn.
        place = self._seen if self._seen < _RESERVOIR else int(self._rng.integers(self._seen + 1))
        if place < _RESERVOIR:
            self._drawn[place : place + 1] = [example()]
        self._seen += 1

    def chosen(self) -> tuple[Example, ...]:
        """The examples, each once with all the rules that chose it."""
        picks = {rule: kept for rule, (_, kept) in self._extreme.items()}
        if self._drawn:
            by_gain = sorted(self._drawn, key=lambda e: float((e.mse_copy - e.mse).mean()))
            by_motion = sorted(self._drawn, key=lambda e: float(e.mse_copy.mean()))
            picks |= {"median": by_gain[len(by_gain) // 2], "median motion": by_motion[len(by_motion) // 2]}
        rules: dict[tuple[int, int], list[str]] = {}
        for rule, kept in picks.items():
            rules.setdefault((kept.video, kept.start), []).append(rule)
        by_place = {(kept.video, kept.start): kept for kept in picks.values()}
        return tuple(replace(by_place[place], rules=tuple(names)) for place, names in rules.items())
