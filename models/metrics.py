"""Metrics made from mean statistics, with bootstrap intervals over videos.

Every metric is a function of the means of `models.statistics`, step by step; its docstring gives definition, source,
range and direction. *Overall* is the mean over steps of the metric, so every step of the horizon weighs the same
(SlotFormer and PFI average in this way). Collisions are too rare for that: theirs is computed from the sums over all
steps, and average precision from all steps ranked together, so that it has no value per step. Undefined values
(nothing moved, no foreground, no flow head) are NaN.

Two figures are called PSNR in the literature (OpenSTL issue 191) and differ by tenths of a decibel:

- ``psnr``: of the mean squared error of all frames of that step; the headline figure here.
- ``psnr_frame``: the mean over frames of each frame's PSNR; what video prediction papers mostly report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64

from data.errors import EmptyError
from models.object_statistics import TOLERANCES
from models.statistics import FRAME_PSNR_CAP_DB, State, Statistic

Means = Float[np.ndarray, "*rows y"]


@dataclass(frozen=True)
class Metric:
    """A function of the means of ``statistics``; ``unit`` is empty for pure numbers.

    ``overall`` says how its steps become one value: their mean, the metric of the statistics summed over the steps,
    or, where ``statistics`` names histograms, one ranking of everything.
    """

    name: str
    statistics: tuple[str, ...]
    better: Literal["higher", "lower", "neither"]
    unit: str
    compute: Callable[..., np.ndarray]
    overall: Literal["mean", "summed", "ranked"] = "mean"

    @property
    def definition(self) -> str:
        """The docstring of the function as one paragraph, for tables of definitions."""
        return " ".join((self.compute.__doc__ or "").split())


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval over videos; NaN where undefined (an interval needs two videos)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """A metric per step of the horizon (``steps[0]`` is the first predicted frame) and over all of it.

    ``steps`` is empty for a metric that ranks all steps together.
    """

    overall: Estimate
    steps: tuple[Estimate, ...]


def mse(squared_error: Means) -> Means:
    """Mean squared error over pixels, channels and frames of the step, colours in [0, 1]. Range [0, 1]; lower."""
    return squared_error


def psnr(squared_error: Means) -> Means:
    """-10 log10 of the MSE in dB (peak 1). Range [0, 100], capped there for errors under 1e-10; higher. PSNR of the
    mean error, not the mean of PSNRs."""
    return -10 * np.log10(np.maximum(squared_error, 10 ** (-FRAME_PSNR_CAP_DB / 10)))


def psnr_frame(psnr_frame: Means) -> Means:
    """Mean over frames of -10 log10 of the frame's MSE, each capped at 100 dB. Range [0, 100]; higher. At least
    ``psnr`` (Jensen): easy frames pull it up."""
    return psnr_frame


def ssim(ssim: Means) -> Means:
    """Mean structural similarity of frames (Wang et al. 2004, Gaussian 11x11). Range [-1, 1]; higher."""
    return ssim


def skill(squared_error: Means, squared_error_copy: Means) -> Means:
    """1 - MSE / MSE of copy_last on the same frames: the mean squared error skill score (Murphy 1988) with
    persistence as reference. Range (-inf, 1]; 0 equals copy_last; higher. Undefined where nothing changes."""
    return 1 - _ratio(squared_error, squared_error_copy)


def epe(mean_error: Means) -> Means:
    """Mean end-point error |flow - truth| in pixels over the named region (Baker et al. 2011). Range [0, inf);
    lower."""
    return mean_error


def nonvisible_precision(hit: Means, false: Means) -> Means:
    """Of the pixels called non-visible, the fraction that is. Range [0, 1]; higher. Undefined if none is called."""
    return _ratio(hit, hit + false)


def nonvisible_recall(hit: Means, miss: Means) -> Means:
    """Of the non-visible pixels, the fraction called so. Range [0, 1]; higher. Undefined if there is none."""
    return _ratio(hit, hit + miss)


def nonvisible_f1(hit: Means, false: Means, miss: Means) -> Means:
    """2 TP / (2 TP + FP + FN) of the non-visible class, pixels pooled. Range [0, 1]; higher. The rare class: calling
    everything visible scores 0 and not 0.98."""
    return _ratio(2 * hit, 2 * hit + false + miss)


def lpips(lpips: Means) -> Means:
    """Mean over frames of LPIPS, the distance of deep features (Zhang et al. 2018, SqueezeNet). Range [0, inf), 0 is
    identical; lower. Blur costs more and small shifts less than in the squared error."""
    return lpips


def box_iou(box_iou: Means) -> Means:
    """Mean intersection over union of the boxes of present objects and of the slot that each is assigned to once per
    window (greatest sum over the horizon), 0 where that slot is absent or there is none. Range [0, 1]; higher. Extra
    slots cost nothing here, see ``box_precision``. The fixed assignment is that of unsupervised tracking (Weis et al.
    2021, after Bernardin and Stiefelhagen 2008)."""
    return box_iou


def box_recall(hit: Means, miss: Means) -> Means:
    """Of the present objects, the fraction matched by a present slot with an IoU of at least 0.5; matched anew at
    every step, whoever the slot was before. Range [0, 1]; higher. The complement of CLEAR MOT's miss ratio
    (Bernardin and Stiefelhagen 2008)."""
    return _ratio(hit, hit + miss)


def box_precision(hit: Means, false: Means) -> Means:
    """Of the slots with a presence of at least 0.5, the fraction matched to a present object with an IoU of at least
    0.5; matched anew at every step. Range [0, 1]; higher. Undefined if no slot is present."""
    return _ratio(hit, hit + false)


def collision_ap(
    positives: Float64[np.ndarray, "r bins"], negatives: Float64[np.ndarray, "r bins"]
) -> Float64[np.ndarray, " r"]:
    """Average precision of the probability of a collision, all steps of all windows ranked together: the sum over
    thresholds of precision times the recall that each adds, without interpolation. Equal to a twentieth of a unit of
    log-odds is a tie. Range [0, 1]; higher. Ranking at random scores ``collision_base_rate``; undefined without a
    collision."""
    hit, said = (np.cumsum(counts[:, ::-1], axis=1) for counts in (positives, positives + negatives))
    precision = np.divide(hit, said, out=np.zeros_like(hit), where=said > 0)
    return _ratio((precision * positives[:, ::-1]).sum(axis=1), hit[:, -1])


def collision_base_rate(base: Means) -> Means:
    """The fraction of steps with a collision: what ``collision_ap`` is by chance. A property of the data: neither is
    better. Range [0, 1]."""
    return base


def collision_f1(hit: Means, false: Means, miss: Means) -> Means:
    """2 TP / (2 TP + FP + FN) of collisions, predicted events (peaks of at least 0.5) and true ones matched one to one
    within 2 or 5 frames of the source video, counts summed over steps. Range [0, 1]; higher. Calling every step a
    collision scores ``collision_f1_always``."""
    return _ratio(2 * hit, 2 * hit + false + miss)


def collision_f1_always(base: Means) -> Means:
    """2 r / (1 + r), r the ``collision_base_rate``: the ``collision_f1`` of calling every step a collision. A property
    of the data: neither is better. Range [0, 1]."""
    return _ratio(2 * base, 1 + base)


def _ratio(a: Means, b: Means) -> Means:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0)


_PAIR, _FG_PAIR = ("squared_error", "squared_error_copy"), ("fg_squared_error", "fg_squared_error_copy")
_HIT, _FALSE, _MISS = "nonvisible_hit", "nonvisible_false", "nonvisible_miss"
_EVENTS = {t: tuple(f"collision_{cell}_{t}" for cell in ("hit", "false", "miss")) for t in TOLERANCES}

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("mse", ("squared_error",), "lower", "", mse),
        Metric("psnr", ("squared_error",), "higher", "dB", psnr),
        Metric("psnr_frame", ("psnr_frame",), "higher", "dB", psnr_frame),
        Metric("ssim", ("ssim",), "higher", "", ssim),
        Metric("skill", _PAIR, "higher", "", skill),
        Metric("fg_mse", ("fg_squared_error",), "lower", "", mse),
        Metric("fg_psnr", ("fg_squared_error",), "higher", "dB", psnr),
        Metric("fg_skill", _FG_PAIR, "higher", "", skill),
        Metric("epe", ("epe",), "lower", "px", epe),
        Metric("epe_moving", ("epe_moving",), "lower", "px", epe),
        Metric("epe_background", ("epe_background",), "lower", "px", epe),
        Metric("epe_visible", ("epe_visible",), "lower", "px", epe),
        Metric("nonvisible_precision", (_HIT, _FALSE), "higher", "", nonvisible_precision),
        Metric("nonvisible_recall", (_HIT, _MISS), "higher", "", nonvisible_recall),
        Metric("nonvisible_f1", (_HIT, _FALSE, _MISS), "higher", "", nonvisible_f1),
        Metric("lpips", ("lpips",), "lower", "", lpips),
        Metric("box_iou", ("box_iou",), "higher", "", box_iou),
        Metric("box_recall", ("box_hit", "box_miss"), "higher", "", box_recall),
        Metric("box_precision", ("box_hit", "box_false"), "higher", "", box_precision),
        Metric("collision_ap", ("collision_positives", "collision_negatives"), "higher", "", collision_ap, "ranked"),
        Metric("collision_base_rate", ("collision_base",), "neither", "", collision_base_rate, "summed"),
        *(Metric(f"collision_f1_{t}", _EVENTS[t], "higher", "", collision_f1, "summed") for t in TOLERANCES),
        Metric("collision_f1_always", ("collision_base",), "neither", "", collision_f1_always, "summed"),
    )
}


def measured(state: State) -> tuple[str, ...]:
    """The metrics for which ``state`` holds every statistic, counted at least once, in the order of `METRICS`."""
    held = {name for name, s in state.statistics.items() if s.count.any()}
    held |= {name for name, counts in state.histograms.items() if counts.any()}
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


def _counts(state: State, metric: str, name: str) -> np.ndarray:
    """What two states of the same windows have in common, per video."""
    if METRICS[metric].overall == "ranked":
        return _histogram(state, metric, name).sum(axis=1)
    return _statistic(state, metric, name).count


_Values = tuple[Float64[np.ndarray, "_"], Float64[np.ndarray, "_ y"]]


def _values(state: State, name: str, weights: Float64[np.ndarray, "r v"] | None = None) -> _Values:
    """The metric over all steps, and per step, under each row of weights (default: every video once)."""
    metric = METRICS[name]
    weights = np.ones((1, len(state.videos))) if weights is None else weights
    if metric.overall == "ranked":
        histograms = [weights @ _histogram(state, name, h) for h in metric.statistics]
        return metric.compute(*histograms), np.empty((len(weights), 0))
    sums = [(weights @ s.total, weights @ s.count) for s in (_statistic(state, name, n) for n in metric.statistics)]
    steps = metric.compute(*(_ratio(total, count) for total, count in sums))
    if metric.overall == "mean":
        return _mean(steps), steps
    means = (_ratio(total.sum(axis=1), count.sum(axis=1)) for total, count in sums)
    return metric.compute(*means), steps


def _summary(values: _Values, drawn: _Values) -> Score:
    (overall, steps), (overall_drawn, steps_drawn) = values, drawn
    by_step = tuple(_estimate(steps[0, k], steps_drawn[:, k]) for k in range(steps.shape[1]))
    return Score(_estimate(overall[0], overall_drawn), by_step)


def _mean(values: Float64[np.ndarray, "r y"]) -> Float64[np.ndarray, " r"]:
    """Over the steps at which the metric is defined."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(axis=1), known.sum(axis=1).astype(np.float64))


def _estimate(value: np.float64, drawn: Float64[np.ndarray, " r"]) -> Estimate:
    known = drawn[~np.isnan(drawn)]
    if len(known) == 0 or np.isnan(value):
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.quantile(known, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))
