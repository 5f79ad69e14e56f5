"""The contract of a predictor: it owns its loss, and its rollout sees nothing of the future.

Two verbs: ``forward(batch) -> (loss, logs)`` for training and ``rollout(context, horizon, generator) -> Rollout``
for prediction. One training loop (`models.training`) and one evaluation (`stages.evaluate`) serve them all.

A predictor is one file in ``models/predictors/`` that holds ``Options`` (a strict frozen pydantic model) and one
subclass of `Predictor` made by ``Class(options, vaes=..., height=..., width=..., context=...)``; `find` and `build`
need nothing more than the file's name.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor, nn

import models.predictors
from data.clips import Clip, Context

if TYPE_CHECKING:
    from models.autoencoder import Vaes


@dataclass(frozen=True)
class Rollout:
    """Predictions for the ``y`` frames after the context; None where a predictor has no such head.

    ``frames`` in [0, 1]; ``flow_bwd[:, k]`` lives on predicted frame k and points to the frame before it, in
    pixels of (h, w); ``visible`` likewise, in [0, 1]. ``boxes`` are (x0, y0, x1, y1) in pixels of (h, w), ends
    exclusive, of ``n`` slots in any order that one rollout keeps; ``presence`` in [0, 1] says how sure a slot is.
    ``collision`` in [0, 1] is the probability that something collides between the frame before and this one.
    """

    frames: Float[Tensor, "b y 3 h w"]
    flow_bwd: Float[Tensor, "b y 2 h w"] | None = None
    visible: Float[Tensor, "b y 1 h w"] | None = None
    boxes: Float[Tensor, "b y n 4"] | None = None
    presence: Float[Tensor, "b y n"] | None = None
    collision: Float[Tensor, "b y"] | None = None


class Predictor(nn.Module, ABC):
    """Base of every predictor.

    - ``needs`` names the fields of `Clip` that ``forward`` reads (empty: no training). An instance may narrow or
      widen its class's, where that depends on its options: read it from the instance.
    - ``borrowed`` names the submodules that are held frozen and belong to somebody else (the autoencoders): they are
      neither trained nor saved with the predictor.
    - ``needs_vaes`` names the autoencoders (``frame``, ``flow``) without which it cannot be built.
    - ``context`` is the number of observed frames: a training clip has ``context + k`` frames, and the loss covers
      the k frames after the context.
    """

    needs: ClassVar[frozenset[str]] | frozenset[str] = frozenset()  # pyright: ignore[reportGeneralTypeIssues]
    borrowed: ClassVar[frozenset[str]] = frozenset()
    needs_vaes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *, height: int, width: int, context: int) -> None:
        super().__init__()
        self.height, self.width, self.context = height, width, context

    @abstractmethod
    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss to minimise, and its raw terms, unweighted, for the log."""

    @abstractmethod
    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """Predict ``horizon`` frames. Randomness comes from ``generator`` alone."""

    def train(self, mode: bool = True) -> Predictor:
        """As in `nn.Module`, but what is borrowed stays in evaluation mode."""
        super().train(mode)
        for name in self.borrowed:
            getattr(self, name).eval()
        return self

    def freeze(self, names: Sequence[str]) -> None:
        """Modules that keep their weights in training. Raises ValueError for a name that is no module of its own."""
        own = [name for name, _ in self.named_children() if self._is_own(name)]
        if unknown := [name for name in names if name not in own]:
            raise ValueError(f"there is no module {', '.join(unknown)} to freeze; there are: {', '.join(own)}")
        for name in names:
            self.get_submodule(name).requires_grad_(False)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, without those of borrowed modules."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad and self._is_own(n)}

    def own_state(self) -> dict[str, Tensor]:
        """The state dict without borrowed modules: what a checkpoint holds."""
        return {n: value for n, value in self.state_dict().items() if self._is_own(n)}

    def _is_own(self, name: str) -> bool:
        return name.split(".", 1)[0] not in self.borrowed


def available() -> list[str]:
    """Names of all predictors: the files of ``models/predictors``."""
    return sorted(module.name for module in pkgutil.iter_modules(models.predictors.__path__))


def find(name: str) -> tuple[type[BaseModel], type[Predictor]]:
    """The options and the class of a predictor. Raises ValueError listing the names there are."""
    if name not in available():
        raise ValueError(f"no predictor is called {name!r}; there are: {', '.join(available())}")
    module = importlib.import_module(f"models.predictors.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Predictor) and value.__module__ == module.__name__
    ]
    if len(classes) != 1 or not hasattr(module, "Options"):
        found = [c.__name__ for c in classes]
        raise TypeError(f"{module.__name__} must hold `Options` and exactly one Predictor; its predictors: {found}")
    return module.Options, classes[0]


def build(name: str, options: dict[str, Any], *, vaes: Vaes, height: int, width: int, context: int) -> Predictor:
    """A predictor with fresh weights, made from plain options (checked strictly by its ``Options``).

    ``height`` and ``width`` in pixels, ``context`` in frames. It is given those of ``vaes`` that it needs. Raises
    ValueError for an unknown name or a missing VAE, pydantic's ValidationError for options that do not exist or fit.
    """
    schema, kind = find(name)
    if missing := sorted(kind.needs_vaes - set(vaes)):
        raise ValueError(f"predictor {name!r} works on latents and needs a {missing[0]} VAE; none was given")
    constructor: Any = kind
    return constructor(
        schema.model_validate(options),
        vaes={key: vaes[key] for key in sorted(kind.needs_vaes)},
        height=height,
        width=width,
        context=context,
    )
