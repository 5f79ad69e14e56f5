"""Latents of many channels as pictures of three colours: their principal components."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

FULL_DEVIATIONS = 2.5
"""Standard deviations of a component that black and full colour stand for."""


def latent_colours(
    latents: Float[Tensor, "t z hz wz"],
) -> tuple[Float[Tensor, "t 3 hz wz"], Float64[Tensor, " 3"]]:
    """The first three principal components over all of ``latents`` as red, green and blue in [0, 1], and the share of
    the variance that each explains.

    Components come by descending variance, each with the sign that makes the largest of its weights positive, so that
    the same latents give the same picture. Middle grey is the mean. Where there are fewer than three, or one varies
    nowhere, its colour stays in the middle.
    """
    t, z, h, w = latents.shape
    values = latents.double().permute(0, 2, 3, 1).reshape(-1, z)
    centred = values - values.mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))  # ascending
    variances, axes = variances.flip(0).clamp_min(0)[:3], axes.flip(1)[:, :3]
    leading = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    components = centred @ (axes * leading.sign())
    total = centred.square().mean(0).sum().clamp_min(torch.finfo(torch.float64).tiny)
    colours, explained = torch.full((len(values), 3), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for k, variance in enumerate(variances):
        explained[k] = variance / total
        if explained[k] > 1e-12:
            colours[:, k] += components[:, k] / (2 * FULL_DEVIATIONS * variance.sqrt())
    return colours.clamp(0, 1).float().reshape(t, h, w, 3).permute(0, 3, 1, 2), explained
