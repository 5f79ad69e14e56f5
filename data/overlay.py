"""What is drawn over frames of a video, and below them: boxes, masks, names of objects, a time line, a legend.

Images are uint8 RGB arrays (h, w, 3), as in `data.picture`; none is changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from data.picture import Image, Sheet, flow_legend

OBJECT_COLOURS = (
    (230, 60, 50), (40, 120, 240), (40, 180, 70), (250, 170, 20), (170, 70, 220), (0, 190, 200), (240, 90, 170)
)  # fmt: skip
"""Told apart by eye, also in the order of slots; they have nothing to do with the colours of the things themselves."""
STRUCK = (255, 0, 0)
LEGEND_HEIGHT = 56
_PAPER, _INK, _RULE = (250, 250, 250), (30, 30, 30), (170, 170, 170)


def draw_boxes(image: Image, boxes: Float[np.ndarray, "n 4"], names: Sequence[str], struck: Sequence[bool]) -> Image:
    """Boxes (x0, y0, x1, y1), ends exclusive, in pixels of the image, with a name each; empty ones are left out.

    Objects that are ``struck`` (collide at this moment) get a thick red frame.
    """
    out, taken = image.copy(), np.zeros(image.shape[:2], bool)
    for k, (box, name) in enumerate(zip(boxes, names, strict=True)):
        x0, y0, x1, y1 = (round(float(v)) for v in box)
        if x1 <= x0 or y1 <= y0:
            continue
        colour = STRUCK if struck[k] else _colour(k)
        cv2.rectangle(out, (x0, y0), (x1 - 1, y1 - 1), colour, 3 if struck[k] else 1)
        places = [_place(out, name, (x0, y)) for y in (y0 - 3, y1 + 12, y0 - 17, y1 + 26)]
        free = [place for place in places if not taken[place.rows, place.columns].any()]
        place = (free or places)[0]
        _tag(out, name, place, colour)
        taken[place.rows, place.columns] = True
    return out


def draw_masks(image: Image, instances: UInt8[np.ndarray, "h w"]) -> Image:
    """The image in grey with object k (value k + 1 of ``instances``) in its colour and with its number."""
    out = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).round().astype(np.uint8)
    for k in range(int(instances.max())):
        mine = instances == k + 1
        if not mine.any():
            continue
        out[mine] = (0.35 * out[mine] + 0.65 * np.array(_colour(k))).round().astype(np.uint8)
        rows, columns = np.nonzero(mine)
        _tag(out, str(k), _place(out, str(k), (int(columns.mean()) - 4, int(rows.mean()) + 4)), _colour(k))
    return out


def banner(image: Image, text: str, colour: tuple[int, int, int] = STRUCK) -> Image:
    """The image with a line of text in its upper left corner."""
    out = image.copy()
    _tag(out, text, _place(out, text, (4, 14)), colour)
    return out


def time_line(width: int, step: int, steps: int, marks: Sequence[int], text: str) -> Sheet:
    """A bar of ``steps`` steps that stands at ``step``, with a red mark at each of ``marks``, above a line of text."""
    bar = np.full((36, width, 3), _PAPER, np.uint8)
    left, right = 8, width - 9

    def x(at: int) -> int:
        return left + round((right - left) * at / max(steps - 1, 1))

    cv2.line(bar, (left, 9), (right, 9), _RULE, 2)
    cv2.line(bar, (left, 9), (x(step), 9), _INK, 2)
    for mark in marks:
        cv2.line(bar, (x(mark), 3), (x(mark), 15), STRUCK, 2)
    cv2.circle(bar, (x(step), 9), 4, _INK, -1, cv2.LINE_AA)
    _write(bar, text, (left, 30))
    return bar


def flow_footer(width: int, text: str) -> Sheet:
    """The colour wheel of `data.picture.flow_picture` with a line of text beside it."""
    return legend(width, flow_legend(LEGEND_HEIGHT - 8), text)


def legend(width: int, key: Image, text: str) -> Sheet:
    """A picture of what colours mean, with a line of text beside it."""
    band = np.full((LEGEND_HEIGHT, width, 3), _PAPER, np.uint8)
    h, w = key.shape[:2]
    top = (LEGEND_HEIGHT - h) // 2
    band[top : top + h, 8 : 8 + w] = key
    _write(band, text, (w + 20, LEGEND_HEIGHT // 2 + 5))
    return band


def _colour(k: int) -> tuple[int, int, int]:
    return OBJECT_COLOURS[k % len(OBJECT_COLOURS)]


@dataclass(frozen=True)
class _Place:
    """Where a line of text stands: its lower left corner, and the pixels that its ground covers."""

    corner: tuple[int, int]
    rows: slice
    columns: slice


def _place(image: Image, text: str, at: tuple[int, int]) -> _Place:
    """Of text whose lower left corner is at ``at``, moved inside the image."""
    (w, h), low = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    x = min(max(at[0], 1), max(image.shape[1] - w - 2, 1))
    y = min(max(at[1], h + 1), image.shape[0] - low)
    return _Place((x, y), slice(y - h - 1, y + low), slice(x - 1, x + w + 1))


def _tag(image: Image, text: str, place: _Place, colour: tuple[int, int, int]) -> None:
    """Text in white on ``colour``."""
    image[place.rows, place.columns] = colour
    cv2.putText(image, text, place.corner, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)


def _write(image: Sheet, text: str, at: tuple[int, int]) -> None:
    """Text that shrinks until it fits the width."""
    room = image.shape[1] - at[0] - 4
    size = min(0.45, 0.45 * room / max(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0], 1))
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, _INK, 1, cv2.LINE_AA)
