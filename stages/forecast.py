"""A trained predictor run on anyone's video: what `clevrcast predict` and its Python call do.

Frames are taken at the rate that the model was trained at, and the teacher's flow and visibility between them are
computed, rounded and resized exactly as the stages do it: on a video of the data set a forecast is the evaluation's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from data.clips import Context, flow_on_grid, frames_on_grid, visible_on_grid
from data.errors import EmptyError, NonFiniteError, SourceError, VideoError
from data.film import Film, Request
from data.footage import STILL, Footage, FootageReader, find_videos
from data.framing import Fit
from data.store import unpack_flow
from data.world import FPS
from models.checkpoint import CheckpointMeta
from models.flow_teachers import FlowTeacher
from models.predictor import Predictor, Rollout, build
from pipeline.params import Params
from stages.flow import taught, teacher_of
from stages.occlusion import seen_before

MEMORY = 2 << 30
"""Bytes that one forecast may take."""
_BYTES_PER_PIXEL = 250
"""Of one predicted step: floats of four films, their pictures side by side and enlarged, and the model's own states."""
BASELINES = ("copy_last", "advect")
FEW = 16
"""Frames below which their median is a poor background."""
MOVING_SHARE = 0.5


@dataclass(frozen=True)
class Start:
    """Where a forecast's first observed frame is: at ``seconds``, or at frame ``number`` of the video."""

    seconds: float = 0.0
    number: int | None = None

    def __str__(self) -> str:
        return f"{self.seconds:g}s" if self.number is None else str(self.number)


def start_at(given: str | float) -> Start:
    """``40`` or "40" is a frame, 1.6 or "1.6s" a number of seconds. Raises ValueError for anything else."""
    text = str(given).strip()
    if text.isascii() and text.isdecimal():
        return Start(number=int(text))
    seconds = float(text.removesuffix("s"))
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{given!r} is not a time from 0 on")
    return Start(seconds=seconds)


@dataclass(frozen=True)
class Forecast:
    """What was predicted of one video, on the model's grid (h, w), and what it was predicted from.

    ``observed`` are the ``x`` frames of the context, ``frames`` the ``y`` predicted ones, ``truth`` what the video
    shows then, as far as it goes on; in [0, 1]. ``boxes``, ``presence`` and ``collision`` as in
    `models.predictor.Rollout`, None for predictors that have none. ``baselines`` are the frames of `BASELINES`.
    ``errors[name]`` is the mean squared error of ``predicted`` and the baselines at every step with a truth.
    ``notes`` says in sentences what anyone should know who looks at the result.
    """

    footage: Footage
    film: Film
    start: Start
    predictor: Predictor
    key: str
    chosen: str
    meta: CheckpointMeta
    params: Params
    seed: int
    fit: Fit
    observed: Float[Tensor, "x 3 h w"]
    frames: Float[Tensor, "y 3 h w"]
    truth: Float[Tensor, "z 3 h w"]
    boxes: Float[Tensor, "y n 4"] | None
    presence: Float[Tensor, "y n"] | None
    collision: Float[Tensor, " y"] | None
    flow_bwd: Float[Tensor, "x-1 2 h w"]
    baselines: dict[str, Float[Tensor, "y 3 h w"]]
    errors: dict[str, list[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def step_seconds(self) -> float:
        return self.params.decode.stride / FPS

    def save(self, folder: Path | str) -> None:
        """Write ``clip.mp4``, ``strip.png`` and ``prediction.json`` into a folder, which is made."""
        from stages.forecast_files import save

        save(self, Path(folder))


class Forecaster:
    """A trained predictor and all that it takes to show it a video. ``chosen`` says why it is this one."""

    def __init__(
        self, key: str, predictor: Predictor, meta: CheckpointMeta, params: Params, *, device: str, chosen: str
    ) -> None:
        self.key, self.predictor, self.meta, self.params = key, predictor.to(device).eval(), meta, params
        self.device, self.chosen = device, chosen
        self.reader = FootageReader(timeout=params.decode.timeout)

    @property
    def step_seconds(self) -> float:
        """Between two frames that the model sees."""
        return self.params.decode.stride / FPS

    @functools.cached_property
    def teacher(self) -> FlowTeacher:
        return teacher_of(self.params.flow.model_copy(update={"teacher": self.teacher_name}), self.device)

    @property
    def teacher_name(self) -> str:
        """The parameters' teacher; `scene` copies the truth of annotations, which nobody's video has."""
        return "dis" if self.params.flow.teacher == "scene" else self.params.flow.teacher

    def predict(
        self,
        video: Path | str | Footage,
        *,
        start: str | float | Start = 0,
        horizon: int | None = None,
        fit: Fit = "crop",
        fps: float | None = None,
        seed: int = 0,
    ) -> Forecast:
        """Show the predictor the frames from ``start`` on (a frame as int, seconds as float) and let it go on.

        ``horizon`` in steps of the model (`step_seconds`), that of the evaluation if None. ``fps`` replaces the times
        that the file gives; of a folder of pictures it is the rate (by default one picture a step). ``seed`` is of
        predictors that draw.

        Raises:
            VideoError: it cannot be read, or has fewer frames than the predictor has to see.
            SourceError: there is no such file, or it is a folder of several videos.
            EmptyError: the horizon is not positive or would not fit into `MEMORY`.
            NonFiniteError: the predictor went astray.
        """
        footage = video if isinstance(video, Footage) else _single(Path(video))
        start = start if isinstance(start, Start) else start_at(start)
        steps = self.params.evaluate.horizon if horizon is None else horizon
        self._check_horizon(steps)
        film = self.reader.read(footage, self._request(start, steps, fit, fps))
        context = self._context(footage, film)
        # Outside inference mode, as the evaluation: a predictor may take gradients.
        moved = Context(*(part.to(self.device) for part in (context.frames, context.flow_bwd, context.visible)))
        with torch.inference_mode():
            out = self.predictor.rollout(moved, steps, torch.Generator(self.device).manual_seed(seed))
            baselines = {name: self._baseline(name, moved, steps) for name in BASELINES}
        _check(out, self.key)
        frames = out.frames[0].float().cpu().clamp(0, 1)
        truth = self._truth(film, steps)
        errors = {
            name: (made[: len(truth)] - truth).square().mean(dim=(1, 2, 3)).tolist()
            for name, made in {"predicted": frames, **baselines}.items()
        }
        boxes, presence, collision = (
            None if value is None else value[0].float().cpu() for value in (out.boxes, out.presence, out.collision)
        )
        return Forecast(
            footage, film, start, self.predictor, self.key, self.chosen, self.meta, self.params, seed, fit,
            context.frames[0], frames, truth, boxes, presence, collision, context.flow_bwd[0], baselines, errors,
            tuple(self._notes(film, context)),
        )  # fmt: skip

    def close(self) -> None:
        """End the process that reads videos; it would end with this one."""
        self.reader.close()

    def _request(self, start: Start, steps: int, fit: Fit, fps: float | None) -> Request:
        count = self.predictor.context + steps
        return Request(
            seconds=start.seconds,
            number=start.number,
            step=self.step_seconds,
            count=count,
            grid=(self.predictor.height, self.predictor.width),
            view=self.params.flow.resolution,
            scene=max(self.params.decode.steps, self.predictor.context),
            fit=fit,
            fps=fps,
        )

    def _check_horizon(self, steps: int) -> None:
        per_step = _BYTES_PER_PIXEL * self.predictor.height * self.predictor.width
        most = MEMORY // per_step
        if steps < 1 or steps > most:
            need = f" needs about {steps * per_step / 2**30:.1f} GiB" if steps > most else ""
            raise EmptyError(
                f"a horizon of {steps} steps{need}; from 1 to {most} ({most * self.step_seconds:.0f} s) can be made",
                remedy="give another --horizon, or predict from several --start",
            )

    def _pictures(self, film: Film) -> dict[int, UInt8[np.ndarray, "h w 3"]]:
        return film.pictures[self.predictor.height, self.predictor.width]

    def _context(self, footage: Footage, film: Film) -> Context:
        x, h, w = self.predictor.context, self.predictor.height, self.predictor.width
        grid, view = self._pictures(film), film.pictures[self.params.flow.resolution]
        found = next((k for k in range(x) if k not in grid or k not in view), x)
        if found < x or (film.about.frames or x) < x:
            raise _too_short(footage, film, found, x, self.step_seconds, self.key)
        frames = frames_on_grid(np.stack([grid[k] for k in range(x)]), h, w)
        scene = torch.from_numpy(np.stack([view[k] for k in sorted(view)]))
        seen = torch.from_numpy(np.stack([view[k] for k in range(x)]))
        flows = taught(self.teacher, self.params.flow.gate, seen, scene)
        fwd, bwd = (unpack_flow(flows[name]) for name in ("flow_fwd", "flow_bwd"))
        visible = seen_before(fwd, bwd, self.params.occlusion, self.device)
        return Context(
            frames.float()[None] / 255,
            flow_on_grid(flows["flow_bwd"], h, w).float()[None],
            visible_on_grid(visible, h, w).float()[None],
        )

    def _truth(self, film: Film, steps: int) -> Float[Tensor, "z 3 h w"]:
        grid, x = self._pictures(film), self.predictor.context
        goes_on = next((k for k in range(steps) if x + k not in grid), steps)
        shown = np.stack([grid[x - 1 + k] for k in range(goes_on + 1)])[1:]
        return frames_on_grid(shown, self.predictor.height, self.predictor.width).float() / 255

    def _baseline(self, name: str, context: Context, steps: int) -> Float[Tensor, "y 3 h w"]:
        h, w = context.frames.shape[-2:]
        baseline = build(name, {}, vaes={}, height=h, width=w, context=context.frames.shape[1])
        return baseline.rollout(context, steps, torch.Generator(self.device)).frames[0].cpu()

    def _notes(self, film: Film, context: Context) -> list[str]:
        x, step, about, notes = self.predictor.context, self.step_seconds, film.about, []
        taken = [film.times[k] for k in range(x)]
        if (distinct := len(set(taken))) < x:
            notes.append(
                f"only {distinct} of the {x} observed frames are different pictures: the video has {about.rate:.4g} "
                f"frames/s, the model sees {1 / step:.4g}; --fps {1 / step:.4g} would show it every picture as a step"
            )
        scene = film.pictures[self.params.flow.resolution]
        if self.params.flow.gate.enabled and len(scene) < FEW:
            notes.append(
                f"the background is the median of {len(scene)} frames only: of what moves slowly the teacher's flow "
                "may keep the edges alone"
            )
        moving = float((context.flow_bwd.norm(dim=2) > 0).float().mean())
        if self.params.flow.gate.enabled and moving > MOVING_SHARE:
            notes.append(
                f"{100 * moving:.0f} % of the picture moves: the camera seems to, and the model knows a fixed one only"
            )
        if moving == 0:
            notes.append("nothing moves in the observed frames; --start chooses others")
        if self.teacher_name != self.params.flow.teacher:
            notes.append("the flow teacher is dis: scene copies annotations, which this video has none of")
        if about.hdr:
            notes.append("the video is HDR and its colours are taken as they are stored: they look paler than they are")
        return [*notes, *film.damage]


def _single(path: Path) -> Footage:
    found = find_videos(path)
    if len(found.videos) != 1:
        raise SourceError(f"{path} holds {len(found.videos)} videos", remedy="give one of them")
    return next(iter(found.videos))


def _too_short(footage: Footage, film: Film, found: int, needed: int, step: float, key: str) -> VideoError:
    about = film.about
    if about.frames == 1 and about.ended:
        return VideoError(f"{footage.path}: it has 1 frame only: a still picture", remedy=STILL)
    size = " and ".join([*([f"has {about.frames} frames"] if about.frames else []), f"ends at {about.end:.2f} s"])
    if not about.ended:
        size = f"has {about.frames} frames" if about.frames else "goes on"
    damage = f" ({'; '.join(film.damage)})" if film.damage else ""
    if about.frames and about.ended and about.frames < needed:
        said, remedy = f"{key} needs {needed} frames", "give a longer video"
    else:
        said = (
            f"from {film.start:.2f} s on there are {found} of the {needed} frames that {key} needs, "
            f"{step:g} s apart ({1 / step:g} frames/s)"
        )
        remedy = "give a longer video, another --start, or the rate at which to take it with --fps"
    return VideoError(f"{footage.path}: it {size}{damage}; {said}", remedy=remedy)


def _check(out: Rollout, key: str) -> None:
    bad = [k + 1 for k in range(out.frames.shape[1]) if not bool(torch.isfinite(out.frames[:, k]).all())]
    if bad:
        raise NonFiniteError(
            f"{key} predicted colours that are no numbers from step {bad[0]} on",
            remedy="give a shorter --horizon, or another --predictor",
        )
