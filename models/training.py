"""One training loop for every predictor, and for the frame VAE too: AdamW, warm-up and cosine, EMA, clipping.

A loop is told what to minimise by calling ``model(batch) -> (loss, logs)`` and nothing else. Budgets are steps.
The same seed gives the same weights bit for bit on a CPU. A loss or gradient that is not finite stops the loop
*before* the update it would have caused.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.clips import Clip
from data.errors import EmptyError, NonFiniteError
from models.predictor import Predictor

Progress = Callable[[int, dict[str, float]], None]


class TrainingOptions(BaseModel):
    """How to train: budgets in optimiser steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    steps: int = Field(default=300, ge=1, description="optimiser steps")
    learning_rate: float = Field(default=2e-3, gt=0, description="peak of the schedule")
    warmup: int = Field(default=20, ge=0, description="steps of linear warm-up; then a cosine down")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's, on weights of two dimensions and more")
    ema: float = Field(default=0.98, ge=0, lt=1, description="decay of the averaged weights that are kept")
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="bfloat16 is autocast")
    horizon_start: int = Field(default=2, ge=1, description="predicted frames in the loss at the first step")
    horizon_ramp: float = Field(
        default=0.5, ge=0, le=1, description="share of the steps until the whole horizon counts"
    )


@dataclass
class TrainingState:
    """What it takes to continue a run as if it had never stopped: give it to `train` with the loader at its place."""

    step: int
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimiser: dict[str, Any]
    curves: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """Curves have one value per step: ``loss``, every raw term, ``grad_norm``, ``learning_rate`` and ``horizon``."""

    steps: int
    seconds: float
    curves: dict[str, list[float]]


def train(
    predictor: Predictor,
    clips: Iterator[Clip],
    options: TrainingOptions,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    state: TrainingState | None = None,
    on_state: Callable[[TrainingState], None] | None = None,
    state_every: int = 100,
) -> TrainResult:
    """Train a predictor on clips of ``context + horizon`` frames; it holds the averaged weights afterwards.

    The horizon in the loss grows linearly from ``horizon_start`` to all that the clips hold. ``progress`` is called
    after every step with the step's number from 1 and its raw terms; ``on_state`` every ``state_every`` steps with
    what resumes the run. Raises NonFiniteError naming step and term, EmptyError when the clips run out early.
    """

    def prepare(clip: Clip, step: int) -> tuple[Clip, dict[str, float]]:
        frames = _length(clip)
        horizon = horizon_at(step, frames - predictor.context, options)
        return crop(clip, predictor.context + horizon).to(device), {"horizon": float(horizon)}

    predictor.to(device).train()
    parameters = predictor.own_parameters()
    result = optimise(
        predictor, parameters, clips, prepare, options, device=device, progress=progress,
        state=state, on_state=on_state, state_every=state_every,
    )  # fmt: skip
    predictor.eval()
    return result


def optimise(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: Iterable[Any],
    prepare: Callable[[Any, int], tuple[Any, dict[str, float]]],
    options: TrainingOptions,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    state: TrainingState | None = None,
    on_state: Callable[[TrainingState], None] | None = None,
    state_every: int = 100,
) -> TrainResult:
    """The loop itself: minimise ``model(batch)[0]`` over ``parameters``; ``prepare(batch, step)`` comes before it."""
    device = torch.device(device)
    optimiser = _adamw(parameters, options)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    curves: dict[str, list[float]] = {}
    start = 0
    if state is not None:
        start, curves = state.step, {name: list(values) for name, values in state.curves.items()}
        _copy_into(parameters, state.model)
        average = {name: value.to(device) for name, value in state.average.items()}
        optimiser.load_state_dict(copy.deepcopy(state.optimiser))
    called = _distributed(model, device)
    source = iter(batches)
    began = time.perf_counter()
    for step in range(start, options.steps):
        batch = next(source, None)
        if batch is None:
            raise EmptyError(
                f"the training data ended at step {step} of {options.steps}", remedy="let the loader repeat its epochs"
            )
        batch, extras = prepare(batch, step)
        rate = learning_rate_at(step, options)
        for group in optimiser.param_groups:
            group["lr"] = rate
        with autocast(device, options.precision):
            loss, logs = called(batch)
        terms = {name: float(value.detach()) for name, value in {"loss": loss, **logs}.items()}
        _stop_if_not_finite(step, terms)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), options.clip_norm))
        _stop_if_not_finite(step, {"the gradient's norm": norm})
        optimiser.step()
        _average(average, parameters, options.ema, step)
        record = {**terms, "grad_norm": norm, "learning_rate": rate, **extras}
        for name, value in record.items():
            curves.setdefault(name, []).append(value)
        if progress is not None:
            progress(step + 1, record)
        if on_state is not None and (step + 1) % state_every == 0:
            on_state(_snapshot(step + 1, parameters, average, optimiser, curves))
    _copy_into(parameters, average)
    return TrainResult(options.steps, time.perf_counter() - began, curves)


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """Linear warm-up to the peak, then a cosine down to a hundredth of it at the last step."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    done = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return options.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def horizon_at(step: int, longest: int, options: TrainingOptions) -> int:
    """Predicted frames that count at ``step`` (from 0), never more than the clip holds."""
    if longest < 1:
        raise EmptyError(
            "the training clips hold no frame after the context", remedy="make the clips longer than the context"
        )
    ramp = options.horizon_ramp * options.steps
    share = 1.0 if step >= ramp else step / ramp
    first = min(options.horizon_start, longest)
    return first + math.floor(share * (longest - first))


def crop(clip: Clip, frames: int) -> Clip:
    """The first ``frames`` frames of every window, with the flow and visibility between them."""

    def cut(value: Tensor | None, length: int) -> Tensor | None:
        return None if value is None else value[:, :length]

    return replace(
        clip,
        frames=cut(clip.frames, frames),
        latents=cut(clip.latents, frames),
        flow_bwd=cut(clip.flow_bwd, frames - 1),
        visible=cut(clip.visible, frames - 1),
        flow_latents=cut(clip.flow_latents, frames - 1),
        boxes=cut(clip.boxes, frames),
        presence=cut(clip.presence, frames),
        collision=cut(clip.collision, frames),
    )


def autocast(device: torch.device | str, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast, or nothing at all for float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device_type=torch.device(device).type, dtype=torch.bfloat16)


def _length(clip: Clip) -> int:
    for value, more in ((clip.frames, 0), (clip.latents, 0), (clip.flow_bwd, 1)):
        if value is not None:
            return value.shape[1] + more
    raise ValueError("a training clip needs frames, latents or flow; this one was loaded without any")


def _adamw(parameters: dict[str, nn.Parameter], options: TrainingOptions) -> torch.optim.AdamW:
    if not parameters:
        raise ValueError("this model has nothing to train; baselines are evaluated without training")
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate, betas=(0.9, 0.99))


def _distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """Under torchrun the call goes through DistributedDataParallel, which synchronises gradients on ``__call__``."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def _stop_if_not_finite(step: int, terms: dict[str, float]) -> None:
    bad = {name: value for name, value in terms.items() if not math.isfinite(value)}
    if bad:
        raise NonFiniteError(
            f"training stopped before the update of step {step + 1}: "
            + ", ".join(f"{name} is {value}" for name, value in bad.items()),
            remedy="lower learning_rate or clip_norm, or train with precision: float32",
        )


@torch.no_grad()
def _average(average: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float, step: int) -> None:
    # The decay ramps up, so that the first steps are forgotten: (1 + n) / (10 + n) as in TensorFlow's EMA.
    decay = min(decay, (1 + step) / (10 + step))
    for name, parameter in parameters.items():
        average[name].lerp_(parameter.detach(), 1 - decay)


@torch.no_grad()
def _copy_into(parameters: dict[str, nn.Parameter], values: dict[str, Float[Tensor, "..."]]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _snapshot(
    step: int,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    curves: dict[str, list[float]],
) -> TrainingState:
    return TrainingState(
        step=step,
        model={name: p.detach().cpu().clone() for name, p in parameters.items()},
        average={name: value.cpu().clone() for name, value in average.items()},
        optimiser=copy.deepcopy(optimiser.state_dict()),
        curves={name: list(values) for name, values in curves.items()},
    )
