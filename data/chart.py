"""Line charts with interval bands, drawn by Vega-Altair into still SVG: no script of a library and no network.

The page forbids `eval` and everything from outside, so Vega-Lite runs here, once, through vl-convert, instead of in
every reader's browser: the same input gives the same bytes, the picture is there without scripts and on paper, and the
page is a megabyte lighter. Colours are variables of `data/page.css`, so that one drawing serves light and dark. The
numbers stand in a table below each chart, from which `data/page.js` reads them to pointer and keys; nothing depends on
colour.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

WIDTH, HEIGHT = 480, 304
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 44
CEILING_ROOM = 0.25
"""How far a ceiling may stretch the axis, as a share of what all other curves take."""
Kind = Literal["baseline", "predictor", "ceiling"]
_DASHES = {"baseline": [6, 4], "predictor": [1, 0], "ceiling": [1.5, 4]}
_QUIET, _GRID = "var(--quiet)", "var(--rule)"


@dataclass(frozen=True)
class Curve:
    """One line: a value per step, None where undefined; ``low`` and ``high`` bound its band, empty for no band.

    ``kind`` sets the stroke: baselines are dashed, the ceiling is dotted.
    """

    name: str
    values: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    kind: Kind = "predictor"


@dataclass(frozen=True)
class Chart:
    """Curves over steps 1..n. ``zero`` draws a line at 0; ``floor`` cuts the picture (not the table) below a value,
    so that one curve far off does not flatten the others. ``limits`` fix the axis. ``events`` are steps at which
    something truly happened, drawn as vertical lines."""

    title: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    curves: tuple[Curve, ...]
    zero: bool = False
    floor: float | None = None
    limits: tuple[float, float] | None = None
    events: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        return max((len(c.values) for c in self.curves), default=0)

    @property
    def beyond(self) -> tuple[str, ...]:
        """Ceilings so far from all else that they are not drawn: the rest would be flattened (they stand in the
        table)."""
        inside = _numbers([c for c in self.curves if c.kind != "ceiling"])
        if not inside or self.limits is not None:
            return ()
        low, high = min(inside), max(inside)
        if self.floor is not None:
            low = max(low, min(self.floor, high))
        room = (high - low) * CEILING_ROOM
        ceilings = [(c.name, _numbers([c])) for c in self.curves if c.kind == "ceiling"]
        return tuple(name for name, all_ in ceilings if all_ and (min(all_) < low - room or max(all_) > high + room))

    def across(self, step: int) -> float:
        """Where a step lies, as a fraction of the drawing's width."""
        span = WIDTH - LEFT - RIGHT
        return (LEFT + (span / 2 if self.steps == 1 else span * (step - 1) / (self.steps - 1))) / WIDTH


def draw_chart(chart: Chart, colours: Mapping[str, int]) -> str:
    """The chart as one ``<svg>``. ``colours`` maps names of curves to the numbers of the style sheet's colours.

    The marks of the curve at place j have the classes ``curveJ_band_marks``, ``curveJ_line_marks`` and
    ``curveJ_dot_marks``. Raises `ValueError` where curves differ in length or hold no number at all.
    """
    lengths = sorted({len(part) for c in chart.curves for part in (c.values, c.low, c.high) if part})
    numbers = _numbers([curve for curve in chart.curves if curve.name not in chart.beyond])
    if len(lengths) != 1 or not numbers:
        raise ValueError(f"chart {chart.title!r} needs curves of one length with a value: lengths {lengths}")
    x, y = _axes(chart, numbers)
    layers: list[Any] = []
    if chart.zero:
        layers.append(_layer("zero", [{"v": 0}]).mark_rule(aria=False, color=_QUIET, strokeWidth=1.4).encode(y=y))
    if chart.events:
        rule = _layer("event", [{"k": k} for k in chart.events]).mark_rule(
            aria=False, color="var(--ink)", strokeWidth=2
        )
        layers.append(rule.encode(x=x))
    for j, curve in enumerate(chart.curves):
        if curve.name in chart.beyond:
            continue
        layers += _curve(f"curve{j}", curve, f"var(--c{colours[curve.name]})", x, y)
    whole = alt.layer(*layers).properties(
        width=WIDTH - LEFT - RIGHT,
        height=HEIGHT - TOP - BOTTOM,
        autosize=alt.AutoSizeParams(type="none"),
        padding={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        background="transparent",
    )
    whole = whole.configure_view(stroke=None).configure_axis(
        labelColor=_QUIET, titleColor=_QUIET, gridColor=_GRID, domainColor=_GRID, tickColor=_GRID,
        labelFontSize=12, titleFontSize=12, titleFontWeight="normal",
    )  # fmt: skip
    text = io.StringIO()
    whole.save(text, format="svg")
    return _embedded(text.getvalue())


def _numbers(curves: Sequence[Curve]) -> list[float]:
    return [v for c in curves for part in (c.values, c.low, c.high) for v in part if v is not None]


def _layer(name: str, values: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=values), name=name)


def _axes(chart: Chart, numbers: Sequence[float]) -> tuple[alt.X, alt.Y]:
    low, high = min(numbers), max(numbers)
    if chart.zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if chart.floor is not None:
        low = max(low, min(chart.floor, high))
    if chart.limits is not None:
        low, high = chart.limits
    if high - low < 1e-6 * max(abs(low), abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    every = max(1, math.ceil(chart.steps / 12))
    ticks = [k for k in range(1, chart.steps + 1) if k == 1 or k % every == 0]
    ends = [1, chart.steps] if chart.steps > 1 else [0.5, 1.5]
    x = alt.X(
        "k:Q",
        scale=alt.Scale(domain=ends, nice=False, zero=False),
        axis=alt.Axis(title="predicted step", titlePadding=8, values=ticks, format="d", grid=False, labelFlush=False),
    )
    # Clamped: what lies below the floor runs along it.
    scale = alt.Scale(domain=[low, high], nice=True, zero=False, clamp=True)
    return x, alt.Y(
        "v:Q", scale=scale, axis=alt.Axis(title=None, tickCount=6, domain=False, ticks=False, labelPadding=7)
    )


def _curve(name: str, curve: Curve, colour: str, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    points = [{"k": k, "v": v} for k, v in enumerate(curve.values, start=1)]
    paint, layers = alt.value(colour), []
    if curve.low and curve.high:
        bounds = enumerate(zip(curve.low, curve.high, strict=True), start=1)
        # A step without a number stays in the data, so that band and line break there and do not bridge it.
        band = [{"k": k, "v": a, "high": b} for k, (a, b) in bounds]
        area = _layer(f"{name}_band", band).mark_area(aria=False, opacity=0.13)
        layers.append(area.encode(x=x, y=y, y2="high:Q", fill=paint))
    stroke = alt.StrokeCap("round") if curve.kind == "ceiling" else alt.StrokeCap("butt")
    line = _layer(f"{name}_line", points).mark_line(
        aria=False, strokeDash=_DASHES[curve.kind], strokeCap=stroke, strokeWidth=2
    )
    dots = _layer(f"{name}_dot", [p for p in points if p["v"] is not None]).mark_circle(aria=False, size=22, opacity=1)
    return [*layers, line.encode(x=x, y=y, stroke=paint), dots.encode(x=x, y=y, fill=paint)]


def _embedded(svg: str) -> str:
    """Without what only a file of its own needs, and hidden from screen readers, who are given the table. Coordinates
    are rounded to hundredths: the last bits are no business of the page."""
    svg = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
