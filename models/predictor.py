"""The contract of a predictor: it owns its loss, and its rollout sees nothing of the future.

Two verbs: ``forward(batch) -> (loss, logs)`` for training and ``rollout(context, horizon, generator) -> Rollout``
for prediction. One training loop (`models.training`) and one evaluation (`stages.evaluate`) serve them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.clips import Clip, Context


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
