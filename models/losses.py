"""Loss terms as plain functions of tensors; each returns one raw, unweighted number.

Weights are the caller's affair: a predictor adds these terms with its own options and logs them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.warp import speed

Norm = Literal["l1", "l2"]

# Windows in which nothing moves have nothing to be relative to. In units of `latent_error`.
COPYING_FLOOR = 0.005


def weigh(terms: Mapping[str, Tensor], options: object) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The loss, each term times the field of ``options`` that has its name, and the raw terms for the logs."""
    loss = torch.stack([getattr(options, name) * term for name, term in terms.items()]).sum()
    return loss, {name: term.detach() for name, term in terms.items()}


def charbonnier(difference: Float[Tensor, "*shape"], eps: float = 1e-3) -> Float[Tensor, "*shape"]:
    """``sqrt(d^2 + eps^2) - eps``: |d| that is smooth at zero (Charbonnier et al. 1994), elementwise."""
    return (difference.float().square() + eps**2).sqrt() - eps


def weighted_mean(value: Float[Tensor, "b c h w"], weight: Float[Tensor, "b #c h w"]) -> Float[Tensor, ""]:
    """Mean of ``value`` under non-negative weights; 0 where every weight is 0 (the gradient is then 0 too)."""
    weight = weight.expand_as(value)
    return (value * weight).sum() / weight.sum().clamp_min(1e-6)


def latent_error(
    predicted: Float[Tensor, "b z h w"],
    target: Float[Tensor, "b z h w"],
    gain: Float[Tensor, " z"],
    *,
    norm: Norm = "l2",
) -> Float[Tensor, "b 1 h w"]:
    """Error of normalised latents per cell, squared or (``l1``) absolute, each channel counted as much as it shows.

    ``gain`` is the decoder's root-mean-square change in [0, 1] pixels per unit of each channel
    (`LatentVAE.latent_gain`). Unweighted, the many faint channels of texture would drown the few that matter.
    The channels' weights have mean 1, so the squared error of independent unit noise is 2.
    """
    if norm == "l1":
        return ((predicted.float() - target.float()).abs() * (gain / gain.mean())[:, None, None]).mean(1, keepdim=True)
    weight = gain.square() / gain.square().mean()
    return ((predicted.float() - target.float()).square() * weight[:, None, None]).mean(1, keepdim=True)


def copying_error(
    last: Float[Tensor, "b z h w"],
    target: Float[Tensor, "b z h w"],
    gain: Float[Tensor, " z"],
    *,
    norm: Norm = "l2",
) -> Float[Tensor, ""]:
    """Mean `latent_error` of copying the last observed latent, plus a small floor: what errors are divided by."""
    return latent_error(last, target, gain, norm=norm).mean() + COPYING_FLOOR


def relative_latent_error(
    predicted: Float[Tensor, "b z h w"],
    target: Float[Tensor, "b z h w"],
    last: Float[Tensor, "b z h w"],
    gain: Float[Tensor, " z"],
    *,
    norm: Norm = "l2",
) -> Float[Tensor, ""]:
    """Mean `latent_error` as a share of that of copying the ``last`` observed latent, so that near and far frames,
    and batches with much and with little motion, count alike: 1 (less the floor's share) is copying, 0 is perfect."""
    return latent_error(predicted, target, gain, norm=norm).mean() / copying_error(last, target, gain, norm=norm)


def flow_error(
    flow_bwd: Float[Tensor, "b 2 h w"],
    teacher: Float[Tensor, "b 2 h w"],
    *,
    moving: float = 0.25,
    background: float = 0.05,
) -> Float[Tensor, ""]:
    """End-point error (smoothed by Charbonnier, in cells of the grid), mean over cells weighted by motion.

    Cells where the teacher's flow is longer than ``moving`` cells weigh 1, the rest ``background``: nine tenths of
    every picture stand still, and an unweighted mean is best served by predicting no motion at all.
    """
    weight = torch.where(speed(teacher.float()) > moving, 1.0, background)
    squared = (flow_bwd.float() - teacher.float()).square().sum(1, keepdim=True)
    return weighted_mean((squared + 1e-4).sqrt() - 1e-2, weight)


def visibility_error(logits: Float[Tensor, "b 1 h w"], visible: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Cross-entropy plus the Dice loss of the *non-visible* class (Milletari et al. 2016), as usual for rare classes.

    About 1 % of cells are not visible, so by cross-entropy alone 'all visible' is nearly perfect; its Dice loss is
    the worst there is, 1. Soft targets in [0, 1] count by how decided they are, ``|2 visible - 1|``, for the class
    they lean to: a teacher's visibility stays a little below 1 everywhere, and that sum would drown the rare class.
    """
    seen = (2 * visible.float() - 1).clamp_min(0)
    hidden = (1 - 2 * visible.float()).clamp_min(0)
    logits = logits.float()
    entropy = (F.softplus(-logits) * seen + F.softplus(logits) * hidden).mean()
    guess = torch.sigmoid(-logits)
    # One cell of slack, so that a batch without hidden cells asks for none.
    agreement = 2 * (guess * hidden).sum() + 1
    dice = 1 - agreement / ((guess * (seen + hidden)).sum() + hidden.sum() + 1)
    return entropy + dice


def foreground_weight(pictures: Float[Tensor, "b c h w"], strength: float) -> Float[Tensor, "b 1 h w"]:
    """1 on the background, up to ``1 + strength`` on objects: how far a pixel is from the batch's median picture.

    The camera never moves and objects are small, so the median over pictures of different videos is the empty
    scene. The deviation is counted in standard deviations of the pictures and saturates (tanh).
    """
    empty = pictures.median(dim=0, keepdim=True).values
    deviation = (pictures - empty).abs().amax(1, keepdim=True) / pictures.std().clamp_min(1e-6)
    return 1 + strength * torch.tanh(deviation)


def motion_weight(flow: Float[Tensor, "b 2 h w"], strength: float, *, moving: float = 0.25) -> Float[Tensor, "b 1 h w"]:
    """1 where ``flow`` is at most ``moving`` pixels long, ``1 + strength`` where it is longer."""
    return 1 + strength * (speed(flow) > moving)
