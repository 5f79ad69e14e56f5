"""Reading anyone's video: the pictures nearest to given times, on given grids, of whatever FFmpeg can decode.

`data.decoders` refuses every file that is not exactly what CLEVRER promised. Here nothing is promised: any size, rate,
container and rotation, times that stutter, a stream that breaks. What is damaged is left out, and everything that
was found is told. Memory holds the pictures that were asked for and no others. It runs in the worker of
`data.footage`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.decoders import filter_graph
from data.framing import Fit, Framing, frame
from data.shots import Shot, shots_of, sought

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

Grid = tuple[int, int]
_SEEK_FROM = 10.0
"""Seconds: what lies nearer to the start is decoded from the start, which cannot go wrong."""
_REFUSED = ("tty", "hls", "concat", "dash", "lavfi")
"""Text that FFmpeg would draw, and lists that name other files."""


@dataclass(frozen=True)
class Request:
    """Pictures every ``step`` seconds from a start on, which is at ``seconds`` or at the frame ``number``.

    ``grid`` (height, width) is wanted for steps 0..count-1, and ``view`` for ``scene`` steps around them: as many
    before the start as there are, if the steps from there on are fewer. ``fps`` replaces the file's own times.
    """

    seconds: float
    number: int | None
    step: float
    count: int
    grid: Grid
    view: Grid
    scene: int
    fit: Fit = "crop"
    fps: float | None = None

    def start(self, rate: float) -> float:
        """The second of step 0."""
        return self.seconds if self.number is None else self.number / rate

    def grids(self, start: float) -> dict[Grid, list[range]]:
        """The steps that are wanted on each grid."""
        before = min(max(0, self.scene - self.count), int(start / self.step + 1e-6))
        wanted: dict[Grid, list[range]] = {self.grid: [range(self.count)]}
        wanted.setdefault(self.view, []).append(range(-before, self.scene - before))
        return wanted


@dataclass(frozen=True)
class About:
    """What a file says of itself; None where it says nothing. ``frames`` are those promised, or those found if it was
    read from start to end; ``rate`` is its average; ``end`` the second after the last picture that was read, which is
    that of the film if ``ended``."""

    container: str
    codec: str
    width: int
    height: int
    rate: float
    turn: int
    pixel_aspect: float
    duration: float | None
    frames: int | None
    hdr: bool = False
    ended: bool = False
    end: float = 0.0


@dataclass
class Film:
    """``pictures[grid][k]`` is step k, where it could be read; ``times[k]`` the second of the picture that was taken.

    ``start`` of step 0 in seconds; ``damage`` says where and why something is missing.
    """

    about: About
    framing: Framing
    start: float
    pictures: dict[Grid, dict[int, np.ndarray]]
    times: dict[int, float] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Refusal:
    """Why there is no film in a file. ``still``: it is a picture."""

    reason: str
    still: bool = False


def load_decoder() -> None:
    """What reading needs, loaded."""
    import av
    import av.filter
    import av.logging

    av.logging.set_level(None)


def read_film(path: str, request: Request) -> Film | Refusal:
    """What ``request`` asks of one video file."""
    import av
    from av.error import FFmpegError
    from av.stream import Disposition

    try:
        # Only this very file: a name is no address, and what a file lists is not fetched.
        container = av.open(f"file:{Path(path).resolve()}", options={"protocol_whitelist": "file"})
    except FFmpegError as error:
        return Refusal(f"FFmpeg cannot read it as a video ({error.strerror})")
    with container:
        kind = container.format.name
        if kind.endswith("_pipe") or kind == "image2":
            return Refusal("it is a still picture", still=True)
        streams = [s for s in container.streams.video if Disposition.attached_pic not in s.disposition]
        if kind in _REFUSED or not streams:
            what = "sound only" if container.streams.audio and kind not in _REFUSED else f"no video in it ({kind})"
            return Refusal(f"there is {what}")
        return _gather(container, streams[0], request)


def read_pictures(paths: list[str], request: Request) -> Film | Refusal:
    """What ``request`` asks of a video whose frames are picture files, ``request.fps`` of them a second."""
    import av
    import cv2

    rate = request.fps or 1 / request.step
    damage: list[str] = []

    def shots() -> Iterator[Shot]:
        broken = False
        for index, path in enumerate(paths):
            image = cv2.imread(path, cv2.IMREAD_COLOR)
            if image is None:
                damage.append(f"{Path(path).name} cannot be read")
                broken = True
                continue
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[..., ::-1], np.uint8), format="rgb24")
            yield Shot(index / rate, picture, True, broken)
            broken = False

    about = About("pictures", Path(paths[0]).suffix[1:].lower(), 0, 0, rate, 0, 1.0, len(paths) / rate, len(paths))
    return _select(shots(), request, about, damage, whole=True)


def _gather(container: InputContainer, stream: VideoStream, request: Request) -> Film | Refusal:
    stream.thread_type = "AUTO"
    rate = float(request.fps or stream.average_rate or stream.guessed_rate or 25)
    pixel = stream.sample_aspect_ratio or Fraction(1)
    duration = stream.duration * stream.time_base if stream.duration and stream.time_base else None
    if duration is None and container.duration:
        duration = Fraction(container.duration, 1_000_000)
    context = stream.codec_context
    about = About(
        container=container.format.name,
        codec=context.name,
        width=context.width,
        height=context.height,
        rate=rate,
        turn=0,
        pixel_aspect=float(pixel) or 1.0,
        duration=None if duration is None else float(duration),
        frames=stream.frames or None,
        hdr=context.color_trc in (16, 18),  # PQ and HLG of BT.2100
    )
    damage: list[str] = []
    start = request.start(rate)
    seek = start - request.scene * request.step - 0.5
    shots = None
    if seek > _SEEK_FROM and request.fps is None and stream.start_time is not None:
        shots = sought(container, stream, seek, damage)
    whole = shots is None
    if shots is None:
        shots = shots_of(container, stream, rate, request.fps is None, damage)
    return _select(shots, request, about, damage, whole=whole)


def _select(shots: Iterator[Shot], request: Request, about: About, damage: list[str], *, whole: bool) -> Film | Refusal:
    """The shot nearest to each step, brought onto the grids; ``whole``: they begin with the first of the film."""
    start = request.start(about.rate)
    grids = request.grids(start)
    ranges = [steps for wanted in grids.values() for steps in wanted]
    steps = iter(range(min(r.start for r in ranges), max(r.stop for r in ranges)))
    film: Film | None = None
    camera: _Camera | None = None
    before: Shot | None = None
    count, step = 0, next(steps, None)
    for shot in shots:
        count += 1
        if camera is None or film is None:
            camera = _Camera(request, grids, shot.picture, about.pixel_aspect)
            stored = shot.picture
            about = replace(about, width=stored.width, height=stored.height, turn=camera.framing.turn)
            film = Film(about, camera.framing, start, {grid: {} for grid in grids}, damage=damage)
        while step is not None and (at := start + step * request.step) <= shot.seconds + 1e-6:
            nearest = shot if before is None or shot.seconds - at < at - before.seconds - 1e-6 else before
            if nearest.good and (not shot.after_damage or abs(nearest.seconds - at) <= 0.75 / about.rate):
                camera.take(film, step, nearest)
            step = next(steps, None)
        before = shot
        if step is None:
            break
    if film is None or camera is None or before is None:
        return Refusal(damage[0] if damage else "there is no picture in its video stream")
    end = before.seconds + 1 / about.rate
    while step is not None and start + step * request.step < before.seconds + 0.5 / about.rate and before.good:
        camera.take(film, step, before)
        step = next(steps, None)
    ended = step is not None or next(shots, None) is None
    if ended and whole and about.frames and about.frames > count:
        damage.append(f"it promises {about.frames} frames and holds {count}")
    film.about = replace(about, ended=ended, end=end, frames=count if ended and whole else about.frames)
    return film


class _Camera:
    """Brings pictures onto the grids; each picture once, however many steps it serves."""

    def __init__(self, request: Request, grids: Mapping[Grid, list[range]], first: VideoFrame, pixel: float) -> None:
        self.request, self.grids, self.pixel = request, grids, Fraction(pixel).limit_denominator(1000)
        self.framing = self._framing(first)
        self._graphs: dict[tuple[Any, ...], Any] = {}
        self._done: tuple[float, dict[Grid, np.ndarray]] = (-1.0, {})

    def take(self, film: Film, step: int, shot: Shot) -> None:
        if self._done[0] != shot.seconds:
            self._done = (shot.seconds, {})
        for grid, ranges in self.grids.items():
            if any(step in steps for steps in ranges):
                if grid not in self._done[1]:
                    self._done[1][grid] = self._draw(shot.picture, grid)
                film.pictures[grid][step] = self._done[1][grid]
        film.times[step] = shot.seconds

    def _framing(self, picture: VideoFrame) -> Framing:
        height, width = self.request.grid
        turn = round(-picture.rotation / 90) * 90 % 360
        return frame(
            picture.width, picture.height, Fraction(width, height), fit=self.request.fit, turn=turn, pixel=self.pixel
        )

    def _draw(self, picture: VideoFrame, grid: Grid) -> np.ndarray:
        # A stream may change its size on the way.
        key = (grid, picture.width, picture.height, picture.format.name, picture.rotation)
        if key not in self._graphs:
            buffer = {
                "width": picture.width,
                "height": picture.height,
                "format": picture.format,
                "time_base": picture.time_base or Fraction(1, 1000),
            }
            self._graphs[key] = filter_graph(buffer, self._framing(picture).filters(*grid))
        self._graphs[key].push(picture)
        return self._graphs[key].pull().to_ndarray()
