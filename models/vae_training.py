"""What the frame VAE minimises, and its training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from data.errors import EmptyError
from models.autoencoder import LatentVAE
from models.losses import charbonnier, foreground_weight, weighted_mean
from models.training import Progress, TrainingOptions, TrainResult, optimise
from models.warp import backward_warp, resize_flow


class VaeOptions(TrainingOptions):
    """How to train a VAE; the horizon's fields are not used."""

    steps: int = Field(default=200, ge=1, description="optimiser steps")
    kl: float = Field(default=1e-5, ge=0, description="weight of the KL divergence per latent value")
    foreground: float = Field(default=20.0, ge=0, description="extra weight of moving objects over background")
    equivariance: float = Field(default=1.0, ge=0, description="weight of: a warped latent decodes to the warped image")
    largest_shift: float = Field(default=6.0, ge=0, description="pixels, of the random warps that teach equivariance")


class VaeObjective(nn.Module):
    """``forward(x) -> (loss, logs)``: Charbonnier reconstruction + KL + equivariance under sub-cell motion."""

    def __init__(self, vae: LatentVAE, options: VaeOptions, generator: torch.Generator) -> None:
        super().__init__()
        self.vae, self.options, self.generator = vae, options, generator

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        posterior = self.vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=self.generator).to(x.device)
        z = posterior.mean + posterior.std * noise
        weight = foreground_weight(x, self.options.foreground)
        terms = {"reconstruction": self._distance(self.vae.decode(z).sample, x, weight)}
        terms["kl"] = posterior.kl().mean() / posterior.mean[0].numel()
        loss = terms["reconstruction"] + self.options.kl * terms["kl"]
        if self.options.equivariance > 0:
            flow_bwd = random_flow(x, self.options.largest_shift, self.generator)
            on_grid = resize_flow(flow_bwd, *z.shape[-2:])
            decoded = self.vae.decode(backward_warp(z, on_grid)).sample
            terms["equivariance"] = self._distance(decoded, backward_warp(x, flow_bwd), backward_warp(weight, flow_bwd))
            loss = loss + self.options.equivariance * terms["equivariance"]
        return loss, terms

    def _distance(
        self, a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"], weight: Float[Tensor, "b 1 h w"]
    ) -> Float[Tensor, ""]:
        return weighted_mean(charbonnier((a - b) / self.vae.scale), weight)


def random_flow(like: Float[Tensor, "b c h w"], largest: float, generator: torch.Generator) -> Float[Tensor, "b 2 h w"]:
    """Backward flow in pixels, uniform in ``[-largest, largest]`` on a 3x4 grid and bilinear in between."""
    b, _, h, w = like.shape
    coarse = (2 * torch.rand(b, 2, 3, 4, generator=generator) - 1) * largest
    return F.interpolate(coarse.to(like.device, like.dtype), (h, w), mode="bilinear", align_corners=True)


def train_vae(
    vae: LatentVAE,
    batches: Iterator[Float[Tensor, "b c h w"]],
    options: VaeOptions,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    basis_batches: int = 8,
) -> TrainResult:
    """Fit the block transform to the first batches, then train. Calibrate the statistics afterwards.

    ``batches`` holds images in the VAE's own units; each batch should mix videos, because objects are found as what
    differs from the batch's median picture. ``generator`` (on the CPU) is all the randomness there is. Raises
    EmptyError when the batches run out, NonFiniteError before an update that is not finite.
    """
    first = list(islice(batches, basis_batches))
    if not first:
        raise EmptyError("no images to train the VAE with", remedy="check the training split of the store")
    vae.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # diffusers hides it
    vae.train()
    vae.fit_basis(torch.cat(first).to(device))

    def prepare(x: Tensor, place: float | int) -> tuple[Tensor, dict[str, float]]:
        return x.to(device).contiguous(memory_format=torch.channels_last), {}

    objective = VaeObjective(vae, options, generator)
    result = optimise(
        objective, dict(objective.named_parameters()), chain(first, batches), prepare, options,
        device=device, progress=progress,
    )  # fmt: skip
    vae.eval()
    return result


def psnr(prediction: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """``-10 log10 MSE`` of each image, for values in [0, 1]."""
    return -10 * (prediction - truth).square().mean((1, 2, 3)).clamp_min(1e-12).log10()
