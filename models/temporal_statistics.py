"""Statistics of how frames follow one another: steadiness of what is seen, smoothness of what moves.

Consistency and smoothness do not compare a frame with the true one of its step, so a frozen prediction scores well:
read them beside the same figure of the truth (``..._true``), which is what to come close to. Like the statistics of
`models.statistics` they are sums and counts per (window, step) that add up exactly. Step 1 follows the last observed
frame.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from data.picture import to_uint8
from models.flow_teachers import DisTeacher
from models.statistics import Statistic, frames_before, in_chunks, statistic_of
from models.warp import backward_warp

Summary = Callable[[Tensor], Tensor]
"""Features (n, d) of n pictures (n, 3, h, w) in [0, 1]."""


def consistency_statistics(
    summary: Summary,
    name: str,
    prediction: Float[Tensor, "b y 3 h w"],
    truth: Float[Tensor, "b y 3 h w"],
    last: Float[Tensor, "b 3 h w"],
) -> dict[str, Statistic]:
    """``NAME`` and ``NAME_true``: half the cosine of a frame's features with those of the last observed frame, and
    half of that with those of the frame before it, summed over frames (VBench, Huang et al. 2024)."""
    b, y = truth.shape[:2]
    first = torch.nn.functional.normalize(summary(last).double(), dim=1)[:, None]
    out = {}
    for suffix, frames in (("", prediction), ("_true", truth)):
        features = in_chunks(summary, frames.flatten(0, 1)).double().unflatten(0, (b, y))
        features = torch.nn.functional.normalize(features, dim=2)
        before = torch.cat([first, features[:, :-1]], dim=1)
        values = ((features * first).sum(2) + (features * before).sum(2)) / 2
        out[name + suffix] = statistic_of(values, torch.ones_like(values))
    return out


def smoothness_statistics(
    prediction: Float[Tensor, "b y 3 h w"], truth: Float[Tensor, "b y 3 h w"], last: Float[Tensor, "b 3 h w"]
) -> dict[str, Statistic]:
    """``motion_smoothness`` and ``motion_smoothness_true``: 1 - |frame - the one interpolated between its neighbours|,
    mean over pixels and channels, summed over frames; the last step has no neighbour behind it and counts 0.

    As in VBench, with another interpolator, which needs no weights: both neighbours warped half way along the optical
    flow between them (OpenCV's DIS) and averaged, instead of AMT.
    """
    search = DisTeacher("fast")
    out = {}
    for suffix, frames in (("", prediction), ("_true", truth)):
        films = torch.cat([last[:, None], frames], dim=1)
        values = torch.zeros(frames.shape[:2], dtype=torch.float64)
        counts = torch.zeros_like(values)
        for row, film in enumerate(films.float().cpu()):
            for phase in (0, 1):
                # Every other frame: its consecutive pairs are the neighbours of the frames between them.
                around, between = film[phase::2], film[phase + 1 :: 2]
                pairs = len(around) - 1
                if pairs < 1:
                    continue
                flow = search(torch.from_numpy(to_uint8(around.numpy())))
                guess = (
                    backward_warp(around[:-1], flow.flow_bwd / 2) + backward_warp(around[1:], flow.flow_fwd / 2)
                ) / 2
                steps = torch.arange(phase, phase + 2 * pairs, 2)
                values[row, steps] = 1 - (guess - between[:pairs]).abs().double().mean((1, 2, 3))
                counts[row, steps] = 1
        out[f"motion_smoothness{suffix}"] = statistic_of(values, counts)
    return out


def perceptual_statistics(
    distance: Callable[[Tensor, Tensor], Tensor],
    prediction: Float[Tensor, "b y 3 h w"],
    truth: Float[Tensor, "b y 3 h w"],
    last: Float[Tensor, "b 3 h w"],
) -> dict[str, Statistic]:
    """``lpips``: ``distance(a, b)``, one number for each of n pairs of pictures, as a mean over frames. ``tlpips``: how
    much the distance of a frame to the one before it differs from the true frames' (tLP of Chu et al. 2020)."""

    def apart(a: Float[Tensor, "b y 3 h w"], b: Float[Tensor, "b y 3 h w"]) -> Float[Tensor, "b y"]:
        return in_chunks(distance, a.flatten(0, 1), b.flatten(0, 1)).double().unflatten(0, a.shape[:2])

    change = apart(frames_before(last, prediction), prediction) - apart(frames_before(last, truth), truth)
    values = {"lpips": apart(prediction, truth), "tlpips": change.abs()}
    return {name: statistic_of(value, torch.ones_like(value)) for name, value in values.items()}
