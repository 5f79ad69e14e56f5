"""One training loop for every predictor, and for the autoencoders too: AdamW, warm-up and cosine, EMA, clipping.

A loop is told what to minimise by calling ``model(batch) -> (loss, logs)`` and nothing else. Budgets are steps, or
seconds where they run out first. The same seed gives the same weights bit for bit on a CPU, but for a budget of
seconds. A loss or gradient that is not finite stops the loop *before* the update it would have caused.

Where `torch.distributed` is initialised (torchrun) every process gives its share of each batch; gradients and terms
are averaged, so what is minimised is the mean over the whole batch.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.clips import FIELDS, PAIRS, Clip
from data.errors import CompilerError, EmptyError, NonFiniteError
from models.predictor import Predictor
from models.training_state import Keeping, Running

Progress = Callable[[int, dict[str, float]], None]

MOST_HORIZONS = 64
"""How often `torch.compile` may compile one model anew; it does so for every horizon of the ramp."""


class TrainingOptions(BaseModel):
    """How to train: budgets in optimiser steps, or in seconds where they run out first."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    steps: int = Field(default=300, ge=0, description="optimiser steps; 0 trains nothing")
    seconds: float | None = Field(
        default=None,
        gt=0,
        description="also stop after the step in which so many seconds of training are over; the schedule then follows "
        "the clock where it is ahead of the steps, and a run does not repeat",
    )
    learning_rate: float = Field(default=2e-3, gt=0, description="peak of the schedule")
    warmup: int = Field(default=20, ge=0, description="steps of linear warm-up; then a cosine down")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's, on weights of two dimensions and more")
    ema: float = Field(default=0.98, ge=0, lt=1, description="decay of the averaged weights that are kept")
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="bfloat16 is autocast")
    compile: bool = Field(default=False, description="through torch.compile: faster after a wait, needs a compiler")
    horizon_start: int = Field(default=2, ge=1, description="predicted frames in the loss at the first step")
    horizon_ramp: float = Field(
        default=0.5, ge=0, le=1, description="share of the steps until the whole horizon counts"
    )


@dataclass(frozen=True)
class TrainResult:
    """Curves have one value per step: ``loss``, every raw term, ``grad_norm``, ``learning_rate`` and ``horizon``.

    ``steps`` and ``seconds`` count what a resumed run had done before, too.
    """

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
    keeping: Keeping | None = None,
) -> TrainResult:
    """Train a predictor on clips of ``context + horizon`` frames; it holds the averaged weights afterwards.

    The horizon in the loss grows linearly from ``horizon_start`` to all that the clips hold. ``progress`` is called
    after every step with the step's number from 1 and its raw terms. Raises NonFiniteError naming step and term,
    EmptyError when the clips run out early, CompilerError where ``compile`` finds no compiler.
    """

    def prepare(clip: Clip, place: float | int) -> tuple[Clip, dict[str, float]]:
        frames = _length(clip)
        horizon = horizon_at(place, frames - predictor.context, options)
        return crop(clip, predictor.context + horizon).to(device), {"horizon": float(horizon)}

    predictor.to(device).train()
    parameters = predictor.own_parameters()
    result = optimise(predictor, parameters, clips, prepare, options, device=device, progress=progress, keeping=keeping)
    predictor.eval()
    return result


def optimise(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: Iterable[Any],
    prepare: Callable[[Any, float | int], tuple[Any, dict[str, float]]],
    options: TrainingOptions,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    keeping: Keeping | None = None,
) -> TrainResult:
    """The loop itself: minimise ``model(batch)[0]`` over ``parameters``. ``prepare(batch, place)`` comes before it;
    ``place`` is where on the schedule of ``options.steps`` the step stands: its number from 0, or more by the clock.
    """
    device, keeping = torch.device(device), keeping or Keeping()
    optimiser = _adamw(parameters, options)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    running = Running(model, parameters, average, optimiser, device, keeping.generators)
    step, before = 0, 0.0
    if keeping.state is not None:
        step, before = keeping.state.step, keeping.state.seconds
        running.restore(keeping.state)
        _part_from_the_first()
    called = _called(model, device, options)
    source = iter(batches)
    began = kept = time.perf_counter()

    def elapsed() -> float:
        return before + time.perf_counter() - began

    while step < options.steps and (spent := _spent(elapsed(), options, device)) < 1:
        batch = next(source, None)
        if batch is None:
            raise EmptyError(
                f"the training data ended at step {step} of {options.steps}", remedy="let the loader repeat its epochs"
            )
        place = max(step, spent * options.steps)
        batch, extras = prepare(batch, place)
        rate = learning_rate_at(step, options, place)
        for group in optimiser.param_groups:
            group["lr"] = rate
        with autocast(device, options.precision):
            loss, logs = called(batch)
        terms = _over_ranks({name: value.detach() for name, value in {"loss": loss, **logs}.items()})
        _stop_if_not_finite(step, terms)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), options.clip_norm))
        _stop_if_not_finite(step, {"the gradient's norm": norm})
        optimiser.step()
        _average(average, parameters, options.ema, step)
        step += 1
        record = {**terms, "grad_norm": norm, "learning_rate": rate, **extras}
        for name, value in record.items():
            running.curves.setdefault(name, []).append(value)
        if progress is not None:
            progress(step, record)
        if keeping.save is not None and _due(step, time.perf_counter() - kept, keeping):
            keeping.save(running.snapshot(step, elapsed()))
            kept = time.perf_counter()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    return TrainResult(step, elapsed(), running.curves)


def learning_rate_at(step: int, options: TrainingOptions, place: float | int | None = None) -> float:
    """Linear warm-up to the peak, then a cosine down to a hundredth of it at the last step.

    Warm-up counts the steps that were made; the cosine follows ``place`` (by default ``step``), see `optimise`.
    """
    place = step if place is None else place
    peak = options.learning_rate
    if step < options.warmup:
        peak = peak * (step + 1) / options.warmup
    done = max(place - options.warmup, 0) / max(options.steps - options.warmup, 1)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def horizon_at(place: float | int, longest: int, options: TrainingOptions) -> int:
    """Predicted frames that count at ``place`` of the schedule (in steps), never more than the clip holds."""
    if longest < 1:
        raise EmptyError(
            "the training clips hold no frame after the context", remedy="make the clips longer than the context"
        )
    ramp = options.horizon_ramp * options.steps
    share = 1.0 if place >= ramp else place / ramp
    first = min(options.horizon_start, longest)
    return first + math.floor(share * (longest - first))


def crop(clip: Clip, frames: int) -> Clip:
    """The first ``frames`` frames of every window, with the flow and visibility between them."""
    held = {name: value for name in FIELDS if (value := getattr(clip, name)) is not None}
    return replace(clip, **{name: value[:, : frames - (name in PAIRS)] for name, value in held.items()})


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


def _called(model: nn.Module, device: torch.device, options: TrainingOptions) -> Callable[[Any], Any]:
    """Under torchrun the call goes through DistributedDataParallel, which synchronises gradients on ``__call__``."""
    called: nn.Module = model
    if _together():
        called = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if not options.compile:
        return called
    _require_compiler(device)
    compiled: Any = torch.compile(called, recompile_limit=MOST_HORIZONS)  # pyright: ignore[reportCallIssue]
    return compiled


def _require_compiler(device: torch.device) -> None:
    variable, usual = ("CXX", ("g++",)) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    wanted = (os.environ[variable],) if os.environ.get(variable) else usual
    if not any(shutil.which(name) for name in wanted):
        raise CompilerError(
            f"training.compile is true and {' or '.join(wanted)} is not there",
            remedy=f"install gcc (apt install g++), name a compiler in {variable}, or set compile: false",
        )


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _over_ranks(terms: dict[str, Tensor]) -> dict[str, float]:
    """The terms of the whole batch, from those of every process' equal share."""
    if _together():
        stacked = torch.stack([value.float() for value in terms.values()])
        dist.all_reduce(stacked)
        terms = dict(zip(terms, stacked / dist.get_world_size(), strict=True))
    return {name: float(value) for name, value in terms.items()}


def _spent(elapsed: float, options: TrainingOptions, device: torch.device) -> float:
    """Share of the budget of seconds that is over; by the first process' clock, so that all stop at the same step."""
    if options.seconds is None:
        return 0.0
    share = torch.tensor(elapsed / options.seconds, dtype=torch.float64, device=device)
    if _together():
        dist.broadcast(share, 0)
    return float(share)


def _part_from_the_first() -> None:
    """A state holds the random numbers of the first process; the others must not repeat its noise."""
    if _together() and dist.get_rank():
        torch.manual_seed(int(torch.randint(2**31, ())) + dist.get_rank())


def _due(step: int, since: float, keeping: Keeping) -> bool:
    return step % keeping.every_steps == 0 if keeping.every_steps else since >= keeping.every_seconds


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
