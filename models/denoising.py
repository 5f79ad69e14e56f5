"""Noise to data in a few steps, by a network that predicts the data itself: flow matching and diffusion.

Both mix clean data and unit noise, ``x = signal * clean + noise * e``, and sample with diffusers' schedulers. The
network says what it takes the clean data to be (x-prediction; Li & He 2025, "Back to basics: let denoising generative
models denoise", arXiv 2511.13720), whatever the scheduler steps along, so its last step lands on what it said last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor

Denoise = Callable[[Float[Tensor, "b z hz wz"], Float[Tensor, " b"]], Float[Tensor, "b z hz wz"]]
"""``(noisy, time) -> clean``, time in [0, 1000]."""
TIMES = 1000


@dataclass(frozen=True)
class Mixture:
    """How much of what is in noisy data."""

    signal: Float[Tensor, " b"]
    noise: Float[Tensor, " b"]

    def of(self, clean: Float[Tensor, "b z hz wz"], e: Float[Tensor, "b z hz wz"]) -> Float[Tensor, "b z hz wz"]:
        """``signal * clean + noise * e``."""
        return self.signal[:, None, None, None] * clean + self.noise[:, None, None, None] * e

    def estimate(self, noisy: Float[Tensor, "b z hz wz"]) -> Float[Tensor, "b z hz wz"]:
        """The best linear guess at clean data of unit variance: what a network should see of pure noise is nothing."""
        return (self.signal / (self.signal.square() + self.noise.square()))[:, None, None, None] * noisy

    def velocity_weight(self, least: float = 0.1) -> Float[Tensor, " b"]:
        """The velocity's squared error over the clean data's, ``1 / noise^2``, for either process. Noise below
        ``least`` counts as that much (Li & He clip at 0.05), or a single clip would drown its batch."""
        return self.noise.clamp_min(least).square().reciprocal()


class Process(ABC):
    """A way from noise to data."""

    @abstractmethod
    def times(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The times to train on for ``u`` uniform in [0, 1)."""

    @abstractmethod
    def at(self, time: Float[Tensor, " b"]) -> Mixture:
        """What noisy data is made of at a time in [0, 1000]."""

    @abstractmethod
    def sample(self, denoise: Denoise, e: Float[Tensor, "b z hz wz"], steps: int) -> Float[Tensor, "b z hz wz"]:
        """Clean data from unit noise ``e`` in ``steps`` calls of ``denoise``; draws nothing."""


class FlowMatching(Process):
    """Straight lines from noise to data (Lipman et al. 2023, arXiv 2210.02747): ``x = (1 - s) clean + s e``.

    ``shift`` above 1 moves training and sampling to noisier mixtures, ``s = shift r / (1 + (shift - 1) r)`` for ``r``
    uniform (Esser et al. 2024, arXiv 2403.03206): there the past, and not the noisy data, must tell.
    """

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def times(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        r = 1 - u
        return TIMES * self.shift * r / (1 + (self.shift - 1) * r)

    def at(self, time: Float[Tensor, " b"]) -> Mixture:
        return Mixture(1 - time / TIMES, time / TIMES)

    def sample(self, denoise: Denoise, e: Float[Tensor, "b z hz wz"], steps: int) -> Float[Tensor, "b z hz wz"]:
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES, shift=self.shift)
        # Left to itself it spends its last step on s = 0.001, where nothing is left to do.
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=e.device)
        x: Any = e
        times: Any = scheduler.timesteps
        for time in times:
            clean = denoise(x, time.expand(len(x)))
            velocity = (x - clean) / (time / TIMES)  # e - clean, were the clean data true: it points to the noise
            x = scheduler.step(velocity, time, x, return_dict=False)[0]
        return x


class Diffusion(Process):
    """Variance-preserving diffusion with the cosine schedule (Nichol & Dahl 2021), sampled by DDIM (Song et al. 2021).

    The last time is pure noise and sampling begins there (Lin et al. 2024, arXiv 2305.08891).
    """

    def __init__(self) -> None:
        self.kept: Float[Tensor, " times"] = self._scheduler().alphas_cumprod

    def times(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return ((1 - u) * TIMES).ceil() - 1

    def at(self, time: Float[Tensor, " b"]) -> Mixture:
        kept = self.kept.to(time.device)[time.long()]
        return Mixture(kept.sqrt(), (1 - kept).sqrt())

    def sample(self, denoise: Denoise, e: Float[Tensor, "b z hz wz"], steps: int) -> Float[Tensor, "b z hz wz"]:
        scheduler = self._scheduler()
        scheduler.set_timesteps(steps, device=e.device)
        x = e
        times: Any = scheduler.timesteps
        for time in times:
            clean = denoise(x, time.float().expand(len(x)))
            x = scheduler.step(clean, time, x, return_dict=False)[0]
        return x

    @staticmethod
    def _scheduler() -> DDIMScheduler:
        return DDIMScheduler(
            num_train_timesteps=TIMES,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            clip_sample=False,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
