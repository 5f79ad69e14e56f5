"""How much of one code can be told from another: probes with held-out videos (Alain and Bengio 2016, 1610.01644).

Two codes are separate as far as neither predicts the other. A probe is fitted per cell of the latent grid, from the 3x3
cells around it: linear (ridge regression, in closed form), and a small network, since what is not linear may leak too.
The figure is R^2 on videos that the probe was not fitted to: 1 is all of the variance, 0 is what the mean of the
fitted videos gives, and below 0 is worse than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Cells:
    """What a probe sees of each of ``n`` cells, and what it is to tell."""

    seen: Float[Tensor, "n c"]
    told: Float[Tensor, "n d"]


@dataclass(frozen=True)
class Leakage:
    """R^2 on held-out cells."""

    linear: float
    network: float


def neighbourhoods(code: Float[Tensor, "t c h w"]) -> Float[Tensor, "t h w c9"]:
    """The 3x3 cells around every cell; beyond the border its own cells are repeated."""
    t, _, h, w = code.shape
    near = F.unfold(F.pad(code, (1, 1, 1, 1), mode="replicate"), 3)
    return near.transpose(1, 2).reshape(t, h, w, -1)


def probe(fitted: Cells, held_out: Cells, generator: torch.Generator, *, steps: int = 400) -> Leakage:
    """Fit both probes on ``fitted`` and measure them on ``held_out``. Randomness comes from ``generator`` alone."""
    mean, std = fitted.seen.mean(0), fitted.seen.std(0).clamp_min(1e-4)
    centre, scale = fitted.told.mean(0), fitted.told.std(0).clamp_min(1e-4)
    seen, told = (fitted.seen - mean) / std, (fitted.told - centre) / scale
    unseen = (held_out.seen - mean) / std
    linear = unseen @ ridge(seen, told)
    network = fit_network(seen, told, generator, steps=steps)
    with torch.no_grad():
        guess = network(unseen)
    return Leakage(*(r_squared(x * scale + centre, held_out.told, centre) for x in (linear, guess)))


def ridge(seen: Float[Tensor, "n c"], told: Float[Tensor, "n d"], penalty: float = 1e-3) -> Float[Tensor, "c d"]:
    """Weights of the least-squares map with a penalty per sample, for centred data: (X'X / n + penalty)^-1 X'Y / n."""
    x, y = seen.double(), told.double()
    covariance = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(covariance, x.T @ y / len(x)).float()


def fit_network(
    seen: Float[Tensor, "n c"],
    told: Float[Tensor, "n d"],
    generator: torch.Generator,
    *,
    steps: int,
    width: int = 64,
    batch: int = 512,
) -> nn.Module:
    """A network of one hidden layer, fitted by Adam to the squared error on random batches."""
    network = nn.Sequential(nn.Linear(seen.shape[1], width), nn.SiLU(), nn.Linear(width, told.shape[1]))
    with torch.no_grad():
        for parameter in network.parameters():
            bound = 0.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        chosen = torch.randint(len(seen), (batch,), generator=generator)
        loss = (network(seen[chosen]) - told[chosen]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network


def r_squared(guess: Float[Tensor, "n d"], truth: Float[Tensor, "n d"], centre: Float[Tensor, " d"]) -> float:
    """1 - squared error / squared distance from ``centre``, both summed over cells and components."""
    return 1 - float((guess - truth).square().sum() / (truth - centre).square().sum().clamp_min(1e-12))
