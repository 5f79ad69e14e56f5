"""The frame VAE: a learned block transform plus small convolutional networks that refine it.

An image is cut into blocks of ``stride`` x ``stride`` pixels. Their principal components (fitted once, before
training) are the latent's starting point, and a linear map back is the decoder's: at stride 2 with 6 channels this
alone reconstructs CLEVRER at 52 dB. Zero-initialised networks on the latent grid then learn what is not linear, and
one thing above all: that a latent warped by a fraction of a cell decodes to the picture warped by as much
(equivariance as in EQ-VAE, Kouzelis et al. 2025, arXiv 2502.09509), which predictors that move latents live on.

The words are those of diffusers (``encode(x).latent_dist``, ``decode(z).sample``, ``save_pretrained``); scaling of
the input and the statistics of the latents travel with the weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import EmptyError, NonFiniteError
from models.blocks import ResidualBlock, zero_conv

# Posterior standard deviation at the start, in units of the latents' own: exp(-5) = 0.7 %.
LOGVAR_AT_START = -10.0


class LatentVAE(ModelMixin, ConfigMixin):
    """What every autoencoder of single images here offers, whatever its networks.

    Latents that leave through `to_latents` are normalised per channel with the mean and standard deviation of the
    training split (`calibrate`), which are saved with the weights. Subclasses give ``encode`` and ``decode`` in
    diffusers' words, ``stride`` (pixels per cell of the latent grid), ``latent_channels`` and ``scale`` (the size of
    one unit inside the networks in units of the input).
    """

    stride: int
    latent_channels: int
    scale: float
    latent_mean: Tensor
    latent_std: Tensor
    latent_gain: Tensor

    def _register_statistics(self) -> None:
        self.register_buffer("latent_mean", torch.zeros(self.latent_channels))
        self.register_buffer("latent_std", torch.ones(self.latent_channels))
        self.register_buffer("latent_gain", torch.ones(self.latent_channels))

    @abstractmethod
    def encode(self, x: Float[Tensor, "b c h w"]) -> AutoencoderKLOutput:
        """The posterior of the latents, ``.latent_dist``, for images in the units of the input."""

    @abstractmethod
    def decode(self, z: Float[Tensor, "b z hz wz"]) -> DecoderOutput:
        """``.sample``: images (b, c, h, w) in the units of the input, not clamped. ``z`` is not normalised."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> DecoderOutput:
        """Reconstruction from the posterior mean."""
        return self.decode(self.encode(x).latent_dist.mean)

    def normalise(self, z: Float[Tensor, "b z hz wz"]) -> Float[Tensor, "b z hz wz"]:
        """Latents with mean 0 and standard deviation 1 per channel over the split of `calibrate`."""
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalise(self, latents: Float[Tensor, "b z hz wz"]) -> Float[Tensor, "b z hz wz"]:
        """The inverse of `normalise`."""
        return latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    def to_latents(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z hz wz"]:
        """Normalised posterior means: what stores keep and predictors see."""
        return self.normalise(self.encode(x).latent_dist.mean)

    def to_frames(self, latents: Float[Tensor, "b z hz wz"]) -> Float[Tensor, "b c h w"]:
        """Decoded frames, clamped to [0, 1], from normalised latents."""
        return self.from_latents(latents).clamp(0, 1)

    def from_latents(self, latents: Float[Tensor, "b z hz wz"]) -> Float[Tensor, "b c h w"]:
        """Decoded images in the units of the input, not clamped, from normalised latents."""
        return self.decode(self.denormalise(latents)).sample

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "_ c h w"]]) -> None:
        """Measure the latents' mean and deviation per channel over the training split, and the decoder's gain.

        The gain is the root-mean-square change of the decoded image (in units of the input) when one channel of the
        normalised latent changes by one everywhere. Raises EmptyError without batches, NonFiniteError if the
        encoder produces NaN or infinity.
        """
        count = 0
        total, squares = torch.zeros_like(self.latent_mean).double(), torch.zeros_like(self.latent_std).double()
        example = None
        for x in batches:
            z = self.encode(x).latent_dist.mean.double()
            total, squares = total + z.sum((0, 2, 3)), squares + z.square().sum((0, 2, 3))
            count += z.numel() // z.shape[1]
            example = x[:4] if example is None else example
        if example is None:
            raise EmptyError("no images to calibrate the latents with", remedy="check the training split of the store")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
        if not torch.isfinite(std).all():
            raise NonFiniteError("the latents' statistics are not finite", remedy="lower the VAE's learning_rate")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
        self.latent_gain.copy_(self._measure_gain(example))

    def _measure_gain(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, " z"]:
        latents = self.to_latents(x)
        plain = self.from_latents(latents)
        gains = []
        for channel in range(latents.shape[1]):
            # Alternating signs: the response to detail counts, not only to a shift of the whole image.
            nudge = torch.zeros_like(latents)
            nudge[:, channel] = 0.1
            nudge[:, channel, ::2, ::2] *= -1
            nudge[:, channel, 1::2, 1::2] *= -1
            moved = self.from_latents(latents + nudge)
            gains.append((moved - plain).square().mean().sqrt() / 0.1)
        return torch.stack(gains)


class BlockVAE(LatentVAE):
    """The light architecture: a latent grid of (h / stride, w / stride) out of blocks of pixels.

    Images come in their own units and are scaled inside: ``(x - shift) / scale``. Frames in [0, 1] take the default
    0.5 and 0.5; optical flow in pixels takes ``in_channels=2, shift=0, scale=8``.
    """

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 3,
        latent_channels: int = 6,
        stride: int = 2,
        width: int = 32,
        blocks: int = 1,
        shift: float = 0.5,
        scale: float = 0.5,
    ) -> None:
        super().__init__()
        patch = in_channels * stride**2
        if latent_channels > patch:
            raise ValueError(
                f"latent_channels={latent_channels} exceeds the {patch} values of a block of stride {stride}"
            )
        self.stride, self.shift, self.scale = stride, shift, scale
        self.latent_channels = latent_channels
        self.analysis = nn.Conv2d(patch, latent_channels, 1)
        self.synthesis = nn.Conv2d(latent_channels, patch, 1)
        self.encoder = _refiner(patch, width, blocks, 2 * latent_channels)
        self.decoder = _refiner(latent_channels, width, blocks, patch)
        self._register_statistics()
        start = torch.eye(patch)[:latent_channels]
        self._set_basis(start, torch.zeros(patch))

    def encode(self, x: Float[Tensor, "b c h w"]) -> AutoencoderKLOutput:
        """The posterior of the latents, ``.latent_dist``, for images in the units of the input. Raises ValueError
        if height or width is not divisible by the stride."""
        _, _, h, w = x.shape
        if h % self.stride or w % self.stride:
            raise ValueError(f"height {h} and width {w} must be divisible by the stride {self.stride}")
        patches = F.pixel_unshuffle((x - self.shift) / self.scale, self.stride)
        linear = _in_float32(self.analysis, patches)
        mean, logvar = self.encoder(patches).float().chunk(2, dim=1)
        moments = torch.cat([linear + mean, logvar + LOGVAR_AT_START], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))  # pyright: ignore[reportArgumentType]

    def decode(self, z: Float[Tensor, "b z hz wz"]) -> DecoderOutput:
        """``.sample``: images (b, c, h, w) in the units of the input, not clamped. ``z`` is not normalised."""
        patches = _in_float32(self.synthesis, z) + self.decoder(z).float()
        return DecoderOutput(sample=F.pixel_shuffle(patches, self.stride) * self.scale + self.shift)

    @torch.no_grad()
    def fit_basis(self, x: Float[Tensor, "b c h w"]) -> None:
        """Start the block transform at the principal components of ``x``'s blocks, scaled to unit variance."""
        patches = F.pixel_unshuffle((x.float() - self.shift) / self.scale, self.stride)
        patches = rearrange(patches, "b p h w -> (b h w) p")
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / len(patches)
        values, vectors = torch.linalg.eigh(covariance.double())
        components = vectors.flip(1).T[: self.latent_mean.numel()].float()
        deviation = values.flip(0)[: len(components)].clamp_min(1e-8).sqrt().float()
        # The sign of an eigenvector is arbitrary; fixed here so that a seed means the same weights everywhere.
        components = components * components.sum(1, keepdim=True).sign()
        self._set_basis(components, mean, deviation)

    @torch.no_grad()
    def _set_basis(
        self, components: Float[Tensor, "z p"], mean: Float[Tensor, " p"], deviation: Float[Tensor, " z"] | None = None
    ) -> None:
        """analysis(u) = components (u - mean) / deviation; synthesis is its transpose and the inverse scaling."""
        deviation = torch.ones(len(components), device=components.device) if deviation is None else deviation
        forward = components / deviation[:, None]
        back = (components * deviation[:, None]).T
        for conv, weight, bias in ((self.analysis, forward, -forward @ mean), (self.synthesis, back, mean)):
            conv.weight.copy_(weight[:, :, None, None])
            conv.bias.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]


def _refiner(inputs: int, width: int, blocks: int, outputs: int) -> nn.Sequential:
    stack = [ResidualBlock(width) for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), *stack, nn.SiLU(), zero_conv(width, outputs))


def _in_float32(conv: nn.Conv2d, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
    # bfloat16 has 8 bits: through it the block transform alone would cost more than the whole network gains.
    with torch.autocast(device_type=x.device.type, enabled=False):
        return conv(x.float())


@torch.no_grad()
def encode_windows(vae: LatentVAE, windows: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t z hz wz"]:
    """Normalised latents of windows of frames, or of flow; no gradient."""
    return vae.to_latents(windows.flatten(0, 1)).float().unflatten(0, windows.shape[:2])


Vaes = Mapping[str, LatentVAE]
"""Autoencoders by what they encode: ``frame``, ``flow``."""


def load_vae(folder: Path) -> LatentVAE:
    """The VAE saved in ``folder``, frozen and in evaluation mode."""
    vae = BlockVAE.from_pretrained(str(folder), low_cpu_mem_usage=False)
    return vae.eval().requires_grad_(False)
