"""Approach 5: appearance latents and motion latents, both predicted, both supervised.

Two frozen autoencoders give two codes: *appearance* is the frame VAE's latent of one picture, *motion* the flow VAE's
latent of the backward flow of the pair that ends in that picture. Two streams carry them on, recursively:

- the motion stream gives the next motion: the present one decoded, carried along itself (`advect_flow`) and encoded
  again, then scaled towards rest and shifted by what its trunk says;
- the appearance stream gives the next appearance: the present one warped by the flow that the *next* motion decodes to,
  plus a residual from a trunk that sees it before and after.

Both corrections start at zero: before training this predictor is the advection of latents by latents. Frames are
decoded from appearance alone, flow from motion alone, with or without ``disentangle``, which decides what the streams
see and what they are taught:

===================  ==============================================  =============================================
what                 ``disentangle: false``                          ``disentangle: true``
===================  ==============================================  =============================================
the motion stream    codes [appearance, motion] of ``past`` frames   the motions of ``past`` frames; no appearance
the appearance       the same codes, and the next motion             the present frame's appearance, and the flow
stream               (latents and decoded flow)                      that the next motion decodes to
losses               latents of both                                 the decoded flow against the teacher's as well
===================  ==============================================  =============================================

So with ``disentangle`` no appearance reaches the motion, and all that the appearance stream knows of motion is the flow
it is given: a single picture's code holds none, and no second one is shown. It is then driven by any motion
(`TwoStream.drive`): that of another video, or one that was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from data.clips import Clip, Context
from models.augmentation import GuiseOptions, augment
from models.autoencoder import Vaes, encode_windows
from models.blocks import Trunk, coordinates, zero_conv
from models.heads import ResidualHead
from models.losses import copying_error, flow_error, latent_error, weigh, weighted_mean
from models.predictor import Predictor, Rollout
from models.warp import advect_flow, backward_warp, chain_flow, resize_flow, speed

Appearance = Float[Tensor, "b z hz wz"]
Motion = Float[Tensor, "b zf hf wf"]

# Cells count as moving where the teacher's flow exceeds this many pixels somewhere in them; the rest weigh less, as in
# `losses.flow_error`: nearly all of every picture stands still.
MOVING_PX, STILL_WEIGHT = 0.5, 0.05


class Options(GuiseOptions):
    """Architecture and loss weights."""

    disentangle: bool = Field(
        default=True, description="motion sees no appearance, appearance only the present frame; see the module"
    )
    width: int = Field(default=64, ge=8, description="channels of both trunks")
    features: int = Field(default=24, ge=8, description="channels that the heads see, on the grid of their latents")
    motion_blocks: int = Field(default=6, ge=1, description="residual blocks of the motion stream's trunk")
    appearance_blocks: int = Field(default=4, ge=1, description="residual blocks of the appearance stream's trunk")
    cell: int = Field(default=8, ge=1, description="pixels per cell of the grid on which both trunks work")
    flow_stride: int = Field(default=2, ge=1, description="pixels per cell of the grid on which flow is carried along")
    past: int = Field(default=3, ge=1, description="codes that a stream sees, the present one included")
    latent: float = Field(default=1.0, ge=0, description="weight of the next appearance's error relative to copying")
    motion: float = Field(default=0.03, ge=0, description="weight of the next motion's error, in normalised latents")
    flow: float = Field(
        default=0.03, ge=0, description="weight of the decoded flow's error against the teacher's, with disentangle"
    )
    residual: float = Field(default=0.01, ge=0, description="weight of the residual's mean size")


@dataclass(frozen=True)
class Step:
    """One prediction. ``flow_bwd`` is decoded from ``motion``, in pixels; ``residual`` is part of ``appearance``."""

    appearance: Appearance
    motion: Motion
    flow_bwd: Float[Tensor, "b 2 h w"]
    residual: Appearance


class TwoStream(Predictor):
    """See the module. Latents are normalised; the flow VAE's grid is as coarse as the frame VAE's or coarser."""

    borrowed = frozenset({"frame_vae", "flow_vae"})
    needs_vaes = frozenset({"frame", "flow"})

    def __init__(self, options: Options, *, vaes: Vaes, height: int, width: int, context: int) -> None:
        super().__init__(height=height, width=width, context=context)
        if context <= options.past:
            raise ValueError(f"context is {context}; past={options.past} motions end in frames after the first")
        self.options = options
        self.needs = frozenset({"flow_bwd"} | ({"frames"} if options.flip else {"latents", "flow_latents"}))
        self.frame_vae = vaes["frame"].eval().requires_grad_(False)
        self.flow_vae = vaes["flow"].eval().requires_grad_(False)
        fine, coarse = self.frame_vae.stride, self.flow_vae.stride
        if coarse % fine or options.cell % coarse:
            raise ValueError(
                f"the frame VAE's stride {fine} must divide the flow VAE's, {coarse}, and that must divide "
                f"cell={options.cell}"
            )
        for side, pixels in (("height", height), ("width", width)):
            if pixels % options.cell or pixels % options.flow_stride:
                raise ValueError(
                    f"{side} {pixels} must be divisible by cell={options.cell} and flow_stride={options.flow_stride}"
                )
        self.ratio = coarse // fine
        z, zf = self.frame_vae.latent_channels, self.flow_vae.latent_channels
        codes = options.past * zf if options.disentangle else options.past * (zf + z * self.ratio**2)
        self.motion_stream = MotionStream(codes, zf, options, coarse)
        codes = z if options.disentangle else options.past * (z + zf) + zf
        self.appearance_stream = AppearanceStream(codes, z, options, fine)
        with torch.no_grad():
            rest = encode_windows(self.flow_vae, torch.zeros(1, 1, 2, height, width))[0]
        self.register_buffer("rest", rest, persistent=False)

    rest: Float[Tensor, "1 zf hf wf"]
    """The motion latent of no motion anywhere."""

    def step(self, appearances: Sequence[Appearance], motions: Sequence[Motion]) -> Step:
        """One step on from the codes of the last ``past`` frames, oldest first."""
        motion = self.next_motion(appearances, motions)
        return self.next_appearance(appearances, motions, motion)

    def next_motion(self, appearances: Sequence[Appearance], motions: Sequence[Motion]) -> Motion:
        """The motion of the coming pair. With ``disentangle`` the appearances are not looked at."""
        prior = self.carried(motions[-1])
        codes = [motion - self.rest for motion in motions]
        if not self.options.disentangle:
            codes += [F.pixel_unshuffle(appearance, self.ratio) for appearance in appearances]
        return self.motion_stream(codes, prior, self.rest)

    def carried(self, motion: Motion) -> Motion:
        """Constant velocity: decoded, carried along itself for one pair, encoded."""
        flow_bwd = self.flow_vae.from_latents(motion)
        h, w = flow_bwd.shape[-2:]
        stride = self.options.flow_stride
        carried = advect_flow(resize_flow(flow_bwd, h // stride, w // stride))
        return self.flow_vae.to_latents(resize_flow(carried, h, w))

    def next_appearance(
        self,
        appearances: Sequence[Appearance],
        motions: Sequence[Motion],
        motion: Motion,
        warp: Callable[[Appearance, Float[Tensor, "b 2 hz wz"]], Appearance] = backward_warp,
    ) -> Step:
        """The appearance that ``motion`` leads to. With ``disentangle`` only ``appearances[-1]`` and it are seen.

        ``warp`` moves that by the flow, in cells.
        """
        flow_bwd = self.flow_vae.from_latents(motion)
        on_grid = resize_flow(flow_bwd, *appearances[-1].shape[-2:])
        codes = [appearances[-1]]
        if not self.options.disentangle:
            fine = [F.interpolate(m - self.rest, scale_factor=self.ratio) for m in (*motions, motion)]
            codes = [*appearances, *fine]
        appearance, residual = self.appearance_stream(codes, warp(appearances[-1], on_grid), on_grid)
        return Step(appearance, motion, flow_bwd, residual)

    def unroll(self, appearances: Sequence[Appearance], motions: Sequence[Motion], horizon: int) -> list[Step]:
        """``horizon`` steps from observed codes: of frames, and of the pairs between them (one fewer), oldest first."""
        past = self.options.past
        appearances, motions = list(appearances[-past:]), list(motions[-past:])
        steps = []
        for _ in range(horizon):
            step = self.step(appearances, motions)
            appearances, motions = [*appearances[1:], step.appearance], [*motions[1:], step.motion]
            steps.append(step)
        return steps

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Mean over the predicted frames of every term; the rollout is unrolled and trained through."""
        appearances, motions, teacher = self._targets(batch)
        x, gain = self.context, self.frame_vae.latent_gain
        steps = self.unroll(appearances[:, :x].unbind(1), motions[:, : x - 1].unbind(1), appearances.shape[1] - x)
        grid = appearances.shape[-2:]
        terms: dict[str, list[Tensor]] = {"latent": [], "motion": [], "residual": []}
        if self.options.disentangle:
            terms["flow"] = []
        moving = self._moving(teacher)
        for k, step in enumerate(steps, start=x):
            copying = copying_error(appearances[:, x - 1], appearances[:, k], gain)
            terms["latent"].append(latent_error(step.appearance, appearances[:, k], gain).mean() / copying)
            terms["motion"].append(self._motion_error(step.motion, motions[:, k - 1], moving[:, k - 1]))
            terms["residual"].append(step.residual.abs().mean())
            if self.options.disentangle:
                true_flow_bwd = resize_flow(teacher[:, k - 1], *grid)
                terms["flow"].append(flow_error(resize_flow(step.flow_bwd, *grid), true_flow_bwd))
        return weigh({name: torch.stack(values).mean() for name, values in terms.items()}, self.options)

    def _targets(self, batch: Clip) -> tuple[Tensor, Tensor, Tensor]:
        """Appearance and motion latents and the teacher's flow; every other window mirrored where ``flip`` is on."""
        if not self.options.flip:
            latents, flow_latents = (batch.require(name).float() for name in ("latents", "flow_latents"))
            return latents, flow_latents, batch.require("flow_bwd").float()
        batch = augment(batch, mirror=True, recolour=self.options.recolour)
        teacher = batch.require("flow_bwd").float()
        return encode_windows(self.frame_vae, batch.require("frames")), encode_windows(self.flow_vae, teacher), teacher

    def _moving(self, teacher: Float[Tensor, "b p 2 h w"]) -> Float[Tensor, "b p 1 hf wf"]:
        """How much the cells of the motion latents count: 1 where something in them moves."""
        fastest = F.max_pool2d(speed(teacher.flatten(0, 1)), self.flow_vae.stride).unflatten(0, teacher.shape[:2])
        return torch.where(fastest > MOVING_PX, 1.0, STILL_WEIGHT)

    def _motion_error(self, motion: Motion, target: Motion, weight: Float[Tensor, "b 1 hf wf"]) -> Float[Tensor, ""]:
        """Root of the squared error over channels, smoothed at zero."""
        squared = latent_error(motion, target, self.flow_vae.latent_gain)
        return weighted_mean((squared + 1e-4).sqrt() - 1e-2, weight)

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """Encode what was observed, step in both latent spaces, decode. Nothing is drawn from ``generator``."""
        appearances, motions = self.observe(context)
        steps = self.unroll(appearances, motions, horizon)
        return Rollout(
            frames=torch.stack([self.frame_vae.to_frames(s.appearance) for s in steps], 1),
            flow_bwd=torch.stack([s.flow_bwd for s in steps], 1),
        )

    def observe(self, context: Context) -> tuple[list[Appearance], list[Motion]]:
        """Appearances of the observed frames and motions of the pairs between them."""
        appearances = encode_windows(self.frame_vae, context.frames).unbind(1)
        return list(appearances), list(encode_windows(self.flow_vae, context.flow_bwd).unbind(1))

    def drive(
        self, first: Float[Tensor, "b 3 h w"], motion_latents: Float[Tensor, "b y zf hf wf"]
    ) -> Float[Tensor, "b y 3 h w"]:
        """Frames in [0, 1] that follow ``first`` under *given* motion: the appearance stream alone.

        ``motion_latents[:, k]`` are the flow VAE's normalised latents of the backward flow from result k to the frame
        before it. Without ``disentangle`` the stream also sees a past, which is then that ``first`` stood still.

        A rollout interpolates its latents anew in every step, as it was trained to; here what is given is sharp and
        should stay so. The flows are therefore chained, the first latent is warped once by all of them, and what the
        residuals added is carried along beside it.
        """
        past = self.options.past
        appearances, motions = [self.frame_vae.to_latents(first)] * past, [self.rest.expand(len(first), -1, -1, -1)]
        once, motions, frames = _Once(appearances[0]), motions * past, []
        for motion in motion_latents.unbind(1):
            step = self.next_appearance(appearances, motions, motion, once.warp)
            once.added = once.added + step.residual
            appearances, motions = [*appearances[1:], step.appearance], [*motions[1:], motion]
            frames.append(self.frame_vae.to_frames(step.appearance))
        return torch.stack(frames, 1)


class _Once:
    """Warps what one latent has become, sampling the latent itself once."""

    def __init__(self, first: Appearance) -> None:
        self.first, self.added = first, torch.zeros_like(first)
        self.chained = torch.zeros_like(first[:, :2])

    def warp(self, present: Appearance, on_grid: Float[Tensor, "b 2 hz wz"]) -> Appearance:
        """``present`` is ``warp(first, chained) + added``, one step on."""
        self.chained, self.added = chain_flow(on_grid, self.chained), backward_warp(self.added, on_grid)
        return backward_warp(self.first, self.chained) + self.added


class MotionStream(nn.Module):
    """``next = rest + (prior - rest) (1 + tanh(gain)) + shift``: stops what moves, sets in motion; prior at start."""

    def __init__(self, codes: int, channels: int, options: Options, stride: int) -> None:
        super().__init__()
        self.trunk = Trunk(
            codes + channels + 2, options.width, options.features,
            blocks=options.motion_blocks, coarsen=options.cell // stride,
        )  # fmt: skip
        self.head = zero_conv(options.features, channels + 1)

    def forward(self, codes: Sequence[Tensor], prior: Motion, rest: Float[Tensor, "1 zf hf wf"]) -> Motion:
        moved = prior - rest
        out = self.head(self.trunk(torch.cat([*codes, moved, coordinates(prior)], dim=1))).float()
        return rest + moved * (1 + out[:, :1].tanh()) + out[:, 1:]


class AppearanceStream(nn.Module):
    """``next = warp(present, flow_bwd) + residual``; the residual starts at zero."""

    def __init__(self, codes: int, channels: int, options: Options, stride: int) -> None:
        super().__init__()
        self.trunk = Trunk(
            codes + channels + 5, options.width, options.features,
            blocks=options.appearance_blocks, coarsen=options.cell // stride,
        )  # fmt: skip
        self.head = ResidualHead(options.features, channels, options.features)

    def forward(
        self, codes: Sequence[Tensor], warped: Appearance, on_grid: Float[Tensor, "b 2 hz wz"]
    ) -> tuple[Appearance, Appearance]:
        """The next appearance and the residual in it; ``on_grid`` is the flow in cells by which ``warped`` came."""
        features = self.trunk(torch.cat([*codes, warped, on_grid, speed(on_grid), coordinates(warped)], dim=1))
        residual = self.head(features, warped)
        return warped + residual, residual
