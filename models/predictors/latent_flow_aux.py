"""Approach 3: a convolutional network predicts the next latent; a flow head helps it learn, and is then thrown away.

A trunk reads the present latent and the changes that led to it; its features give the next latent
(`models.dynamic_filter.NextLatentHead`), recursively. In training only, a flow head reads the features of the present
latent and those of the next one, and must say the teacher's flow between the two. The next latent it is shown is the
*predicted* one, as the trunk sees it, not the true one: the gradient of the flow's error then passes through the
trunk *and* through the prediction, which has to hold objects that are still sharp enough, and in the right place, for
their motion to be read off. From true latents it would shape the features alone.

The rollout neither calls the flow head nor reads flow; ``flow: 0.0`` builds none, for comparison.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from data.clips import Clip, Context
from data.resize import resize_flow
from models.augmentation import GuiseOptions, latent_targets
from models.autoencoder import Vaes, encode_windows
from models.blocks import ResidualBlock, Trunk, motion_stack, zero_conv
from models.dynamic_filter import NextLatentHead
from models.losses import flow_error, relative_latent_error
from models.predictor import Predictor, Rollout

Latent = Float[Tensor, "b z hz wz"]
Features = Float[Tensor, "b c hz wz"]


class Options(GuiseOptions):
    """Architecture and loss weights."""

    width: int = Field(default=64, ge=8, description="channels of the trunk")
    features: int = Field(default=24, ge=8, description="channels that the heads see, on the latent grid")
    blocks: int = Field(default=6, ge=1, description="residual blocks of the trunk")
    coarsen: int = Field(default=4, ge=1, description="the trunk's grid is this much coarser than the latents'")
    past: int = Field(default=3, ge=2, description="latents that the trunk sees, the present one included")
    kernel: int = Field(default=9, ge=0, description="side of the filters that move content, in cells; 0: none")
    flow: float = Field(
        default=0.1, ge=0, description="weight of the flow's end-point error, in cells; 0: no flow head, no flow read"
    )


class AuxiliaryFlowHead(nn.Module):
    """Backward flow, in cells, between two latents from the features of both; zero at the start."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2 * features, features, 3, padding=1)
        self.block = ResidualBlock(features, dilation=2)
        self.out = zero_conv(features, 2)

    def forward(self, present: Features, following: Features) -> Float[Tensor, "b 2 hz wz"]:
        hidden = self.block(self.enter(torch.cat([present, following], dim=1)))
        return self.out(F.silu(hidden)).float()


class LatentFlowAux(Predictor):
    """See the module. Latents are normalised."""

    borrowed = frozenset({"vae"})
    needs_vaes = frozenset({"frame"})

    def __init__(self, options: Options, *, vaes: Vaes, height: int, width: int, context: int) -> None:
        super().__init__(height=height, width=width, context=context)
        self.options = options
        self.needs = frozenset({"frames" if options.flip else "latents"} | ({"flow_bwd"} if options.flow else set()))
        self.vae = vaes["frame"].eval().requires_grad_(False)
        z, cell = self.vae.latent_channels, self.vae.stride * options.coarsen
        for side, pixels in (("height", height), ("width", width)):
            if pixels % cell:
                raise ValueError(
                    f"{side} {pixels} must be divisible by the VAE's stride {self.vae.stride} "
                    f"times coarsen={options.coarsen}"
                )
        self.trunk = Trunk(
            z * options.past + 2, options.width, options.features, blocks=options.blocks, coarsen=options.coarsen
        )
        self.head = NextLatentHead(options.features, z, kernel=options.kernel)
        self.flow_head = AuxiliaryFlowHead(options.features) if options.flow else None

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Errors of the unrolled latents, relative to copying, and of the flow between them; trained through."""
        batch = latent_targets(self.vae, batch, self.options)
        latents, x, gain = batch.require("latents"), self.context, self.vae.latent_gain
        observed = list(latents[:, :x].unbind(1))
        predicted, features = self.unroll(observed, latents.shape[1] - x)
        errors = [
            relative_latent_error(latent, latents[:, k], latents[:, x - 1], gain)
            for k, latent in enumerate(predicted, start=x)
        ]
        loss = torch.stack(errors).mean()
        logs = {"latent": loss.detach()}
        if self.flow_head is not None:
            features.append(self._features([*observed, *predicted]))
            present, following = torch.cat(features[:-1]), torch.cat(features[1:])
            teacher = rearrange(batch.require("flow_bwd")[:, x - 1 :], "b t c h w -> (t b) c h w")
            teacher = resize_flow(teacher.float(), *latents.shape[-2:])
            flow = flow_error(self.flow_head(present, following), teacher)
            loss = loss + self.options.flow * flow
            logs["flow"] = flow.detach()
        return loss, logs

    def unroll(self, observed: list[Latent], horizon: int) -> tuple[list[Latent], list[Features]]:
        """``horizon`` predicted latents after the observed ones, and the features each was predicted from."""
        known, features = list(observed), []
        for _ in range(horizon):
            features.append(self._features(known))
            known.append(self.head(features[-1], known[-1]))
        return known[len(observed) :], features

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """Encode the observed frames, step in latent space, decode. Nothing is drawn from ``generator``."""
        observed = list(encode_windows(self.vae, context.frames).unbind(1))
        predicted, _ = self.unroll(observed, horizon)
        return Rollout(frames=torch.stack([self.vae.to_frames(latent) for latent in predicted], 1))

    def _features(self, known: list[Latent]) -> Features:
        return self.trunk(motion_stack(known, self.options.past))
