"""Approach 2: a causal transformer over space and time predicts the next latent.

Each latent, with the changes that led to it, is cut into patches of ``patch`` x ``patch`` cells; patches look at each
other within a frame, and at themselves in the frames before (`models.attention`). What they found out returns to the
latent grid, where convolutions that see every cell turn it into a change of the present latent
(`models.dynamic_filter.NextLatentHead`). Predictions are fed back; keys and values of past frames are kept, so each
step computes one frame. Before training this predictor *is* `copy_last` in latent space.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from data.clips import Clip, Context
from models.attention import Past, SpaceTimeBlock
from models.augmentation import GuiseOptions, latent_targets
from models.autoencoder import Vaes, encode_windows
from models.blocks import motion_stack
from models.dynamic_filter import NextLatentHead
from models.losses import Norm, relative_latent_error
from models.predictor import Predictor, Rollout

Latent = Float[Tensor, "b z hz wz"]


class Options(GuiseOptions):
    """Architecture and loss."""

    patch: int = Field(default=8, ge=1, description="side of a token's square, in cells of the latent grid")
    width: int = Field(default=128, ge=8, description="channels of a token")
    heads: int = Field(default=4, ge=1, description="heads of every attention")
    blocks: int = Field(default=3, ge=1, description="blocks of spatial attention, temporal attention and MLP")
    window: int = Field(default=8, ge=1, description="frames that temporal attention sees, the present one included")
    past: int = Field(default=3, ge=2, description="latents that a token is made of, the present one included")
    features: int = Field(default=24, ge=8, description="channels on the latent grid that the head sees")
    kernel: int = Field(default=9, ge=0, description="side of the filters that move content, in cells; 0: none")
    norm: Norm = Field(default="l2", description="the error of the next latent: absolute (l1) or squared (l2)")
    teacher_forced: float = Field(
        default=0.0, ge=0, description="weight of one-step predictions from true latents, over the whole clip"
    )


class LatentTransformer(Predictor):
    """See the module. Latents are normalised."""

    borrowed = frozenset({"vae"})
    needs_vaes = frozenset({"frame"})

    def __init__(self, options: Options, *, vaes: Vaes, height: int, width: int, context: int) -> None:
        super().__init__(height=height, width=width, context=context)
        self.options = options
        self.needs = frozenset({"frames" if options.flip else "latents"})
        self.vae = vaes["frame"].eval().requires_grad_(False)
        z, stride, patch = self.vae.latent_channels, self.vae.stride, options.patch
        for side, pixels in (("height", height), ("width", width)):
            if pixels % (stride * patch):
                raise ValueError(f"{side} {pixels} must be divisible by the VAE's stride {stride} times patch={patch}")
        rows, columns = height // stride // patch, width // stride // patch
        inputs = z * options.past + 2
        self.rows = rows
        self.embed = nn.Conv2d(inputs, options.width, patch, stride=patch)
        self.place = nn.Parameter(0.02 * torch.randn(rows * columns, options.width))
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(options.width, options.heads, window=options.window) for _ in range(options.blocks)
        )
        self.norm = nn.LayerNorm(options.width)
        self.spread = nn.Linear(options.width, options.features * patch**2)
        self.skip = nn.Conv2d(inputs, options.features, 5, padding=2)
        self.head = NextLatentHead(options.features, z, kernel=options.kernel)

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Error of the unrolled predictions relative to copying, trained through, and that of one-step predictions."""
        batch = latent_targets(self.vae, batch, self.options)
        latents, x = batch.require("latents"), self.context
        norm, gain = self.options.norm, self.vae.latent_gain
        predicted = self.unroll(list(latents[:, :x].unbind(1)), latents.shape[1] - x)
        errors = [
            relative_latent_error(latent, latents[:, k], latents[:, x - 1], gain, norm=norm)
            for k, latent in enumerate(predicted, start=x)
        ]
        loss = torch.stack(errors).mean()
        logs = {"latent": loss.detach()}
        if self.options.teacher_forced:
            present, target = latents[:, :-1], latents[:, 1:].flatten(0, 1)
            one_step = self.one_step(present).flatten(0, 1)
            forced = relative_latent_error(one_step, target, present.flatten(0, 1), gain, norm=norm)
            loss = loss + self.options.teacher_forced * forced
            logs["teacher_forced"] = forced.detach()
        return loss, logs

    def one_step(self, latents: Float[Tensor, "b t z hz wz"]) -> Float[Tensor, "b t z hz wz"]:
        """The latent after each of the given ones, predicted from it and those before it; all at once, no memory."""
        b, t = latents.shape[:2]
        seen = self._seen(list(latents.unbind(1)), range(t))
        tokens, _ = self._attend(seen, None)
        return self._next(seen.flatten(0, 1), tokens.flatten(0, 1), latents.flatten(0, 1)).unflatten(0, (b, t))

    def unroll(self, observed: list[Latent], horizon: int) -> list[Latent]:
        """``horizon`` predicted latents after the observed ones."""
        known, memory, fresh = list(observed), None, range(len(observed))
        for _ in range(horizon):
            seen = self._seen(known, fresh)
            tokens, memory = self._attend(seen, memory)
            known.append(self._next(seen[:, -1], tokens[:, -1], known[-1]))
            fresh = range(len(known) - 1, len(known))
        return known[len(observed) :]

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """Encode the observed frames, step in latent space, decode. Nothing is drawn from ``generator``."""
        observed = list(encode_windows(self.vae, context.frames).unbind(1))
        predicted = self.unroll(observed, horizon)
        return Rollout(frames=torch.stack([self.vae.to_frames(latent) for latent in predicted], 1))

    def _seen(self, known: list[Latent], frames: Iterable[int]) -> Float[Tensor, "b t c hz wz"]:
        """What the network sees of each of these frames: nothing after it."""
        return torch.stack([motion_stack(known[: k + 1], self.options.past) for k in frames], dim=1)

    def _attend(
        self, seen: Float[Tensor, "b t c hz wz"], memory: list[Past] | None
    ) -> tuple[Float[Tensor, "b t n d"], list[Past]]:
        """Tokens of new frames that follow those in memory, and the memory with them."""
        embedded = rearrange(self.embed(seen.flatten(0, 1)), "(b t) d r c -> b t (r c) d", b=len(seen))
        tokens, kept = embedded + self.place, []
        for i, block in enumerate(self.blocks):
            tokens, past = block(tokens, memory[i] if memory is not None else None)
            kept.append(past)
        return tokens, kept

    def _next(
        self, seen: Float[Tensor, "m c hz wz"], tokens: Float[Tensor, "m n d"], present: Float[Tensor, "m z hz wz"]
    ) -> Float[Tensor, "m z hz wz"]:
        p = self.options.patch
        found = rearrange(self.spread(self.norm(tokens)), "m (r c) (f i j) -> m f (r i) (c j)", r=self.rows, i=p, j=p)
        return self.head(F.silu(self.skip(seen) + found), present)
