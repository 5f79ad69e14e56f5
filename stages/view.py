"""A video as a stage sees it, step by step: labelled pictures in rows, with a legend or a time line below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data.errors import EmptyError
from data.picture import Film, Image, Sheet, panel
from stages.gallery import LEAST_SCALE_PX

Tiles = list[tuple[str, Image]]
"""Label and picture, row by row."""
Footer = Callable[[int, int], Sheet]
"""(step, width) -> a band of that width."""
LEAST_WIDTH = 384
"""Pictures narrower than this are enlarged by a whole number."""


@dataclass(frozen=True)
class View:
    """``tiles(k)`` are the pictures of step k of ``steps``, in rows of ``columns``; ``footers`` give bands of a given
    width for a step. ``said`` are sentences with figures. ``step`` is what a step is called."""

    steps: int
    tiles: Callable[[int], Tiles]
    columns: int
    fps: float
    footers: Sequence[Footer] = ()
    said: tuple[str, ...] = ()
    step: str = "frame"

    def sheet(self, k: int) -> Sheet:
        """One step. Raises EmptyError outside 0..steps - 1."""
        if not 0 <= k < self.steps:
            raise EmptyError(
                f"{self.step} {k} was asked for; there are 0 to {self.steps - 1}", remedy="choose another --frame"
            )
        labels, images = zip(*self.tiles(k), strict=True)
        scale = max(1, -(-LEAST_WIDTH // images[0].shape[1]))
        body = panel(images, labels, columns=self.columns, scale=scale)
        bands = [footer(k, body.shape[1]) for footer in self.footers]
        return np.concatenate([body, *bands])

    def film(self) -> Film:
        """All of them."""
        return np.stack([self.sheet(k) for k in range(self.steps)])


def enlarged(image: Image, height: int, width: int) -> Image:
    """The image on a finer grid, cell by cell."""
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST)


def flow_scale(*flows: np.ndarray) -> float:
    """The length in pixels that a wheel shows in full colour: all but a thousandth of ``flows`` (t, 2, h, w) stay
    below it, and it is never less than `stages.gallery.LEAST_SCALE_PX`."""
    lengths = [np.quantile(np.linalg.norm(flow, axis=1), 0.999) for flow in flows]
    return max(LEAST_SCALE_PX, round(float(max(lengths)), 1))
