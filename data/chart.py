"""Line charts with interval bands as inline SVG: no library in the page, colours from its style sheet.

Classes carry the look (`data/page.css`), attributes carry the numbers for the pointer (`data/page.js`), and the page
repeats every number in a table, so nothing depends on colour, pointer or script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 12, 38


@dataclass(frozen=True)
class Curve:
    """One line: a value per step, None where undefined; ``low`` and ``high`` bound its band, empty for no band.

    ``kind`` sets the stroke: baselines are dashed, the ceiling is dotted.
    """

    name: str
    values: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    kind: Literal["baseline", "predictor", "ceiling"] = "predictor"


@dataclass(frozen=True)
class Chart:
    """Curves over steps 1..n. ``zero`` draws a line at 0; ``floor`` cuts the picture (not the table) below a value,
    so that one curve far off does not flatten the others."""

    title: str
    unit: str
    better: Literal["higher", "lower"]
    curves: tuple[Curve, ...]
    zero: bool = False
    floor: float | None = None

    @property
    def steps(self) -> int:
        return max((len(c.values) for c in self.curves), default=0)


def draw_chart(chart: Chart, colours: Mapping[str, int]) -> str:
    """The chart as one ``<svg>``. ``colours`` maps names of curves to the numbers of the style sheet's colours.

    Raises `ValueError` where curves differ in length or hold no number at all.
    """
    lengths = sorted({len(part) for c in chart.curves for part in (c.values, c.low, c.high) if part})
    numbers = [v for c in chart.curves for part in (c.values, c.low, c.high) for v in part if v is not None]
    if len(lengths) != 1 or not numbers:
        raise ValueError(f"chart {chart.title!r} needs curves of one length with a value: lengths {lengths}")
    ticks = nice_ticks(*_range(chart, numbers))
    low, high, steps = ticks[0], ticks[-1], chart.steps

    def x(step: int) -> float:
        span = WIDTH - _LEFT - _RIGHT
        return _LEFT + (span / 2 if steps == 1 else span * (step - 1) / (steps - 1))

    def y(value: float) -> float:
        shown = min(max(value, low), high)
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - shown) / (high - low)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-left="{_LEFT}" '
        f'data-right="{WIDTH - _RIGHT}" data-steps="{steps}" aria-label="{escape(_spoken(chart))}">'
    ]
    for tick in ticks:
        kind = "zero" if chart.zero and tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    every = max(1, math.ceil(steps / 12))
    for step in range(1, steps + 1):
        if step == 1 or step % every == 0:
            at = f'x="{x(step):.1f}" y="{HEIGHT - _BOTTOM + 16}"'
            parts.append(f'<text class="tick" {at} text-anchor="middle">{step}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">predicted step</text>')
    for curve in chart.curves:
        points = [(x(k), None if v is None else y(v)) for k, v in enumerate(curve.values, start=1)]
        values = ",".join("" if v is None else f"{v:.4g}" for v in curve.values)
        parts.append(
            f'<g class="curve {curve.kind} c{colours[curve.name]}" data-name="{escape(curve.name)}" '
            f'data-values="{values}"><title>{escape(curve.name)}: {values.replace(",", ", ")}</title>'
        )
        if curve.low and curve.high:
            bounds = zip(curve.low, curve.high, strict=True)
            band = [(x(k), y(a), y(b)) for k, (a, b) in enumerate(bounds, 1) if a is not None and b is not None]
            outline = [(px, a) for px, a, _ in band] + [(px, b) for px, _, b in reversed(band)]
            parts.append('<polygon class="band" points="{}"/>'.format(" ".join(f"{a:.1f},{b:.1f}" for a, b in outline)))
        parts += [f'<polyline class="line" points="{run}"/>' for run in _runs(points)]
        parts += [f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in points if b is not None]
        parts.append("</g>")
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/></svg>')
    return "".join(parts)


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    span = max(high - low, 1e-6 * max(abs(low), abs(high), 1.0))
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def _range(chart: Chart, numbers: Sequence[float]) -> tuple[float, float]:
    low, high = min(numbers), max(numbers)
    if chart.zero:
        low, high = min(low, 0.0), max(high, 0.0)
    return (low if chart.floor is None else max(low, min(chart.floor, high))), high


def _runs(points: Sequence[tuple[float, float | None]]) -> list[str]:
    """Polylines between gaps."""
    runs: list[list[str]] = [[]]
    for a, b in points:
        if b is None:
            runs.append([])
        else:
            runs[-1].append(f"{a:.1f},{b:.1f}")
    return [" ".join(run) for run in runs if len(run) > 1]


def _spoken(chart: Chart) -> str:
    return f"{chart.title}, {chart.better} is better, steps 1 to {chart.steps}; all values stand in the table below"
