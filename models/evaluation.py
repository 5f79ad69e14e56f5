"""Evaluation: roll a predictor out on held-out windows, add up statistics, keep a few windows to look at.

One pass over the windows. Memory holds one batch, one row of sums per video and a fixed number of example windows,
however many windows there are (OpenSTL issue 66). `models.results` writes what comes out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, UInt8
from torch import Tensor, nn

from data.clips import Context
from data.errors import EmptyError
from data.picture import to_uint8
from models.examples import Example, Examples
from models.object_statistics import box_statistics, collision_histograms, collision_statistics
from models.predictor import Predictor, Rollout
from models.statistics import (
    Moments,
    State,
    Statistic,
    check_finite,
    flow_statistics,
    merge,
    moments_of,
    picture_statistics,
    state_of,
    visibility_statistics,
)
from models.temporal_statistics import (
    consistency_statistics,
    perceptual_statistics,
    smoothness_statistics,
)
from models.video_features import FilmFeatures

_PENDING = 32
_PROBABILITIES = ("presence", "collision")
Distance = Callable[[Tensor, Tensor], Tensor]
"""One number for each of n pairs of pictures (n, 3, h, w) in [0, 1]."""


@runtime_checkable
class Encoder(Protocol):
    """Gives one vector for each of n pictures (n, 3, h, w) in [0, 1]."""

    def summary(self, frames: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Networks:
    """What some metrics are measured with, on the device of the evaluation; without it they are not measured.

    ``perceptual`` is LPIPS; ``encoders`` give features of pictures, by the name of the consistency that they measure;
    ``films`` give features of films (observed and predicted frames), by the name of the distance (``fvd``, ``jedi``).
    ``smoothness`` needs no weights, but a second of a CPU for some hundred frames.
    """

    perceptual: Distance | None = None
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    films: Mapping[str, FilmFeatures] = field(default_factory=dict)
    smoothness: bool = False

    @property
    def modules(self) -> list[nn.Module]:
        """Those that have weights."""
        every = (self.perceptual, *self.encoders.values(), *self.films.values())
        return [network for network in every if isinstance(network, nn.Module)]


NO_NETWORKS = Networks()


@dataclass(frozen=True)
class Window:
    """A batch of ``b`` evaluation windows: what a rollout may see (``context``) and what happened then.

    ``frames`` in [0, 1]; ``foreground`` (above 0.5: a moving or movable object) belongs to ``frames``.
    ``true_flow_bwd[:, k]`` lives on future frame k and points to the frame before it, in pixels of (h, w);
    ``true_visible`` likewise, 1 where that pixel was visible in the frame before. ``true_boxes`` (x0, y0, x1, y1)
    in pixels of (h, w), exclusive ends, where ``true_presence`` is 1; ``true_collision[:, k]`` is 1 when something
    collides between the frame before and future frame k. None where there is no truth.
    """

    video: Int[Tensor, " b"]
    start: Int[Tensor, " b"]
    context: Context
    frames: Float[Tensor, "b y 3 h w"]
    foreground: Float[Tensor, "b y h w"] | Bool[Tensor, "b y h w"] | None = None
    true_flow_bwd: Float[Tensor, "b y 2 h w"] | None = None
    true_visible: Float[Tensor, "b y 1 h w"] | None = None
    true_boxes: Float[Tensor, "b y n 4"] | None = None
    true_presence: Float[Tensor, "b y n"] | None = None
    true_collision: Float[Tensor, "b y"] | None = None


@dataclass(frozen=True)
class Speed:
    """Frames predicted and the seconds they took: the rollout alone, without loading and without the first batch
    (which warms up) when there are more."""

    frames: int
    seconds: float

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.seconds


@dataclass(frozen=True)
class Evaluation:
    """What one predictor did on all windows. Everything but ``speed`` (None when read back from a
    folder) repeats with the seed. ``parameters`` counts everything that a rollout runs, frozen and borrowed modules
    included. ``protocol`` is known of what was read back."""

    name: str
    state: State
    parameters: int
    examples: tuple[Example, ...]
    speed: Speed | None
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @property
    def windows(self) -> int:
        return int(self.state.statistics["ssim"].count[:, 0].sum())


def evaluate(
    predictor: Predictor,
    windows: Iterable[Window],
    *,
    name: str,
    seed: int,
    device: torch.device | str = "cpu",
    moving_px: float = 0.5,
    frame_stride: int = 1,
    networks: Networks = NO_NETWORKS,
) -> Evaluation:
    """Rolls ``predictor`` out on every window, in evaluation mode and `torch.inference_mode`.

    Each batch draws from a generator (on ``device``) seeded by ``seed`` and the batch's first window, so that a
    result does not depend on the batches before it. ``moving_px`` divides moving from background pixels in the
    end-point errors, ``frame_stride`` source frames lie between two steps (for tolerances in time). Raises `EmptyError`
    without windows, `NonFiniteError` naming video, window and step, and `ValueError` for a rollout of another shape or
    with colours or probabilities outside [0, 1].
    """
    device = torch.device(device)
    was_training = predictor.training
    predictor.to(device).eval()

    def predict(window: Window) -> Rollout:
        first = [seed, int(window.video[0]), int(window.start[0])]
        generator = torch.Generator(device).manual_seed(int(np.random.SeedSequence(first).generate_state(1)[0]))
        return predictor.rollout(window.context, window.frames.shape[1], generator)

    try:
        parameters = sum(p.numel() for p in predictor.parameters())
        measures = _Measures(moving_px, frame_stride, networks)
        return _measure(predict, windows, name, seed, device, measures, parameters)
    finally:
        predictor.train(was_training)


def evaluate_reconstruction(
    reconstruct: Callable[[Float[Tensor, "n 3 h w"]], Float[Tensor, "n 3 h w"]],
    windows: Iterable[Window],
    *,
    name: str,
    seed: int,
    device: torch.device | str = "cpu",
    parameters: int = 0,
    networks: Networks = NO_NETWORKS,
) -> Evaluation:
    """The ceiling of everything that predicts latents: the *true* future through encoder and decoder.

    The same windows, statistics and errors as `evaluate`. Results are cut to [0, 1], as a decoder may overshoot.
    """

    def predict(window: Window) -> Rollout:
        b, y = window.frames.shape[:2]
        return Rollout(reconstruct(window.frames.flatten(0, 1)).clamp(0, 1).unflatten(0, (b, y)))

    return _measure(predict, windows, name, seed, torch.device(device), _Measures(networks=networks), parameters)


@dataclass(frozen=True)
class _Measures:
    moving_px: float = 0.5
    frame_stride: int = 1
    networks: Networks = NO_NETWORKS


def _measure(
    predict: Callable[[Window], Rollout],
    windows: Iterable[Window],
    name: str,
    seed: int,
    device: torch.device,
    measures: _Measures,
    parameters: int,
) -> Evaluation:
    pending: list[State] = []
    examples = Examples(seed)
    warmup, rest = Speed(0, 0.0), Speed(0, 0.0)
    for batch in windows:
        window = _on(batch, device)
        with torch.inference_mode():
            rollout, seconds = _timed(predict, window, device)
            _check(rollout, window, name)
            statistics = _statistics(rollout, window, measures)
            moments = _moments(rollout, window, measures.networks.films)
        pending.append(state_of(window.video.cpu().numpy(), statistics, _histograms(rollout, window), moments))
        if len(pending) == _PENDING:
            pending = [merge(*pending)]
        b, y = window.frames.shape[:2]
        if warmup.frames == 0:
            warmup = Speed(b * y, seconds)
        else:
            rest = Speed(rest.frames + b * y, rest.seconds + seconds)
        _offer(examples, statistics, rollout, window)
    if not pending:
        raise EmptyError(
            f"{name}: there is no window to evaluate",
            remedy="check the split, the number of frames per video, and context + horizon of the protocol",
        )
    return Evaluation(name, merge(*pending), parameters, examples.chosen(), rest if rest.frames else warmup)


def _on(window: Window, device: torch.device) -> Window:
    # Outside inference mode, so that a predictor which adapts at test time can still take gradients.
    moved = {k: v.to(device) for k, v in vars(window).items() if isinstance(v, Tensor)}
    return replace(window, context=Context(**{k: v.to(device) for k, v in vars(window.context).items()}), **moved)


def _timed(predict: Callable[[Window], Rollout], window: Window, device: torch.device) -> tuple[Rollout, float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = now()
    rollout = predict(window)
    return rollout, now() - begin


def _check(rollout: Rollout, window: Window, name: str) -> None:
    if rollout.frames.shape != window.frames.shape:
        raise ValueError(
            f"{name} predicted frames of shape {tuple(rollout.frames.shape)}, "
            f"the window asks for {tuple(window.frames.shape)}"
        )
    for head, values in vars(rollout).items():
        if values is None:
            continue
        if values.shape[:2] != window.frames.shape[:2]:
            raise ValueError(
                f"{name} predicted {head} of shape {tuple(values.shape)} for {window.frames.shape[0]} windows of "
                f"{window.frames.shape[1]} steps"
            )
        check_finite(values, window.video, window.start, f"{name}: {head}")
        if head in _PROBABILITIES and not 0 <= float(values.min()) <= float(values.max()) <= 1:
            raise ValueError(
                f"{name} predicted {head} from {float(values.min()):.4f} to {float(values.max()):.4f}; a probability "
                "must stay in [0, 1]"
            )
    low, high = float(rollout.frames.min()), float(rollout.frames.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"{name} predicted colours from {low:.4f} to {high:.4f}; a rollout must stay in [0, 1]")


def _statistics(rollout: Rollout, window: Window, measures: _Measures) -> dict[str, Statistic]:
    networks = measures.networks
    films = rollout.frames, window.frames, window.context.frames[:, -1]
    out = picture_statistics(*films, window.foreground)
    if networks.perceptual is not None:
        out |= perceptual_statistics(networks.perceptual, *films)
    for name, encoder in networks.encoders.items():
        out |= consistency_statistics(encoder.summary, name, *films)
    if networks.smoothness:
        out |= smoothness_statistics(*films)
    if rollout.flow_bwd is not None and window.true_flow_bwd is not None:
        moving_px = measures.moving_px
        out |= flow_statistics(rollout.flow_bwd, window.true_flow_bwd, window.true_visible, moving_px=moving_px)
    if rollout.visible is not None and window.true_visible is not None:
        out |= visibility_statistics(rollout.visible, window.true_visible)
    if rollout.boxes is not None and window.true_boxes is not None and window.true_presence is not None:
        out |= box_statistics(rollout.boxes, rollout.presence, window.true_boxes, window.true_presence)
    if rollout.collision is not None and window.true_collision is not None:
        out |= collision_statistics(rollout.collision, window.true_collision, frame_stride=measures.frame_stride)
    return out


def _histograms(rollout: Rollout, window: Window) -> dict[str, Float64[np.ndarray, "b _"]]:
    if rollout.collision is None or window.true_collision is None:
        return {}
    return collision_histograms(rollout.collision, window.true_collision)


def _moments(rollout: Rollout, window: Window, networks: Mapping[str, FilmFeatures]) -> dict[str, Moments]:
    observed = window.context.frames
    films = {"said": torch.cat([observed, rollout.frames], 1), "true": torch.cat([observed, window.frames], 1)}
    return {
        f"{name}_{which}": moments_of(torch.cat([features(film) for film in frames.split(1)]))
        for name, features in networks.items()
        for which, frames in films.items()
    }


def _offer(examples: Examples, statistics: dict[str, Statistic], rollout: Rollout, window: Window) -> None:
    error, copy = statistics["squared_error"], statistics["squared_error_copy"]
    mse, mse_copy = error.total / error.count, copy.total / copy.count
    for row in range(len(mse)):

        def make(row: int = row) -> Example:
            return _example(rollout, window, row, mse[row], mse_copy[row])

        place = int(window.video[row]), int(window.start[row])
        gain, motion = float((mse_copy[row] - mse[row]).mean()), float(mse_copy[row].mean())
        collisions = 0 if window.true_collision is None else int((window.true_collision[row] > 0.5).sum())
        examples.offer(gain, motion, *place, make, collisions=collisions)


def _example(
    rollout: Rollout, window: Window, row: int, mse: Float64[np.ndarray, " y"], mse_copy: Float64[np.ndarray, " y"]
) -> Example:
    def picture(frames: Float[Tensor, "b t 3 h w"]) -> UInt8[np.ndarray, "t h w 3"]:
        return to_uint8(frames[row].float().cpu().numpy())

    def field(values: Tensor | None) -> np.ndarray | None:
        return None if values is None else values[row].float().cpu().numpy().astype(np.float16)

    def mask(values: Tensor | None) -> np.ndarray | None:
        return None if values is None else field(values[:, :, 0])

    def exact(values: Tensor | None) -> np.ndarray | None:
        return None if values is None else values[row].float().cpu().numpy()

    return Example(
        rules=(),
        video=int(window.video[row]),
        start=int(window.start[row]),
        context=picture(window.context.frames),
        truth=picture(window.frames),
        prediction=picture(rollout.frames),
        mse=mse,
        mse_copy=mse_copy,
        flow_bwd=field(rollout.flow_bwd),
        visible=mask(rollout.visible),
        true_flow_bwd=field(window.true_flow_bwd),
        true_visible=mask(window.true_visible),
        boxes=exact(rollout.boxes),
        presence=exact(rollout.presence),
        collision=exact(rollout.collision),
        true_boxes=exact(window.true_boxes),
        true_presence=exact(window.true_presence),
        true_collision=exact(window.true_collision),
    )
