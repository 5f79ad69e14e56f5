"""Approach 2, generative: the next latent is drawn given the past ones, by flow matching or diffusion.

What is drawn is the *change*, next minus present, with noise about as large as changes are. The network, a small
UNet of diffusers, predicts the clean change (see `models.denoising`) as ``gate * (unet + skip)``, and both
branches start at zero: before training every sample *is* `copy_last`, whatever the noise. The gate reads the past
alone, so where nothing is going to happen no noise reaches the prediction, and a still background stays still.

Training shows single steps from true pasts and, so that twelve steps in a row hold together, from the predictor's own
pasts (self-forcing: Huang et al. 2025, arXiv 2506.08009; here without gradient through the unrolled steps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from data.clips import Clip, Context
from models.augmentation import GuiseOptions, latent_targets
from models.autoencoder import Vaes, encode_windows
from models.blocks import Matching, ResidualBlock, coordinates, zero_conv
from models.denoising import Diffusion, FlowMatching
from models.losses import COPYING_FLOOR, latent_error
from models.predictor import Predictor, Rollout
from models.warp import advect_flow, backward_warp

Latent = Float[Tensor, "b z hz wz"]
Past = Float[Tensor, "b p z hz wz"]


class Options(GuiseOptions):
    """Architecture, noise, sampling and loss weights."""

    objective: Literal["flow_matching", "diffusion"] = Field(
        default="flow_matching", description="straight lines from noise to data, or the cosine schedule with DDIM"
    )
    weighting: Literal["x", "v"] = Field(
        default="x", description="the loss is the squared error of the clean change, or of the velocity"
    )
    noise: float = Field(default=1.0, gt=0, description="standard deviation of the noise, in those of the latents")
    shift: float = Field(default=1.0, gt=0, description="above 1: train and sample more at high noise; flow_matching")
    sampling_steps: int = Field(default=4, ge=1, description="calls of the UNet per predicted frame")
    samples: int = Field(default=1, ge=1, description="samples drawn per context where reduce is mean")
    reduce: Literal["first", "mean"] = Field(
        default="first", description="a rollout returns one sample, or the mean picture of all; never the best"
    )
    width: int = Field(
        default=48, ge=16, multiple_of=16, description="channels of the UNet's finest level; each next has half more"
    )
    levels: int = Field(default=3, ge=1, description="levels of the UNet, each at half the resolution of the last")
    coarsen: int = Field(default=4, ge=1, description="the UNet's finest grid is this much coarser than the latents'")
    past: int = Field(default=4, ge=2, description="latents that the network sees, the present one included")
    matching: int = Field(
        default=4, ge=0, description="radius of matches of the last two latents, in double cells; 0: none are shown"
    )
    forced: float = Field(default=1.0, ge=0, description="weight of the error after a true past, relative to copying")
    unrolled: float = Field(default=1.0, ge=0, description="weight of the same after a past of own predictions")
    unroll_steps: int = Field(default=2, ge=1, description="calls of the UNet per frame of such a past")


# The gate is nearly open at the start, so that the branches behind it learn at once.
OPEN_AT_START = 2.0


@dataclass(frozen=True)
class Condition:
    """What the past says, on the coarse grid, and where a change may come through, on the latent grid."""

    seen: Float[Tensor, "b c hc wc"]
    moving: Float[Tensor, "b m hc wc"]
    gate: Float[Tensor, "b 1 hz wz"]


class LatentDiffusion(Predictor):
    """See the module. Latents are normalised; changes are in units of the latents over ``noise``."""

    borrowed = frozenset({"vae"})
    needs_vaes = frozenset({"frame"})
    seed: Tensor
    drawn: Tensor

    def __init__(self, options: Options, *, vaes: Vaes, height: int, width: int, context: int) -> None:
        super().__init__(height=height, width=width, context=context)
        if context < options.past:
            raise ValueError(f"context is {context}; it must hold past={options.past} latents")
        self.options = options
        self.needs = frozenset({"frames" if options.flip else "latents"})
        self.vae = vaes["frame"].eval().requires_grad_(False)
        z, stride, r = self.vae.latent_channels, self.vae.stride, options.coarsen
        by = stride * r * 2 ** (options.levels - 1)
        for side, pixels in (("height", height), ("width", width)):
            if pixels % by:
                raise ValueError(
                    f"{side} {pixels} must be divisible by {by}: the VAE's stride {stride}, "
                    f"coarsen={r} and 2 for each of the levels={options.levels} after the first"
                )
        self.process = FlowMatching(options.shift) if options.objective == "flow_matching" else Diffusion()
        self.matching = Matching(options.matching) if options.matching else None
        moving = r**2 * (z * (options.past - 1) + (z + 3 if self.matching else 0))
        seen = moving + r**2 * z + 2
        self.unet = UNet2DModel(
            in_channels=seen + r**2 * z,
            out_channels=r**2 * z,
            block_out_channels=tuple(options.width * (2 + k) // 2 for k in range(options.levels)),
            down_block_types=("DownBlock2D",) * options.levels,
            up_block_types=("UpBlock2D",) * options.levels,
            layers_per_block=1,
            norm_num_groups=8,
            add_attention=False,
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)  # pyright: ignore[reportArgumentType]  # a bias is there by default
        # The UNet normalises its features and so forgets how large they were; this path does not, and sees nothing of
        # what stands still.
        self.skip = zero_conv(moving + r**2 * z, r**2 * z, kernel=1)
        self.gate = nn.Sequential(
            nn.Conv2d(seen, 32, 3, padding=1), ResidualBlock(32, dilation=2), nn.SiLU(), zero_conv(32, r**2)
        )
        # Training noise is a function of this seed, the number of batches seen and the batch: it repeats, and goes on
        # after a restart, without the global generator.
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("drawn", torch.zeros((), dtype=torch.long))

    def condition(self, past: Past) -> Condition:
        """What does not depend on the noise, once for all the sampling steps of a frame."""
        present, r = past[:, -1], self.options.coarsen
        changes = [(past[:, k] - past[:, k - 1]) / self.options.noise for k in range(past.shape[1] - 1, 0, -1)]
        if self.matching is not None:
            found = self.matching(present, past[:, -2], self.vae.latent_gain)
            arriving = backward_warp(present, advect_flow(found[:, :2]))
            changes += [(arriving - present) / self.options.noise, found]
        moving = F.pixel_unshuffle(torch.cat(changes, dim=1), r)
        coarse = F.pixel_unshuffle(present, r)
        seen = torch.cat([moving, coarse, coordinates(coarse)], dim=1)
        gate = torch.sigmoid(F.pixel_shuffle(self.gate(seen).float(), r) + OPEN_AT_START)
        return Condition(seen, moving, gate)

    def denoise(self, noisy: Latent, time: Float[Tensor, " b"], given: Condition) -> Latent:
        """The clean change behind a noisy one."""
        x = F.pixel_unshuffle(self.process.at(time).estimate(noisy), self.options.coarsen)
        out = self.unet(torch.cat([x, given.seen], dim=1), time, return_dict=False)[0].float()
        out = out + self.skip(torch.cat([x, given.moving], dim=1)).float()
        return given.gate * F.pixel_shuffle(out, self.options.coarsen)

    def next_latent(self, past: Past, generator: torch.Generator, steps: int) -> Latent:
        """One sample of what comes after ``past``."""
        given = self.condition(past)
        e = torch.randn(past[:, -1].shape, generator=generator, device=past.device)
        change = self.process.sample(lambda x, time: self.denoise(x, time, given), e, steps)
        return past[:, -1] + self.options.noise * change

    def unroll(
        self, observed: Float[Tensor, "b x z hz wz"], horizon: int, generator: torch.Generator, steps: int
    ) -> Float[Tensor, "b t z hz wz"]:
        """``observed`` and ``horizon`` sampled latents after them."""
        latents = observed
        for _ in range(horizon):
            following = self.next_latent(latents[:, -self.options.past :], generator, steps)
            latents = torch.cat([latents, following[:, None]], dim=1)
        return latents

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Errors of the clean change of one step per window after true frames, and of one after own predictions."""
        latents = latent_targets(self.vae, batch, self.options).require("latents")
        (b, t), x = latents.shape[:2], self.context
        generator = self._training_noise(batch, latents.device)
        device = latents.device

        places = torch.randint(x, t, (b,), generator=generator, device=device).tolist()
        forced = torch.stack([latents[i, k - self.options.past : k] for i, k in enumerate(places)])
        after_forced = torch.stack([latents[i, k] for i, k in enumerate(places)])
        ahead = int(torch.randint(min(1, t - x - 1), t - x, (), generator=generator, device=device))
        with torch.no_grad():
            own = self.unroll(latents[:, :x], ahead, generator, self.options.unroll_steps)[:, -self.options.past :]

        past, target = torch.cat([forced, own]), torch.cat([after_forced, latents[:, x + ahead]])
        observed = torch.cat([forced[:, -1], latents[:, x - 1]])
        time = self._times(len(past), generator)
        mixture = self.process.at(time)
        e = torch.randn(target.shape, generator=generator, device=device)
        change = (target - past[:, -1]) / self.options.noise
        given = self.condition(past)
        predicted = past[:, -1] + self.options.noise * self.denoise(mixture.of(change, e), time, given)

        gain = self.vae.latent_gain
        errors = latent_error(predicted, target, gain).mean((1, 2, 3))
        copying = latent_error(observed, target, gain).mean((1, 2, 3))
        weight = torch.ones_like(errors) if self.options.weighting == "x" else mixture.velocity_weight()
        loss, logs = torch.zeros((), device=device), {"gate": given.gate.mean().detach()}
        for name, part in (("forced", slice(b)), ("unrolled", slice(b, None))):
            scale = copying[part].mean() + COPYING_FLOOR
            loss = loss + getattr(self.options, name) * (weight[part] * errors[part]).mean() / scale
            logs[name] = (errors[part].mean() / scale).detach()
        return loss, logs

    def _training_noise(self, batch: Clip, device: torch.device) -> torch.Generator:
        place = (int(batch.video[0]), int(batch.start[0]))  # differs between the processes of distributed training
        seed = np.random.SeedSequence([int(self.seed), int(self.drawn), *place]).generate_state(1)[0]
        self.drawn += 1
        return torch.Generator(device).manual_seed(int(seed))

    def _times(self, count: int, generator: torch.Generator) -> Float[Tensor, " _"]:
        """Times spread evenly over the batch by one draw (Kingma et al. 2021, arXiv 2107.00630), shuffled."""
        device = generator.device
        offset = torch.rand((), generator=generator, device=device)
        even = (offset + torch.arange(count, device=device) / count) % 1
        return self.process.times(even[torch.randperm(count, generator=generator, device=device)])

    def sample(
        self, context: Context, horizon: int, generator: torch.Generator, samples: int, *, steps: int | None = None
    ) -> Float[Tensor, "b s y 3 h w"]:
        """``samples`` independent futures of every context, in [0, 1]: for their spread, and for best-of-k.

        ``steps`` calls of the UNet per frame, ``sampling_steps`` of the options by default.
        """
        observed = encode_windows(self.vae, context.frames).repeat_interleave(samples, dim=0)
        steps = self.options.sampling_steps if steps is None else steps
        latents = self.unroll(observed, horizon, generator, steps)[:, observed.shape[1] :]
        frames = torch.stack([self.vae.to_frames(latents[:, k]) for k in range(horizon)], dim=1)
        return frames.unflatten(0, (-1, samples))

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """One sample, or the mean picture of ``samples`` of them, as ``reduce`` says."""
        count = self.options.samples if self.options.reduce == "mean" else 1
        return Rollout(frames=self.sample(context, horizon, generator, count).mean(1))
