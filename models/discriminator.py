"""The adversarial term of an autoencoder: a PatchGAN that learns to tell its pictures from real ones.

A patch discriminator (Isola et al. 2017, arXiv 1611.07004) with hinge loss, as in VQGAN (Esser et al. 2021, arXiv
2012.09841), but small, with spectral normalisation (Miyato et al. 2018, arXiv 1802.05957) in place of batch
normalisation, and with a fixed weight in place of VQGAN's balance of gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """One score per patch of 16 x 16 pixels or so of pictures in [0, 1]; high means real."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 1, 4, padding=1)),
        )

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        # Spectral normalisation iterates in the precision of its weights; bfloat16 would not do.
        with torch.autocast(device_type=pictures.device.type, enabled=False):
            return self.layers(2 * pictures.float() - 1)


class Adversary:
    """A discriminator with an optimiser of its own, which learns whenever it is asked to.

    Not a module, so that no one trains, averages or saves it with what it judges. It starts anew with every run, and
    under torchrun every process has one of its own. ``seed`` decides its first weights.
    """

    def __init__(self, *, learning_rate: float, seed: int, device: torch.device | str = "cpu") -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = PatchDiscriminator().to(device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=learning_rate, betas=(0.5, 0.9))

    def learn(self, real: Float[Tensor, "b 3 h w"], made: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """One step of the discriminator; the hinge loss before it, without gradient. 1 where it knows nothing."""
        self.network.requires_grad_(True)
        loss = (F.relu(1 - self.network(real)).mean() + F.relu(1 + self.network(made.detach())).mean()) / 2
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def object_to(self, made: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """What the maker of ``made`` minimises: minus its mean score. The discriminator gets no gradient of it."""
        self.network.requires_grad_(False)
        return -self.network(made).mean()
