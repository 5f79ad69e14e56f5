"""The graph of the stages as a picture: SVG, for pages that show nothing but pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from pipeline.dag import Foreseen

COLOURS = {
    "unchanged": "#4b5563",
    "kept": "#4b5563",
    "restored": "#1d4ed8",
    "ran": "#15803d",
    "failed": "#b91c1c",
    "late": "#b91c1c",
    "stopped": "#b45309",
    "skipped": "#b45309",
}
WIDTH, HEIGHT, GAP, RISE = 190, 40, 14, 42


def as_svg(stages: Sequence[Foreseen], became: Mapping[str, str]) -> str:
    """Stages in rows, each below everything that it reads; ``became`` says what stands in a box under its title."""
    level: dict[str, int] = {}
    for stage in stages:
        level[stage.title] = 1 + max((level[title] for title in stage.upstream if title in level), default=-1)
    rows = [[stage.title for stage in stages if level[stage.title] == row] for row in range(max(level.values()) + 1)]
    width = max(len(row) for row in rows) * (WIDTH + GAP) + GAP
    place = {
        title: ((width - len(row) * (WIDTH + GAP) + GAP) / 2 + k * (WIDTH + GAP), GAP + depth * (HEIGHT + RISE))
        for depth, row in enumerate(rows)
        for k, title in enumerate(row)
    }
    height = len(rows) * (HEIGHT + RISE) - RISE + 2 * GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" font-family="sans-serif">',
        f'<rect width="{width:.0f}" height="{height}" fill="#f3f4f6"/>',
    ]
    above = _above(stages)
    for stage in stages:
        x, y = place[stage.title]
        for title in stage.upstream:
            further = any(title in above.get(other, ()) for other in stage.upstream)
            if title in place and not further:  # what is read through another stage too needs no line of its own
                a, b = place[title]
                start, end = (a + WIDTH / 2, b + HEIGHT), (x + WIDTH / 2, y)
                bend = (start[1] + end[1]) / 2
                lines.append(
                    f'<path d="M{start[0]:.0f} {start[1]}C{start[0]:.0f} {bend:.0f} {end[0]:.0f} {bend:.0f} '
                    f'{end[0]:.0f} {end[1]}" fill="none" stroke="#9ca3af" stroke-width="1.5"/>'
                )
    for stage in stages:
        x, y = place[stage.title]
        told = became.get(stage.title, "waiting")
        middle, fill = x + WIDTH / 2, COLOURS.get(told, "#6b7280")
        lines += [
            f'<rect x="{x:.0f}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}"/>',
            f'<text x="{middle:.0f}" y="{y + 17}" fill="#fff" font-size="13" text-anchor="middle">'
            f"{escape(stage.title)}</text>",
            f'<text x="{middle:.0f}" y="{y + 32}" fill="#e5e7eb" font-size="11" text-anchor="middle">'
            f"{escape(told)}</text>",
        ]
    return "\n".join([*lines, "</svg>"])


def _above(stages: Sequence[Foreseen]) -> dict[str, set[str]]:
    """Title -> everything that it reads, directly or not."""
    found: dict[str, set[str]] = {}
    for stage in stages:
        found[stage.title] = set(stage.upstream).union(*(found.get(title, set()) for title in stage.upstream))
    return found
