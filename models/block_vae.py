"""The light autoencoder: a learned block transform plus small convolutional networks that refine it.

An image is cut into blocks of ``stride`` x ``stride`` pixels. Their principal components (fitted once, before
training) are the latent's starting point, and a linear map back is the decoder's: at stride 2 with 6 channels this
alone reconstructs CLEVRER at 52 dB. Zero-initialised networks on the latent grid then learn what is not linear, and
one thing above all: that a latent warped by a fraction of a cell decodes to the picture warped by as much
(equivariance as in EQ-VAE, Kouzelis et al. 2025, arXiv 2502.09509), which predictors that move latents live on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.blocks import ResidualBlock, zero_conv
from models.latent_vae import Decoded, Encoded, LatentVAE, Posterior

# Posterior standard deviation at the start, in units of the latents' own: exp(-5) = 0.7 %.
LOGVAR_AT_START = -10.0


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

    def encode(self, x: Float[Tensor, "b c h w"]) -> Encoded:
        self.check_grid(x)
        patches = F.pixel_unshuffle((x - self.shift) / self.scale, self.stride)
        linear = _in_float32(self.analysis, patches)
        mean, logvar = self.encoder(patches).float().chunk(2, dim=1)
        moments = torch.cat([linear + mean, logvar + LOGVAR_AT_START], dim=1)
        return Encoded(Posterior(moments))

    def decode(self, z: Float[Tensor, "b z hz wz"]) -> Decoded:
        patches = _in_float32(self.synthesis, z) + self.decoder(z).float()
        return Decoded(F.pixel_shuffle(patches, self.stride) * self.scale + self.shift)

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
