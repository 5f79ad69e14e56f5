"""The contract of a predictor: it owns its loss, and its rollout sees nothing of the future.

Two verbs: ``forward(batch) -> (loss, logs)`` for training and ``rollout(context, horizon, generator) -> Rollout``
for prediction. One training loop (`models.training`) and one evaluation (`stages.evaluate`) serve them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Clip:
    """A batch of training windows on the model's grid (h, w). Fields that a predictor does not name in
    ``Predictor.needs`` are not loaded and raise on access through `require`.

    - ``frames`` in [0, 1], RGB.
    - ``latents`` normalised per channel (mean 0, standard deviation 1 over the training split).
    - ``flow_bwd[:, k]`` lives on frame k+1 and points to frame k, in pixels of (h, w): the teacher's.
    - ``visible[:, k]`` in [0, 1] on the grid of frame k+1: 1 where warping frame k can be trusted.
    """

    video: Int[Tensor, " b"]
    start: Int[Tensor, " b"]
    frames: Float[Tensor, "b t 3 h w"] | None = None
    latents: Float[Tensor, "b t z hz wz"] | None = None
    flow_bwd: Float[Tensor, "b t-1 2 h w"] | None = None
    visible: Float[Tensor, "b t-1 1 h w"] | None = None

    def require(self, name: str) -> Tensor:
        """The field, or an error naming it: absent data never drops a loss term silently."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this clip was loaded without {name!r}; name it in the predictor's `needs`")
        return value

    def to(self, device: torch.device | str) -> Self:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: v.to(device, non_blocking=True) if v is not None else None for k, v in moved.items()})


@dataclass(frozen=True)
class Context:
    """What a rollout may see: observed frames in [0, 1], and the teacher's flow and visibility *between* them."""

    frames: Float[Tensor, "b x 3 h w"]
    flow_bwd: Float[Tensor, "b x-1 2 h w"]
    visible: Float[Tensor, "b x-1 1 h w"]


@dataclass(frozen=True)
class Rollout:
    """Predictions for the ``y`` frames after the context; None where a predictor has no such head.

    ``frames`` in [0, 1]; ``flow_bwd[:, k]`` lives on predicted frame k and points to the frame before it, in
    pixels of (h, w); ``visible`` likewise, in [0, 1].
    """

    frames: Float[Tensor, "b y 3 h w"]
    flow_bwd: Float[Tensor, "b y 2 h w"] | None = None
    visible: Float[Tensor, "b y 1 h w"] | None = None


class Predictor(nn.Module, ABC):
    """Base of every predictor. ``needs`` names the fields of `Clip` that ``forward`` reads (empty: no training)."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss to minimise, and its raw terms, unweighted, for the log."""

    @abstractmethod
    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """Predict ``horizon`` frames. Randomness comes from ``generator`` alone."""
