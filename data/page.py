"""The report page: plain records in, one HTML file out that opens offline and asks for nothing from outside.

`data/page_content.py` says what may stand on it. All text is escaped. The same content gives the same bytes.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup

from data.chart import Chart, draw_chart
from data.errors import PageSizeError
from data.page_content import Clip, Column, Difference, Interval, PageContent, Row, StepTable, Table
from data.picture import ERROR_FULL_SCALE, encode_png, encode_video, error_legend, error_picture

LIMIT_BYTES = 25_000_000
QUALITIES = (18, 24, 30, 36)
"""Of the films (H.264's CRF, lower is better): the first with which the page stays below its limit."""
_ATLAS_COLUMNS = 4
_BLOCK_PX = 16
_COLOURS = 13
_ABSENT, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
_ARROWS = {
    "higher": "\N{NO-BREAK SPACE}\N{UPWARDS ARROW}",
    "lower": "\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}",
    "neither": "",
}
_PUBLISHED = (
    Column("psnr", "PSNR", "higher", 2),
    Column("ssim", "SSIM", "higher"),
    Column("lpips", "LPIPS", "lower", 4),
    Column("fvd", "FVD", "lower", 1),
    Column("jedi", "JEDi", "lower", 2),
)


def build_page(content: PageContent, *, limit_bytes: int = LIMIT_BYTES) -> str:
    """The page as one string of at most ``limit_bytes``.

    Films are compressed harder, and the page says so, where it would be larger; `PageSizeError` is raised where that
    is not enough. Raises `ValueError` where a row's ``skill_at`` does not match ``skill_steps``, names of rows repeat,
    rows of a table differ in length, or the films of a clip differ in shape.
    """
    _check(content)
    drawn = [curve.name for chart in content.charts for curve in chart.curves]
    drawn += [curve.name for s in content.studies for _, charts in s.parts for c in charts for curve in c.curves]
    tabled = [name for table in content.tables if isinstance(table, StepTable) for name, _ in table.rows]
    known = dict.fromkeys([*(row.name for row in content.rows), *tabled, *drawn])
    colours = {name: k % _COLOURS for k, name in enumerate(known)}
    size = 0
    for quality in QUALITIES:
        page = _render(content, colours, quality)
        size = len(page.encode())
        if size <= limit_bytes:
            return page
        if not content.clips:
            break
    raise PageSizeError(
        f"the report page would have {size / 1e6:.1f} MB, more than {limit_bytes / 1e6:g} MB, with films of the "
        f"lowest quality",
        remedy="show fewer windows (report.examples in params.yaml) or fewer predictors",
    )


def _render(content: PageContent, colours: dict[str, int], quality: int) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def drawing(chart: Chart) -> Markup:
        return Markup(draw_chart(chart, colours))  # noqa: S704

    environment.filters |= {
        "number": number, "signed": signed, "count": count, "duration": duration, "png": _png, "drawing": drawing,
        "arrow": arrow,
    }  # fmt: skip
    kinds = {"interval": Interval, "difference": Difference, "steps": StepTable}
    environment.tests |= {name: partial(_is_a, kind) for name, kind in kinds.items()}
    environment.tests["words"] = _is_words
    return environment.get_template("page.html.j2").render(
        content=content,
        colours=colours,
        kinds={row.name: row.kind for row in content.rows},
        columns=[c for c in content.columns if any(_is_known(row.figures.get(c.name)) for row in content.rows)],
        published=[c for c in _PUBLISHED if any(_is_known(getattr(row, c.name)) for row in content.published)],
        films=[(clip, _atlas(clip, quality)) for clip in content.clips],
        squeezed=quality if quality != QUALITIES[0] else None,
        limit_mb=LIMIT_BYTES // 1_000_000,
        whisker_axis=_whisker_axis(content.rows),
        error_scale=ERROR_FULL_SCALE,
        error_bar=_png(error_legend(18, 160)),
    )


def _is_words(cell: object) -> bool:
    """Text that is no figure, and stands on the left."""
    return isinstance(cell, str) and not cell[:1].isdigit() and cell[:1] not in (_MINUS, _ABSENT)


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind)


def _check(content: PageContent) -> None:
    names = [row.name for row in content.rows]
    if len(set(names)) < len(names):
        raise ValueError(f"rows of the report need different names, got {names}")
    for row in content.rows:
        if len(row.skill_at) != len(content.skill_steps):
            raise ValueError(f"row {row.name!r} gives skill at {len(row.skill_at)} of steps {content.skill_steps}")
    for table in content.tables:
        if isinstance(table, Table):
            if lengths := {len(row) for row in table.rows} - {len(table.columns)}:
                raise ValueError(
                    f"table {table.title!r} has {len(table.columns)} columns and rows of {sorted(lengths)}"
                )
        elif len(lengths := {len(cells) for _, cells in table.rows}) != 1:
            raise ValueError(f"table {table.title!r} needs rows with the same steps, got {sorted(lengths)}")


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


def arrow(better: Literal["higher", "lower", "neither"]) -> str:
    """What follows the name of a metric: which way is better."""
    return _ARROWS[better]


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


def _atlas(clip: Clip, quality: int) -> _Atlas:
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
    url = "data:video/mp4;base64," + base64.b64encode(encode_video(film, clip.fps, quality)).decode()
    return _Atlas(url, w, h, places[0], tuple(zip(places[1::2], places[2::2], strict=True)))


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _whisker_axis(rows: tuple[Row, ...]) -> tuple[float, float]:
    """The common axis of the skill whiskers: from the lowest bound, but not under -1, to 1."""
    lows = [v for row in rows for v in (row.skill.value, row.skill.low) if not math.isnan(v)]
    return max(-1.0, min([0.0, *lows])), 1.0


def _png(image: UInt8[np.ndarray, "h w 3"]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
