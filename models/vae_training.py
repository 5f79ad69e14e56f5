"""What the autoencoders minimise, and their training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain, islice

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from data.errors import EmptyError
from models.discriminator import Adversary
from models.latent_vae import LatentVAE
from models.losses import charbonnier, foreground_weight, motion_weight, weighted_mean
from models.perceptual import Perceptual
from models.training import Progress, TrainingOptions, TrainResult, optimise
from models.warp import backward_warp, resize_flow


class FlowVaeOptions(TrainingOptions):
    """How to train the flow VAE; the horizon's fields are not used."""

    steps: int = Field(default=200, ge=0, description="optimiser steps; 0 takes the pretrained weights as they are")
    kl: float = Field(default=1e-5, ge=0, description="weight of the KL divergence per latent value")
    foreground: float = Field(default=20.0, ge=0, description="extra weight of what moves over background")


class VaeOptions(FlowVaeOptions):
    """How to train the frame VAE: with terms that make no sense for flow, whose vectors change when they are moved."""

    equivariance: float = Field(default=1.0, ge=0, description="weight of: a warped latent decodes to the warped image")
    largest_shift: float = Field(default=6.0, ge=0, description="pixels, of the random warps that teach equivariance")
    perceptual: float = Field(default=0.0, ge=0, description="weight of LPIPS")
    perceptual_weights: str | None = Field(default=None, description="file with the state dict of LPIPS on SqueezeNet")
    adversarial: float = Field(default=0.0, ge=0, description="weight of the discriminator's objection")
    adversarial_start: int = Field(default=0, ge=0, description="steps before the discriminator has a say")

    @model_validator(mode="after")
    def _check(self) -> VaeOptions:
        if self.perceptual > 0 and not self.perceptual_weights:
            raise ValueError("perceptual is above 0 and perceptual_weights names no file")
        return self


OPTIONS: Mapping[str, type[FlowVaeOptions]] = {"frame": VaeOptions, "flow": FlowVaeOptions}
"""What is encoded -> how its VAE may be trained."""

Term = tuple[float, Float[Tensor, ""]]
"""A weight, and what it is the weight of."""


class VaeObjective(nn.Module, ABC):
    """``forward(x) -> (loss, logs)``: Charbonnier reconstruction, more where it matters, + KL + terms of subclasses."""

    def __init__(self, vae: LatentVAE, options: FlowVaeOptions, generator: torch.Generator) -> None:
        super().__init__()
        self.vae, self.kl, self.foreground, self.generator = vae, options.kl, options.foreground, generator

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        posterior = self.vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=self.generator).to(x.device)
        z = posterior.mean + posterior.std * noise
        weight, decoded = self.weigh(x), self.vae.decode(z).sample
        terms = {"reconstruction": self.distance(decoded, x, weight)}
        terms["kl"] = posterior.kl().mean() / posterior.mean[0].numel()
        loss = terms["reconstruction"] + self.kl * terms["kl"]
        for name, (factor, term) in self.further(x, z, decoded, weight).items():
            loss = loss + factor * term
            terms[name] = term
        return loss, terms

    @abstractmethod
    def weigh(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        """How much each pixel counts."""

    def further(
        self,
        x: Float[Tensor, "b c h w"],
        z: Float[Tensor, "b z hz wz"],
        decoded: Float[Tensor, "b c h w"],
        weight: Float[Tensor, "b 1 h w"],
    ) -> dict[str, Term]:
        """Terms beyond reconstruction and KL, by name."""
        return {}

    def distance(
        self, a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"], weight: Float[Tensor, "b 1 h w"]
    ) -> Float[Tensor, ""]:
        return weighted_mean(charbonnier((a - b) / self.vae.scale), weight)


class FlowObjective(VaeObjective):
    """For optical flow: what moves counts more."""

    def weigh(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        return motion_weight(x, self.foreground)


class FrameObjective(VaeObjective):
    """For frames: objects count more; equivariance under sub-cell motion, LPIPS and a discriminator as options.

    The discriminator takes its step within ``forward`` in training mode, before it is asked: the training loop knows
    of nothing but the VAE's parameters. It is silent, and learns nothing, for the first ``adversarial_start`` steps.
    """

    def __init__(
        self, vae: LatentVAE, options: VaeOptions, generator: torch.Generator, perceptual: Perceptual | None = None
    ) -> None:
        super().__init__(vae, options, generator)
        if options.perceptual > 0 and perceptual is None:
            raise ValueError("options.perceptual is above 0 and no perceptual network was given")
        self.options, self.perceptual, self.steps = options, perceptual, 0
        self.adversary: Adversary | None = None
        if options.adversarial > 0:
            seed = int(torch.randint(2**31, (), generator=generator))
            self.adversary = Adversary(learning_rate=options.learning_rate, seed=seed, device=vae.latent_mean.device)

    def weigh(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        return foreground_weight(x, self.foreground)

    def further(
        self,
        x: Float[Tensor, "b c h w"],
        z: Float[Tensor, "b z hz wz"],
        decoded: Float[Tensor, "b c h w"],
        weight: Float[Tensor, "b 1 h w"],
    ) -> dict[str, Term]:
        terms: dict[str, Term] = {}
        if self.options.equivariance > 0:
            flow_bwd = random_flow(x, self.options.largest_shift, self.generator)
            moved = self.vae.decode(backward_warp(z, resize_flow(flow_bwd, *z.shape[-2:]))).sample
            error = self.distance(moved, backward_warp(x, flow_bwd), backward_warp(weight, flow_bwd))
            terms["equivariance"] = (self.options.equivariance, error)
        if self.options.perceptual > 0 and self.perceptual is not None:
            terms["perceptual"] = (self.options.perceptual, self.perceptual(decoded, x).mean())
        if self.adversary is not None:
            terms |= self._adversarial(self.adversary, x, decoded)
        return terms

    def _adversarial(
        self, adversary: Adversary, x: Float[Tensor, "b c h w"], decoded: Float[Tensor, "b c h w"]
    ) -> dict[str, Term]:
        silent = self.steps < self.options.adversarial_start
        if self.training:
            self.steps += 1
        if silent:  # curves have a value for every step
            nothing = decoded.new_zeros(())
            return {"adversarial": (0.0, nothing), "discriminator": (0.0, nothing)}
        learnt = adversary.learn(x, decoded) if self.training else decoded.new_zeros(())
        return {
            "adversarial": (self.options.adversarial, adversary.object_to(decoded)),
            "discriminator": (0.0, learnt),
        }


def random_flow(like: Float[Tensor, "b c h w"], largest: float, generator: torch.Generator) -> Float[Tensor, "b 2 h w"]:
    """Backward flow in pixels, uniform in ``[-largest, largest]`` on a 3x4 grid and bilinear in between."""
    b, _, h, w = like.shape
    coarse = (2 * torch.rand(b, 2, 3, 4, generator=generator) - 1) * largest
    return F.interpolate(coarse.to(like.device, like.dtype), (h, w), mode="bilinear", align_corners=True)


def train_vae(
    vae: LatentVAE,
    batches: Iterator[Float[Tensor, "b c h w"]],
    options: FlowVaeOptions,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    basis_batches: int = 8,
    pretrained: bool = False,
    perceptual: Perceptual | None = None,
) -> TrainResult:
    """Fit the block transform to the first batches, then train. Calibrate the statistics afterwards.

    ``batches`` holds images in the VAE's own units; each batch should mix videos, because objects are found as what
    differs from the batch's median picture. `VaeOptions` make it a frame VAE, `FlowVaeOptions` a flow VAE. A
    ``pretrained`` one starts from its own weights. ``generator`` (on the CPU) is all the randomness there is. Raises
    EmptyError when the batches run out, NonFiniteError before an update that is not finite.
    """
    first = list(islice(batches, basis_batches))
    if not first:
        raise EmptyError("no images to train the VAE with", remedy="check the training split of the store")
    vae.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # diffusers hides it
    vae.train().requires_grad_(True)
    if not pretrained:
        vae.fit_basis(torch.cat(first).to(device))

    def prepare(x: Tensor, place: float | int) -> tuple[Tensor, dict[str, float]]:
        return x.to(device).contiguous(memory_format=torch.channels_last), {}

    if isinstance(options, VaeOptions):
        objective = FrameObjective(vae, options, generator, perceptual.to(device) if perceptual else None)
    else:
        objective = FlowObjective(vae, options, generator)
    parameters = {f"vae.{name}": parameter for name, parameter in vae.named_parameters()}
    result = optimise(
        objective, parameters, chain(first, batches), prepare, options, device=device, progress=progress
    )  # fmt: skip
    vae.eval()
    return result
