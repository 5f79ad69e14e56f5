"""Approach 4: the next latent is the present one moved, masked and mended.

``next = warp(latent, flow) * mask + residual``, recursively. Three heads on one trunk give backward flow, visibility
and residual; the residual head sees the whole warped latent. They start at the identity (no correction of the
flow, mask near 1, residual 0): before training this predictor *is* `copy_last`, or, with ``motion_prior: teacher``,
`advect`, both in latent space; ``matching`` needs no teacher: it advects
along matches of the last two latents. The flow is a state that is carried along itself from step to step and
corrected by the flow head, so what has been stopped stays stopped.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from data.clips import Clip, Context
from models.augmentation import GuiseOptions, latent_targets
from models.autoencoder import Vaes, encode_windows
from models.blocks import Matching, Trunk, coordinates
from models.heads import FlowHead, OcclusionHead, ResidualHead
from models.losses import copying_error, flow_error, latent_error, visibility_error, weigh, weighted_mean
from models.predictor import Predictor, Rollout
from models.warp import advect_flow, backward_warp, resize_flow, speed

Latent = Float[Tensor, "b z hz wz"]


class Options(GuiseOptions):
    """Architecture and loss weights."""

    motion_prior: Literal["none", "matching", "teacher"] = Field(
        default="teacher",
        description="where the carried flow starts: at zero, at matches of the last two latents, at the teacher's",
    )
    width: int = Field(default=64, ge=8, description="channels of the trunk")
    features: int = Field(default=24, ge=8, description="channels that the heads see, on the latent grid")
    blocks: int = Field(default=6, ge=1, description="residual blocks of the trunk")
    coarsen: int = Field(default=4, ge=1, description="the trunk's grid is this much coarser than the latents'")
    past: int = Field(default=3, ge=2, description="latents that the trunk sees, the present one included")
    flow_stride: int = Field(default=2, ge=1, description="pixels per cell of the grid on which flow is carried along")
    matching: int = Field(default=4, ge=0, description="radius of the matches, in double cells; unused with a teacher")
    masked: bool = Field(default=True, description="an occlusion head masks the warped latent; else nothing does")
    mended: bool = Field(default=True, description="a residual head adds to the warped latent; else nothing does")
    latent: float = Field(default=1.0, ge=0, description="weight of the next latent's error relative to copying")
    flow: float = Field(default=0.03, ge=0, description="weight of the flow's end-point error against the teacher")
    mask: float = Field(default=0.3, ge=0, description="weight of the visibility's error")
    warped: float = Field(default=0.1, ge=0, description="weight of the same of the warped latent where it is visible")
    residual: float = Field(default=0.01, ge=0, description="weight of the residual's mean size")


@dataclass(frozen=True)
class Step:
    """One prediction: flow on its own grid in its own cells, the rest on the latent grid."""

    latent: Latent
    warped: Latent
    flow_bwd: Float[Tensor, "b 2 hf wf"]
    residual: Latent | None = None
    visible_logits: Float[Tensor, "b 1 hz wz"] | None = None


class LatentWarp(Predictor):
    """See the module. Latents are normalised, flow is carried on a grid of ``flow_stride`` pixels per cell."""

    borrowed = frozenset({"vae"})
    needs_vaes = frozenset({"frame"})

    def __init__(self, options: Options, *, vaes: Vaes, height: int, width: int, context: int) -> None:
        super().__init__(height=height, width=width, context=context)
        if options.motion_prior == "matching" and not options.matching:
            raise ValueError("motion_prior is matching and its radius, matching, is 0")
        if context < options.past:
            raise ValueError(f"context is {context}; it must hold past={options.past} latents")
        self.options = options
        self.needs = frozenset({"frames" if options.flip else "latents", "flow_bwd", "visible"})
        self.vae = vaes["frame"].eval().requires_grad_(False)
        z, stride = self.vae.latent_channels, self.vae.stride
        for side, pixels in (("height", height), ("width", width)):
            if pixels % (stride * options.coarsen) or pixels % options.flow_stride:
                raise ValueError(
                    f"{side} {pixels} must be divisible by the VAE's stride {stride} times coarsen={options.coarsen}, "
                    f"and by flow_stride={options.flow_stride}"
                )
        radius = 0 if options.motion_prior == "teacher" else options.matching
        self.matching = Matching(radius) if radius else None
        self.trunk = Trunk(
            z * options.past + (10 if self.matching else 7),
            options.width,
            options.features,
            blocks=options.blocks,
            coarsen=options.coarsen,
        )
        self.flow_head = FlowHead(options.features, cell=stride / options.flow_stride)
        self.occlusion_head = OcclusionHead(options.features, options.features) if options.masked else None
        self.residual_head = ResidualHead(options.features, z, options.features) if options.mended else None

    def step(self, past: list[Latent], flow_bwd: Float[Tensor, "b 2 hf wf"]) -> Step:
        """One step on: ``past`` from the oldest to the present latent, ``flow_bwd`` of the pair that ended there."""
        present = past[-1]
        grid = present.shape[-2:]
        prior = advect_flow(flow_bwd)
        on_grid = resize_flow(prior, *grid)
        arriving = backward_warp(present, on_grid)
        before = resize_flow(flow_bwd, *grid)
        seen = [arriving, *past[:-1][::-1], before]
        if self.matching is not None:
            seen.append(self.matching(present, past[-2], self.vae.latent_gain))
        moving = speed(on_grid)
        features = self.trunk(torch.cat([*seen, on_grid, moving, coordinates(present)], dim=1))
        corrected = self.flow_head(features, prior)
        after = resize_flow(corrected, *grid)
        warped = backward_warp(present, after)
        logits = self.occlusion_head(features, before, after.detach()) if self.occlusion_head else None
        residual = self.residual_head(features, warped) if self.residual_head else None
        latent = warped if logits is None else warped * torch.sigmoid(logits)
        latent = latent if residual is None else latent + residual
        return Step(latent, warped, corrected, residual, logits)

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Mean over the predicted frames of every term; the rollout is unrolled and trained through."""
        batch = latent_targets(self.vae, batch, self.options)
        latents, teacher, visible = (batch.require(name).float() for name in ("latents", "flow_bwd", "visible"))
        x = self.context
        steps = self.unroll([latents[:, k] for k in range(x)], teacher[:, x - 2], latents.shape[1] - x)
        grid, gain = latents.shape[-2:], self.vae.latent_gain
        terms: dict[str, list[Tensor]] = defaultdict(list)
        for k, step in enumerate(steps, start=x):
            true_visible = F.interpolate(visible[:, k - 1], grid, mode="area")
            copying = copying_error(latents[:, x - 1], latents[:, k], gain)
            terms["latent"].append(latent_error(step.latent, latents[:, k], gain).mean() / copying)
            terms["flow"].append(_flow_term(step, teacher[:, k - 1]))
            terms["warped"].append(self._warped_term(step, latents[:, k], true_visible) / copying)
            if step.visible_logits is not None:
                terms["mask"].append(visibility_error(step.visible_logits, true_visible))
            if step.residual is not None:
                terms["residual"].append(step.residual.abs().mean())
        return weigh({name: torch.stack(values).mean() for name, values in terms.items()}, self.options)

    def flow_parameters(self) -> dict[str, nn.Parameter]:
        """The flow head, for `models.adaptation`."""
        return dict(self.flow_head.named_parameters(prefix="flow_head"))

    def observed_loss(self, context: Context) -> Float[Tensor, ""]:
        """The first ``past`` observed latents predict the remaining ones: error of the warped latent relative to
        copying where it is visible, plus the flow's error against the teacher (in cells), mean over those frames.

        Raises ValueError where the context holds no more than ``past`` frames.
        """
        first, x = self.options.past, context.frames.shape[1]
        if x <= first:
            raise ValueError(f"{x} observed frames leave none to learn from: past={first} of them are the input")
        latents = encode_windows(self.vae, context.frames)
        steps = self.unroll([latents[:, k] for k in range(first)], context.flow_bwd[:, first - 2], x - first)
        grid, gain = latents.shape[-2:], self.vae.latent_gain
        terms = []
        for k, step in enumerate(steps, start=first):
            visible = F.interpolate(context.visible[:, k - 1], grid, mode="area")
            copying = copying_error(latents[:, first - 1], latents[:, k], gain)
            warped = self._warped_term(step, latents[:, k], visible) / copying
            terms.append(warped + _flow_term(step, context.flow_bwd[:, k - 1]))
        return torch.stack(terms).mean()

    def _warped_term(self, step: Step, target: Latent, visible: Float[Tensor, "b 1 hz wz"]) -> Float[Tensor, ""]:
        return weighted_mean(latent_error(step.warped, target, self.vae.latent_gain), visible)

    def unroll(self, observed: list[Latent], last_flow_bwd: Float[Tensor, "b 2 h w"], horizon: int) -> list[Step]:
        """``horizon`` steps from the observed latents and the last observed flow, in pixels."""
        stride = self.options.flow_stride
        flow_bwd = resize_flow(last_flow_bwd, self.height // stride, self.width // stride)
        if self.options.motion_prior == "none":
            flow_bwd = torch.zeros_like(flow_bwd)
        elif self.matching is not None:
            found = self.matching(observed[-1], observed[-2], self.vae.latent_gain)
            flow_bwd = resize_flow(found[:, :2], *flow_bwd.shape[-2:])
        past = observed[-self.options.past :]
        steps = []
        for _ in range(horizon):
            step = self.step(past, flow_bwd)
            past, flow_bwd = [*past[1:], step.latent], step.flow_bwd
            steps.append(step)
        return steps

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """Encode the observed frames, step in latent space, decode. Nothing is drawn from ``generator``."""
        observed = list(encode_windows(self.vae, context.frames).unbind(1))
        steps = self.unroll(observed, context.flow_bwd[:, -1], horizon)
        size = (self.height, self.width)
        logits = [s.visible_logits for s in steps if s.visible_logits is not None]
        masks = [torch.sigmoid(F.interpolate(one, size, mode="bilinear")) for one in logits]
        return Rollout(
            frames=torch.stack([self.vae.to_frames(s.latent) for s in steps], 1),
            flow_bwd=torch.stack([resize_flow(s.flow_bwd, *size) for s in steps], 1),
            visible=torch.stack(masks, 1) if masks else None,
        )


def _flow_term(step: Step, teacher_bwd: Float[Tensor, "b 2 h w"]) -> Float[Tensor, ""]:
    grid = step.latent.shape[-2:]
    return flow_error(resize_flow(step.flow_bwd, *grid), resize_flow(teacher_bwd, *grid))
