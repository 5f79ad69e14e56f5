"""Metrics made from mean statistics, with bootstrap intervals over videos.

Every metric is a function of the means of `models.statistics`, step by step; its docstring gives definition, source,
range and direction. *Overall* is the mean over steps of the metric, so every step of the horizon weighs the same
(SlotFormer and PFI average in this way). Undefined values (nothing moved, no foreground, no flow head) are NaN.

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
from models.statistics import FRAME_PSNR_CAP_DB, State, Statistic

Means = Float[np.ndarray, "*rows y"]


@dataclass(frozen=True)
class Metric:
    """A function of the means of ``statistics``; ``unit`` is empty for pure numbers."""

    name: str
    statistics: tuple[str, ...]
    better: Literal["higher", "lower"]
    unit: str
    compute: Callable[..., np.ndarray]

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
    """A metric per step of the horizon (``steps[0]`` is the first predicted frame) and its mean over steps."""

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


def _ratio(a: Means, b: Means) -> Means:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0)


_PAIR, _FG_PAIR = ("squared_error", "squared_error_copy"), ("fg_squared_error", "fg_squared_error_copy")
_HIT, _FALSE, _MISS = "nonvisible_hit", "nonvisible_false", "nonvisible_miss"

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
    )
}


def measured(state: State) -> tuple[str, ...]:
    """The metrics for which ``state`` holds every statistic, counted at least once, in the order of `METRICS`."""
    held = {name for name, s in state.statistics.items() if s.count.any()}
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
        first, second = _statistic(a, name, statistic), _statistic(b, name, statistic)
        if not np.array_equal(first.count, second.count):
            raise ValueError(
                f"a paired difference needs the same windows: {statistic!r} counts {first.count.sum():.0f} in the "
                f"first and {second.count.sum():.0f} in the second"
            )
    weights = _draws(len(a.videos), rng, resamples)
    return _summary(_values(a, name) - _values(b, name), _values(a, name, weights) - _values(b, name, weights))


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


def _values(state: State, name: str, weights: Float64[np.ndarray, "r v"] | None = None) -> Float64[np.ndarray, "r y"]:
    """The metric per step under each row of weights (default: every video once)."""
    metric = METRICS[name]
    weights = np.ones((1, len(state.videos))) if weights is None else weights
    parts = [_statistic(state, name, s) for s in metric.statistics]
    means = [_ratio(weights @ s.total, weights @ s.count) for s in parts]
    return metric.compute(*means)


def _summary(values: Float64[np.ndarray, "1 y"], drawn: Float64[np.ndarray, "r y"]) -> Score:
    steps = tuple(_estimate(values[0, k], drawn[:, k]) for k in range(values.shape[1]))
    return Score(_estimate(_mean(values)[0], _mean(drawn)), steps)


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
