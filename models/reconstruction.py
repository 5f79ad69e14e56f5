"""How well an autoencoder gives back what it was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from models.latent_vae import LatentVAE

Quality = dict[str, float | None]
"""Numbers by name; None where there was nothing to measure it on."""


def psnr(prediction: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """``-10 log10 MSE`` of each image, for values in [0, 1]."""
    return -10 * (prediction - truth).square().mean((1, 2, 3)).clamp_min(1e-12).log10()


def frame_quality(decoded: Float[Tensor, "n 3 h w"], frames: Float[Tensor, "n 3 h w"], differs: float = 0.1) -> Quality:
    """``psnr``: mean of the images'; ``psnr_foreground``: of all pixels that stand out of the median picture together.

    The camera never moves, so the median over ``frames`` is the empty scene; a pixel stands out where any channel
    differs from it by more than ``differs``.
    """
    outstanding = ((frames - frames.median(dim=0).values).abs().amax(1) > differs)[:, None].expand_as(frames)
    error = _mean_where((decoded - frames).square(), outstanding)
    return {
        "psnr": float(psnr(decoded, frames).mean()),
        "psnr_foreground": None if error is None else -10 * math.log10(max(error, 1e-12)),
    }


def flow_quality(decoded: Float[Tensor, "n 2 h w"], flow: Float[Tensor, "n 2 h w"], moving: float = 0.5) -> Quality:
    """End-point error in pixels: ``epe`` over all of them, ``epe_moving`` where ``flow`` is longer than ``moving``."""
    error = (decoded - flow).norm(dim=1)
    return {"epe": float(error.mean()), "epe_moving": _mean_where(error, flow.norm(dim=1) > moving)}


QUALITY: Mapping[str, Callable[[Tensor, Tensor], Quality]] = {"frame": frame_quality, "flow": flow_quality}
"""What is encoded -> how its reconstruction is judged."""


@torch.inference_mode()
def reconstruct(vae: LatentVAE, images: Float[Tensor, "n c h w"], batch: int = 16) -> Float[Tensor, "n c h w"]:
    """Through the latents and back, on the VAE's device; not clamped."""
    device = vae.latent_mean.device
    return torch.cat([vae.from_latents(vae.to_latents(part.to(device))).cpu() for part in images.split(batch)])


def _mean_where(values: Float[Tensor, "*shape"], where: Tensor) -> float | None:
    chosen = values[where]
    return float(chosen.mean()) if len(chosen) else None
