"""Scores from the states of evaluations: metrics with bootstrap intervals over videos, and differences in pairs.

What the metrics are stands in `models.definitions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from data.errors import EmptyError
from models.definitions import METRICS, Metric, ratio
from models.statistics import Moments, State, Statistic

__all__ = ["METRICS", "Estimate", "Metric", "Score", "measured", "paired_difference", "score"]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval over videos; NaN where undefined (an interval needs two videos)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """A metric per step of the horizon (``steps[0]`` is the first predicted frame) and over all of it.

    ``steps`` is empty for a metric that ranks all steps together, or that compares whole films.
    """

    overall: Estimate
    steps: tuple[Estimate, ...]


def measured(state: State) -> tuple[str, ...]:
    """The metrics for which ``state`` holds every statistic, counted at least once, in the order of `METRICS`."""
    held = {name for name, s in state.statistics.items() if s.count.any()}
    held |= {name for name, counts in state.histograms.items() if counts.any()}
    held |= {name for name, moments in state.moments.items() if moments.count > 1}
    return tuple(name for name, m in METRICS.items() if held.issuperset(m.statistics))


def score(
    state: State, rng: np.random.Generator, *, names: Sequence[str] | None = None, resamples: int = 1000
) -> dict[str, Score]:
    """Metrics with 95 % percentile intervals (Efron 1979), videos drawn with replacement ``resamples`` times.

    Windows of one video are not independent, hence whole videos are drawn. All metrics see the same draws.
    ``names`` defaults to `measured`. Raises `EmptyError` for a state without videos, `KeyError` for a metric that
    the state cannot give.
    """
    weights = _draws(len(state.videos), rng, resamples)
    names = measured(state) if names is None else names
    return {name: _summary(_values(state, name), _values(state, name, weights)) for name in names}


def paired_difference(a: State, b: State, name: str, rng: np.random.Generator, *, resamples: int = 1000) -> Score:
    """Metric ``name`` of ``a`` minus that of ``b``, both recomputed on the same drawn videos.

    Much narrower than two separate intervals, as hard videos are hard for both. Raises `ValueError` unless both
    were measured on the same windows.
    """
    if not np.array_equal(a.videos, b.videos):
        only_a, only_b = np.setdiff1d(a.videos, b.videos), np.setdiff1d(b.videos, a.videos)
        raise ValueError(
            f"a paired difference needs the same videos: {len(only_a)} only in the first (such as {only_a[:3]}), "
            f"{len(only_b)} only in the second (such as {only_b[:3]})"
        )
    for statistic in METRICS[name].statistics:
        first, second = (_counts(state, name, statistic) for state in (a, b))
        if not np.array_equal(first, second):
            raise ValueError(
                f"a paired difference needs the same windows: {statistic!r} counts {first.sum():.0f} in the "
                f"first and {second.sum():.0f} in the second"
            )
    weights = _draws(len(a.videos), rng, resamples)

    def difference(weights: Float64[np.ndarray, "r v"] | None = None) -> _Values:
        (overall_a, steps_a), (overall_b, steps_b) = (_values(state, name, weights) for state in (a, b))
        return overall_a - overall_b, steps_a - steps_b

    return _summary(difference(), difference(weights))


def _draws(videos: int, rng: np.random.Generator, resamples: int) -> Float64[np.ndarray, "r v"]:
    """How often each video is drawn in each resample; no rows for a single video, which says nothing of spread."""
    if videos == 0:
        raise EmptyError("an evaluation without videos has no score", remedy="check the split and the window stride")
    rows = resamples if videos > 1 else 0
    return rng.multinomial(videos, np.full(videos, 1 / videos), size=rows).astype(np.float64)


def _statistic(state: State, metric: str, name: str) -> Statistic:
    if name not in state.statistics:
        raise KeyError(f"metric {metric!r} needs statistic {name!r}; this state has {sorted(state.statistics)}")
    return state.statistics[name]


def _histogram(state: State, metric: str, name: str) -> Float64[np.ndarray, "v bins"]:
    if name not in state.histograms:
        raise KeyError(f"metric {metric!r} needs histogram {name!r}; this state has {sorted(state.histograms)}")
    return state.histograms[name]


def _moments(state: State, metric: str, name: str) -> Moments:
    if name not in state.moments:
        raise KeyError(f"metric {metric!r} needs moments {name!r}; this state has {sorted(state.moments)}")
    return state.moments[name]


def _counts(state: State, metric: str, name: str) -> np.ndarray:
    """What two states of the same windows have in common, per video."""
    if METRICS[metric].overall == "whole":
        return np.array([_moments(state, metric, name).count])
    if METRICS[metric].overall == "ranked":
        return _histogram(state, metric, name).sum(axis=1)
    return _statistic(state, metric, name).count


_Values = tuple[Float64[np.ndarray, "_"], Float64[np.ndarray, "_ y"]]


def _values(state: State, name: str, weights: Float64[np.ndarray, "r v"] | None = None) -> _Values:
    """The metric over all steps, and per step, under each row of weights (default: every video once)."""
    metric = METRICS[name]
    if metric.overall == "whole":  # moments do not know their videos, so nothing can be drawn again
        if weights is not None:
            return np.full(len(weights), np.nan), np.empty((len(weights), 0))
        distance = metric.compute(*(_moments(state, name, m) for m in metric.statistics))
        return np.full(1, distance), np.empty((1, 0))
    weights = np.ones((1, len(state.videos))) if weights is None else weights
    if metric.overall == "ranked":
        histograms = [weights @ _histogram(state, name, h) for h in metric.statistics]
        return metric.compute(*histograms), np.empty((len(weights), 0))
    sums = [(weights @ s.total, weights @ s.count) for s in (_statistic(state, name, n) for n in metric.statistics)]
    steps = metric.compute(*(ratio(total, count) for total, count in sums))
    if metric.overall == "mean":
        return _mean(steps), steps
    means = (ratio(total.sum(axis=1), count.sum(axis=1)) for total, count in sums)
    return metric.compute(*means), steps


def _summary(values: _Values, drawn: _Values) -> Score:
    (overall, steps), (overall_drawn, steps_drawn) = values, drawn
    by_step = tuple(_estimate(steps[0, k], steps_drawn[:, k]) for k in range(steps.shape[1]))
    return Score(_estimate(overall[0], overall_drawn), by_step)


def _mean(values: Float64[np.ndarray, "r y"]) -> Float64[np.ndarray, " r"]:
    """Over the steps at which the metric is defined."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(axis=1), known.sum(axis=1).astype(np.float64))


def _estimate(value: np.float64, drawn: Float64[np.ndarray, " r"]) -> Estimate:
    known = drawn[~np.isnan(drawn)]
    if len(known) == 0 or np.isnan(value):
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.quantile(known, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))
