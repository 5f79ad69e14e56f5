"""Test-time training: before a video is predicted, its observed frames teach the flow head how this one moves.

The observed frames are their own supervision: a flow from frame t to t+1 is right if warping t by it gives t+1, and
both are known. A few gradient steps on that error, for the flow head alone, then the rollout, then the old weights,
bit for bit (after Sun et al. 2020, arXiv 1909.13231, who take a self-supervised task instead). Nothing of the future
is used: a `Context` holds nothing of it.

A predictor takes part by having the two methods of `Adaptable`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from data.clips import Clip, Context
from data.errors import NonFiniteError
from models.predictor import Predictor, Rollout


class AdaptationOptions(BaseModel):
    """How far the flow head follows the observed frames."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    steps: int = Field(default=5, ge=0, description="gradient steps per window; 0 predicts without")
    learning_rate: float = Field(default=1e-3, gt=0, description="of Adam: about what a weight moves in one step")


@runtime_checkable
class Adaptable(Protocol):
    """What a predictor with a flow head offers."""

    def flow_parameters(self) -> dict[str, nn.Parameter]:
        """The flow head's own parameters by name: all that adaptation may change."""
        ...

    def observed_loss(self, context: Context) -> Float[Tensor, ""]:
        """How wrong the flow head is between the observed frames, differentiable in `flow_parameters`.

        Raises ValueError where the context is too short to hold a pair that could be predicted.
        """
        ...


class Adapted(Predictor):
    """A predictor that adapts to every window that it predicts; else the same (``inner``)."""

    def __init__(self, inner: Predictor, options: AdaptationOptions) -> None:
        """Raises TypeError for a predictor without a flow head (that is not `Adaptable`)."""
        super().__init__(height=inner.height, width=inner.width, context=inner.context)
        _adaptable(inner)
        self.needs = inner.needs
        self.inner, self.options = inner, options

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """As ``inner``: adaptation is for prediction only."""
        return self.inner(batch)

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """See `adapted_rollout`."""
        return adapted_rollout(self.inner, context, horizon, generator, self.options)


def adapted_rollout(
    predictor: Predictor, context: Context, horizon: int, generator: torch.Generator, options: AdaptationOptions
) -> Rollout:
    """Adapt to each window of the batch on its own, predict it, forget it again; also in `torch.inference_mode`.

    Weights are as before afterwards, bit for bit, also after an error. Raises TypeError for a predictor that is not
    `Adaptable`, NonFiniteError where an observed loss is NaN or infinite.
    """
    if options.steps == 0:
        return predictor.rollout(context, horizon, generator)
    parts = []
    for row in range(len(context.frames)):
        window = Context(**{f.name: getattr(context, f.name)[row : row + 1] for f in fields(context)})
        with adapted(predictor, window, options):
            parts.append(predictor.rollout(window, horizon, generator))
    rows = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Rollout)}
    heads: dict[str, Any] = {name: None if values[0] is None else torch.cat(values) for name, values in rows.items()}
    return Rollout(**heads)


@contextmanager
def adapted(predictor: Predictor, context: Context, options: AdaptationOptions) -> Iterator[None]:
    """Inside, the flow head has followed ``context``; afterwards it is what it was."""
    parameters = _adaptable(predictor).flow_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _follow(predictor, context, options)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def _follow(predictor: Predictor, context: Context, options: AdaptationOptions) -> None:
    model = _adaptable(predictor)
    parameters = list(model.flow_parameters().values())
    optimiser = torch.optim.Adam(parameters, lr=options.learning_rate)
    with torch.inference_mode(False), torch.enable_grad():
        # What inference mode made cannot be kept for a gradient; a copy made outside of it can.
        observed = Context(**{f.name: getattr(context, f.name).clone() for f in fields(context)})
        for step in range(options.steps):
            loss = model.observed_loss(observed)
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"adaptation stopped at step {step + 1}: the observed loss is {float(loss.detach())}",
                    remedy="lower adaptation.learning_rate",
                )
            # Not `backward`: gradients of other weights, and those that a training loop has in hand, stay alone.
            gradients = torch.autograd.grad(loss, parameters)
            kept = [parameter.grad for parameter in parameters]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient


def _adaptable(predictor: Predictor) -> Adaptable:
    if not isinstance(predictor, Adaptable):
        raise TypeError(
            f"{type(predictor).__name__} has no flow head that could adapt (see models.adaptation.Adaptable)"
        )
    return cast(Adaptable, predictor)
