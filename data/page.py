"""The report page: plain records in, one HTML file out that opens offline and asks for nothing from outside.

Knows no model and no stage. `PageContent` is a tree of frozen records; whatever is None or empty is left out or said
to be absent, never shown as zero. All text is escaped. The same content gives the same bytes.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup

from data.chart import Chart, draw_chart
from data.picture import ERROR_FULL_SCALE, encode_png, encode_video, error_legend, error_picture

Film = UInt8[np.ndarray, "t h w 3"]

_ATLAS_COLUMNS = 4
_BLOCK_PX = 16
_COLOURS = 13
_EXTRA = (
    ("LPIPS\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}", "lpips", 4),
    ("Box IoU\N{NO-BREAK SPACE}\N{UPWARDS ARROW}", "box_iou", 3),
    ("Collision AP\N{NO-BREAK SPACE}\N{UPWARDS ARROW}", "collision_ap", 3),
    ("AP by chance", "collision_base_rate", 3),
)
"""(Title, field of `Row`, digits) of the columns that are only there where something was measured."""
_ABSENT, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; NaN bounds where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Row:
    """One line of the headline table. None or NaN: not measured. ``kind`` ``ceiling`` is the VAE's reconstruction.

    ``skill_at`` follows `PageContent.skill_steps`. ``advantage`` is the paired difference of skill to the row
    `PageContent.baseline`. Rows are shown in the order given: copy_last first, advect second, the ceiling last.
    LPIPS, boxes and collisions have columns only where some row has a value.
    """

    name: str
    kind: Literal["baseline", "predictor", "ceiling"]
    skill: Interval
    skill_at: tuple[float | None, ...]
    psnr: float | None = None
    ssim: float | None = None
    fg_psnr: float | None = None
    lpips: float | None = None
    box_iou: float | None = None
    collision_ap: float | None = None
    collision_base_rate: float | None = None
    advantage: Interval | None = None
    parameters: int | None = None
    frames_per_second: float | None = None
    seconds_trained: float | None = None


@dataclass(frozen=True)
class StepTable:
    """One metric at every step of the horizon, with intervals, a row for each predictor.

    ``note`` stands above it; ``signed`` writes a plus before what is above zero and marks the cells whose interval
    excludes zero, for differences. ``remarks`` are sentences below it. All rows have the same number of steps.
    """

    title: str
    note: str
    rows: tuple[tuple[str, tuple[Interval, ...]], ...]
    signed: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tile:
    """What one predictor made of a window: the observed frames, then its predictions. ``note`` is shown small."""

    label: str
    frames: Film
    note: str = ""


@dataclass(frozen=True)
class Clip:
    """A window whose truth, predictions and errors play in step.

    The first ``observed`` frames of ``truth`` and of every tile are the context, the rest the future; all have one
    shape. The page draws the errors itself (`data.picture.error_picture`). ``rule`` says why this window is shown
    (a fragment such as "most motion"), ``start`` is the number of its first frame among the decoded frames of
    ``video``, ``fps`` the rate at which it plays.
    """

    video: str
    start: int
    rule: str
    observed: int
    fps: float
    truth: Film
    predictions: tuple[Tile, ...]


@dataclass(frozen=True)
class TeacherRow:
    """Accuracy of a flow teacher against true flow: end-point errors in pixels, F1 of the non-visible class."""

    name: str
    epe: float | None
    epe_moving: float | None
    epe_background: float | None
    nonvisible_f1: float | None
    pairs_per_second: float | None = None


@dataclass(frozen=True)
class Figure:
    """A still picture. ``caption`` is shown and read aloud."""

    caption: str
    image: UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Gallery:
    """A section of pictures (flow wheels, occlusion overlays, reconstructions, collisions on a time line)."""

    title: str
    note: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Quarantined:
    """An item that a stage put aside."""

    item: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Timing:
    """How long a stage took and how many items of ``unit`` it made."""

    stage: str
    seconds: float
    items: int | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Provenance:
    """A folded block of text: parameters, versions or digests, shown as it is."""

    title: str
    text: str


@dataclass(frozen=True)
class PageContent:
    """Everything on the page. ``facts`` are (name, value) pairs below the title: protocol, resolution, windows.

    ``definitions`` are (metric, definition) pairs. ``baseline`` names the row to which `Row.advantage` refers.
    """

    title: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    skill_steps: tuple[int, ...]
    rows: tuple[Row, ...]
    baseline: str = "advect"
    tables: tuple[StepTable, ...] = ()
    charts: tuple[Chart, ...] = ()
    clips: tuple[Clip, ...] = ()
    teachers: tuple[TeacherRow, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    quarantine: tuple[Quarantined, ...] = ()
    timings: tuple[Timing, ...] = ()
    provenance: tuple[Provenance, ...] = ()
    definitions: tuple[tuple[str, str], ...] = ()


def build_page(content: PageContent) -> str:
    """The page as one string. Raises `ValueError` where a row's ``skill_at`` does not match ``skill_steps``, names of
    rows repeat, rows of a table differ in steps, or the films of a clip differ in shape."""
    names = [row.name for row in content.rows]
    if len(set(names)) < len(names):
        raise ValueError(f"rows of the report need different names, got {names}")
    for row in content.rows:
        if len(row.skill_at) != len(content.skill_steps):
            raise ValueError(f"row {row.name!r} gives skill at {len(row.skill_at)} of steps {content.skill_steps}")
    for table in content.tables:
        if len(lengths := {len(cells) for _, cells in table.rows}) != 1:
            raise ValueError(f"table {table.title!r} needs rows with the same steps, got {sorted(lengths)}")
    drawn = [curve.name for chart in content.charts for curve in chart.curves]
    known = dict.fromkeys([*names, *(name for table in content.tables for name, _ in table.rows), *drawn])
    colours = {name: k % _COLOURS for k, name in enumerate(known)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "count": count, "duration": duration, "png": _png}
    return environment.get_template("page.html.j2").render(
        content=content,
        colours=colours,
        extra=[column for column in _EXTRA if any(_is_known(getattr(row, column[1])) for row in content.rows)],
        charts=[(chart, Markup(draw_chart(chart, colours))) for chart in content.charts],  # noqa: S704
        films=[(clip, _atlas(clip)) for clip in content.clips],
        whisker_axis=_whisker_axis(content.rows),
        error_scale=ERROR_FULL_SCALE,
        error_bar=_png(error_legend(18, 160)),
    )


def number(value: int | float | None, digits: int = 3) -> str:
    """With ``digits`` decimals and a true minus sign; an en dash where there is no number."""
    if value is None or math.isnan(value):
        return _ABSENT
    text = f"{value:.{digits}f}"
    return (_MINUS + text[1:]) if text.startswith("-") and float(text) else text.removeprefix("-")


def signed(value: int | float | None, digits: int = 3) -> str:
    """As `number`, with a plus before what is above zero once rounded."""
    text = number(value, digits)
    return f"+{text}" if value is not None and round(value, digits) > 0 else text


def count(value: int | float | None) -> str:
    """Large counts to three digits: 950, 12.3 k, 4.56 M."""
    if value is None or math.isnan(value):
        return _ABSENT
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: int | float | None) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None or math.isnan(seconds):
        return _ABSENT
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(frozen=True)
class _Atlas:
    """One film that holds all tiles of a clip, so that they cannot fall out of step, and where each tile lies."""

    url: str
    width: int
    height: int
    truth: tuple[int, int]
    predictions: tuple[tuple[tuple[int, int], tuple[int, int]], ...]


def _atlas(clip: Clip) -> _Atlas:
    shapes = {clip.truth.shape, *(tile.frames.shape for tile in clip.predictions)}
    if len(shapes) > 1:
        raise ValueError(f"films of the clip of {clip.video} ({clip.rule}) differ in shape: {sorted(shapes)}")
    if not 0 < clip.observed < len(clip.truth):
        raise ValueError(f"clip of {clip.video}: {clip.observed} observed of {len(clip.truth)} frames; need a future")
    t, h, w, _ = clip.truth.shape
    tiles = [clip.truth]
    for tile in clip.predictions:
        errors = [error_picture(said, truth) for said, truth in zip(tile.frames, clip.truth, strict=True)]
        tiles += [tile.frames, np.stack(errors)]
    columns = min(_ATLAS_COLUMNS, len(tiles))
    # Whole macroblocks per tile, repeating its edge, so that compression does not bleed from one into the next.
    cell_h, cell_w = (-(-side // _BLOCK_PX) * _BLOCK_PX for side in (h, w))
    film = np.zeros((t, cell_h * -(-len(tiles) // columns), cell_w * columns, 3), dtype=np.uint8)
    places = [(k % columns * cell_w, k // columns * cell_h) for k in range(len(tiles))]
    for (x, y), tile in zip(places, tiles, strict=True):
        padded = np.pad(tile, ((0, 0), (0, cell_h - h), (0, cell_w - w), (0, 0)), mode="edge")
        film[:, y : y + cell_h, x : x + cell_w] = padded
    url = "data:video/mp4;base64," + base64.b64encode(encode_video(film, clip.fps)).decode()
    return _Atlas(url, w, h, places[0], tuple(zip(places[1::2], places[2::2], strict=True)))


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _whisker_axis(rows: tuple[Row, ...]) -> tuple[float, float]:
    """The common axis of the skill whiskers: from the lowest bound, but not under -1, to 1."""
    lows = [v for row in rows for v in (row.skill.value, row.skill.low) if not math.isnan(v)]
    return max(-1.0, min([0.0, *lows])), 1.0


def _png(image: UInt8[np.ndarray, "h w 3"]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
