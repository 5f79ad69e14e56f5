"""What each metric is: a function of mean statistics, with source, range and direction in its docstring.

Every metric is a function of the means of `models.statistics`, step by step; its docstring gives definition, source,
range and direction. *Overall* is the mean over steps of the metric, so every step of the horizon weighs the same
(SlotFormer and PFI average in this way). Collisions are too rare for that: theirs is computed from the sums over all
steps, and average precision from all steps ranked together, so that it has no value per step. FVD and JEDi compare
whole films of all videos together: they have neither steps nor intervals. Undefined values (nothing moved, no
foreground, no flow head) are NaN.

Two figures are called PSNR in the literature (OpenSTL issue 191) and differ by tenths of a decibel:

- ``psnr``: of the mean squared error of all frames of that step; the headline figure here.
- ``psnr_frame``: the mean over frames of each frame's PSNR; what video prediction papers mostly report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float64

from models.distributions import frechet_distance, polynomial_discrepancy
from models.object_statistics import TOLERANCES
from models.statistics import FRAME_PSNR_CAP_DB, Moments

Means = Float[np.ndarray, "*rows y"]


@dataclass(frozen=True)
class Metric:
    """A function of the means of ``statistics``; ``unit`` is empty for pure numbers.

    ``overall`` says how its steps become one value: their mean, the metric of the statistics summed over the steps,
    or, where ``statistics`` names histograms, one ranking of everything, or, where it names moments, a distance of
    ``whole`` distributions. ``version`` travels with every result: raise it whenever the same films would score
    differently.
    """

    name: str
    statistics: tuple[str, ...]
    better: Literal["higher", "lower", "neither"]
    unit: str
    compute: Callable[..., Any]
    overall: Literal["mean", "summed", "ranked", "whole"] = "mean"
    version: int = 1

    @property
    def definition(self) -> str:
        """The docstring of the function as one paragraph, for tables of definitions."""
        return " ".join((self.compute.__doc__ or "").split())


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
    return 1 - ratio(squared_error, squared_error_copy)


def epe(mean_error: Means) -> Means:
    """Mean end-point error |flow - truth| in pixels over the named region (Baker et al. 2011). Range [0, inf);
    lower."""
    return mean_error


def nonvisible_precision(hit: Means, false: Means) -> Means:
    """Of the pixels called non-visible, the fraction that is. Range [0, 1]; higher. Undefined if none is called."""
    return ratio(hit, hit + false)


def nonvisible_recall(hit: Means, miss: Means) -> Means:
    """Of the non-visible pixels, the fraction called so. Range [0, 1]; higher. Undefined if there is none."""
    return ratio(hit, hit + miss)


def nonvisible_f1(hit: Means, false: Means, miss: Means) -> Means:
    """2 TP / (2 TP + FP + FN) of the non-visible class, pixels pooled. Range [0, 1]; higher. The rare class: calling
    everything visible scores 0 and not 0.98."""
    return ratio(2 * hit, 2 * hit + false + miss)


def lpips(lpips: Means) -> Means:
    """Mean over frames of LPIPS, the distance of deep features (Zhang et al. 2018; SqueezeNet, or the network that the
    protocol names). Range [0, inf), 0 is identical; lower. Blur costs more and small shifts less than in the squared
    error."""
    return lpips


def tlpips(tlpips: Means) -> Means:
    """Mean over frames of the difference, without sign, between LPIPS of a predicted frame to the one before it and
    LPIPS of the true frame to the one before it (tLP of Chu et al. 2020). Range [0, inf); lower. Flicker and freezing
    both cost."""
    return tlpips


def consistency(consistency: Means) -> Means:
    """Mean over frames of half the cosine of a frame's features to those of the last observed frame and half that to
    those of the frame before (VBench, Huang et al. 2024: subject with DINO, background with CLIP; here the class token
    of the encoder that is given). Range [-1, 1]; higher. A frozen film scores 1: compare it with the truth's."""
    return consistency


def consistency_of_truth(consistency: Means) -> Means:
    """The same figure of the true films: a property of the data, neither is better. Range [-1, 1]."""
    return consistency


def smoothness(smoothness: Means) -> Means:
    """1 - mean |frame - the one interpolated between its neighbours|, colours in [0, 1] (VBench, Huang et al. 2024,
    with optical flow of DIS instead of the network AMT). Range [0, 1]; higher. A frozen film scores 1: compare it with
    the truth's."""
    return smoothness


def smoothness_of_truth(smoothness: Means) -> Means:
    """The same figure of the true films: a property of the data, neither is better. Range [0, 1]."""
    return smoothness


def fvd(said: Moments, true: Moments) -> float:
    """Fréchet distance of the logits of I3D over predicted and true films, observed frames included (Unterthiner et
    al. 2018, weights and preprocessing of cd-fvd). Range [0, inf); lower. Biased upwards with few films."""
    return frechet_distance(said, true)


def jedi(said: Moments, true: Moments) -> float:
    """100 times the maximum mean discrepancy (polynomial kernel of degree 2) of V-JEPA features of predicted and true
    films, observed frames included (Luo et al. 2025). Range [0, inf); lower. Biased upwards with few films."""
    return 100 * polynomial_discrepancy(said, true)


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
    return ratio(hit, hit + miss)


def box_precision(hit: Means, false: Means) -> Means:
    """Of the slots with a presence of at least 0.5, the fraction matched to a present object with an IoU of at least
    0.5; matched anew at every step. Range [0, 1]; higher. Undefined if no slot is present."""
    return ratio(hit, hit + false)


def collision_ap(
    positives: Float64[np.ndarray, "r bins"], negatives: Float64[np.ndarray, "r bins"]
) -> Float64[np.ndarray, " r"]:
    """Average precision of the probability of a collision, all steps of all windows ranked together: the sum over
    thresholds of precision times the recall that each adds, without interpolation. Equal to a twentieth of a unit of
    log-odds is a tie. Range [0, 1]; higher. Ranking at random scores ``collision_base_rate``; undefined without a
    collision."""
    hit, said = (np.cumsum(counts[:, ::-1], axis=1) for counts in (positives, positives + negatives))
    precision = np.divide(hit, said, out=np.zeros_like(hit), where=said > 0)
    return ratio((precision * positives[:, ::-1]).sum(axis=1), hit[:, -1])


def collision_base_rate(base: Means) -> Means:
    """The fraction of steps with a collision: what ``collision_ap`` is by chance. A property of the data: neither is
    better. Range [0, 1]."""
    return base


def collision_f1(hit: Means, false: Means, miss: Means) -> Means:
    """2 TP / (2 TP + FP + FN) of collisions, predicted events (peaks of at least 0.5) and true ones matched one to one
    within 2 or 5 frames of the source video, counts summed over steps. Range [0, 1]; higher. Calling every step a
    collision scores ``collision_f1_always``."""
    return ratio(2 * hit, 2 * hit + false + miss)


def collision_f1_always(base: Means) -> Means:
    """2 r / (1 + r), r the ``collision_base_rate``: the ``collision_f1`` of calling every step a collision. A property
    of the data: neither is better. Range [0, 1]."""
    return ratio(2 * base, 1 + base)


def ratio(a: Means, b: Means) -> Means:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0)


CONSISTENCIES = ("subject_consistency", "background_consistency")
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
        Metric("tlpips", ("tlpips",), "lower", "", tlpips),
        Metric("motion_smoothness", ("motion_smoothness",), "higher", "", smoothness),
        Metric("motion_smoothness_true", ("motion_smoothness_true",), "neither", "", smoothness_of_truth),
        *(
            metric
            for name in CONSISTENCIES
            for metric in (
                Metric(name, (name,), "higher", "", consistency),
                Metric(f"{name}_true", (f"{name}_true",), "neither", "", consistency_of_truth),
            )
        ),
        Metric("fvd", ("fvd_said", "fvd_true"), "lower", "", fvd, "whole"),
        Metric("jedi", ("jedi_said", "jedi_true"), "lower", "", jedi, "whole"),
        Metric("box_iou", ("box_iou",), "higher", "", box_iou),
        Metric("box_recall", ("box_hit", "box_miss"), "higher", "", box_recall),
        Metric("box_precision", ("box_hit", "box_false"), "higher", "", box_precision),
        Metric("collision_ap", ("collision_positives", "collision_negatives"), "higher", "", collision_ap, "ranked"),
        Metric("collision_base_rate", ("collision_base",), "neither", "", collision_base_rate, "summed"),
        *(Metric(f"collision_f1_{t}", _EVENTS[t], "higher", "", collision_f1, "summed") for t in TOLERANCES),
        Metric("collision_f1_always", ("collision_base",), "neither", "", collision_f1_always, "summed"),
    )
}
