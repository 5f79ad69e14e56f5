"""What stands on the report page, as plain frozen records. Knows no model, no metric and no stage.

Whatever is None or empty is left out of the page or said to be absent, never shown as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from data.chart import Chart, Kind

Film = UInt8[np.ndarray, "t h w 3"]
Image = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; NaN bounds where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference: written with its sign, and marked where its interval excludes zero."""


@dataclass(frozen=True)
class Column:
    """A column of the headline table: the key of `Row.figures`, what stands above it, and how many decimals."""

    name: str
    title: str
    better: Literal["higher", "lower", "neither"] = "neither"
    digits: int = 3


@dataclass(frozen=True)
class Row:
    """One line of the headline table. None or NaN: not measured. ``kind`` ``ceiling`` is the VAE's reconstruction.

    ``skill_at`` follows `PageContent.skill_steps`. ``advantage`` is the paired difference of skill to the row
    `PageContent.baseline`. Rows are shown in the order given: copy_last first, advect second, the ceiling last.
    ``figures`` by the names of `PageContent.columns`.
    """

    name: str
    kind: Kind
    skill: Interval
    skill_at: tuple[float | None, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    advantage: Interval | None = None
    parameters: int | None = None
    frames_per_second: float | None = None
    seconds_trained: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of any figures: text as it is, an `Interval` with its brackets, None for what there is not.

    The first column heads the rows. ``folded`` hides the table until it is opened. ``remarks`` are sentences below it.
    All rows are as long as ``columns``.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Interval | None, ...], ...]
    remarks: tuple[str, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class PublishedRow:
    """Figures that somebody published under the protocol of this page; None where they did not."""

    method: str
    psnr: float | None
    ssim: float | None
    lpips: float | None
    fvd: float | None
    jedi: float | None
    source: str


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
    image: Image


@dataclass(frozen=True)
class Gallery:
    """A section of pictures (flow wheels, occlusion overlays, reconstructions)."""

    title: str
    note: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class PictureTable:
    """Pictures in columns (steps) and rows (the truth, then predictors), all of one size. ``title`` names the window.
    ``labels`` of the columns are repeated in what is read aloud."""

    title: str
    labels: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Image, ...]], ...]


@dataclass(frozen=True)
class Study:
    """A section that looks at something on the shown windows: tables of pictures, each with its charts."""

    title: str
    note: str
    parts: tuple[tuple[PictureTable, tuple[Chart, ...]], ...]
    legend: Figure | None = None


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
    ``films_note`` says by what rules the windows of ``clips`` were chosen. ``published`` is only shown where given.
    """

    title: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    skill_steps: tuple[int, ...]
    rows: tuple[Row, ...]
    columns: tuple[Column, ...] = ()
    baseline: str = "advect"
    published: tuple[PublishedRow, ...] = ()
    published_note: str = ""
    tables: tuple[StepTable | Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    clips: tuple[Clip, ...] = ()
    films_note: str = ""
    studies: tuple[Study, ...] = ()
    teachers: tuple[TeacherRow, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    quarantine: tuple[Quarantined, ...] = ()
    timings: tuple[Timing, ...] = ()
    provenance: tuple[Provenance, ...] = ()
    definitions: tuple[tuple[str, str], ...] = ()
