"""What every autoencoder of single images offers, whatever its networks.

The words are those of diffusers (``encode(x).latent_dist``, ``decode(z).sample``, ``save_pretrained``), but its records
are not: half of diffusers is loaded with these, which takes longer than many a stage. Scaling of the input and the
statistics of the latents travel with the weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor

from data.errors import EmptyError, NonFiniteError


class Posterior:
    """A normal distribution of latents, independent in every value; ``parameters`` are means, then log variances.

    Log variances are kept within [-30, 20], as diffusers does.
    """

    def __init__(self, parameters: Float[Tensor, "b z2 hz wz"]) -> None:
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)
        self.std = (self.logvar / 2).exp()

    def kl(self) -> Float[Tensor, " b"]:
        """Divergence from the standard normal distribution, summed over the values of each image (nats)."""
        return (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3)) / 2


@dataclass(frozen=True)
class Encoded:
    latent_dist: Posterior


@dataclass(frozen=True)
class Decoded:
    sample: Float[Tensor, "b c h w"]


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

    def check_grid(self, x: Float[Tensor, "b c h w"]) -> None:
        """Raise ValueError if the images do not divide into cells of the latent grid."""
        h, w = x.shape[-2:]
        if h % self.stride or w % self.stride:
            raise ValueError(f"height {h} and width {w} must be divisible by the stride {self.stride}")

    @abstractmethod
    def encode(self, x: Float[Tensor, "b c h w"]) -> Encoded:
        """The posterior of the latents, ``.latent_dist``, for images in the units of the input. Raises ValueError
        if height or width is not divisible by the stride."""

    @abstractmethod
    def decode(self, z: Float[Tensor, "b z hz wz"]) -> Decoded:
        """``.sample``: images (b, c, h, w) in the units of the input, not clamped. ``z`` is not normalised."""

    def fit_basis(self, x: Float[Tensor, "b c h w"]) -> None:
        """Start from the images ``x`` as far as the architecture can do so without gradients; nothing by default."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Decoded:
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


@torch.no_grad()
def encode_windows(vae: LatentVAE, windows: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t z hz wz"]:
    """Normalised latents of windows of frames, or of flow; no gradient."""
    return vae.to_latents(windows.flatten(0, 1)).float().unflatten(0, windows.shape[:2])


Vaes = Mapping[str, LatentVAE]
"""Autoencoders by what they encode: ``frame``, ``flow``."""
