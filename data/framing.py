"""How a picture of any size comes onto a grid of one shape, and back: cut, stretched or padded; turned as it is shown.

Whatever is asked for, a picture is turned upright first (phones store theirs lying, with a note), and its pixels are
taken to be as wide as the file says (they need not be square).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

Fit = Literal["crop", "stretch", "pad"]
FITS: tuple[Fit, ...] = get_args(Fit)
_GREY = "0x808080"
_TURNS = {
    0: (),
    90: (("transpose", "clock"),),
    180: (("hflip", ""), ("vflip", "")),
    270: (("transpose", "cclock"),),
}


@dataclass(frozen=True)
class Framing:
    """The part of a source picture that a grid shows, in pixels of the picture as it is shown (turned upright).

    ``width`` and ``height`` are the picture's; the grid shows the rectangle ``crop`` (x, y, width, height) in the
    middle of a canvas of ``canvas`` (width, height) pixels, which is larger only where a picture is padded.
    ``turn`` is by how many degrees clockwise the stored picture is turned to be shown.
    """

    width: int
    height: int
    turn: int
    crop: tuple[int, int, int, int]
    canvas: tuple[int, int]

    @property
    def cut(self) -> float:
        """The share of the picture that the grid does not show."""
        return 1 - self.crop[2] * self.crop[3] / (self.width * self.height)

    @property
    def offset(self) -> tuple[int, int]:
        """Where the cut picture stands on the canvas (x, y)."""
        return (self.canvas[0] - self.crop[2]) // 2, (self.canvas[1] - self.crop[3]) // 2

    def filters(self, height: int, width: int) -> list[tuple[str, str]]:
        """FFmpeg's filters (name, arguments) from a stored picture to the grid; scaled as `data.decoders` does."""
        chain = list(_TURNS[self.turn])
        x, y, w, h = self.crop
        if (w, h) != (self.width, self.height):
            chain.append(("crop", f"{w}:{h}:{x}:{y}"))
        if self.canvas != (w, h):
            chain.append(("pad", "{}:{}:{}:{}:{}".format(*self.canvas, *self.offset, _GREY)))
        # Colours that are stored for two by two pixels could be cut at even places only.
        before = [("format", "pix_fmts=rgb24")] if chain else []
        return [*before, *chain, ("scale", f"{width}:{height}:flags=bilinear"), ("format", "pix_fmts=rgb24")]

    def to_source(
        self, box: tuple[float, float, float, float], height: int, width: int
    ) -> tuple[float, float, float, float]:
        """A box (x0, y0, x1, y1) of the grid in pixels of the picture as shown, cut at its borders."""

        def place(edge: float, axis: int, cells: int) -> float:
            at = edge * self.canvas[axis] / cells - self.offset[axis] + self.crop[axis]
            return min(max(at, 0.0), float((self.width, self.height)[axis]))

        x0, y0, x1, y1 = box
        return place(x0, 0, width), place(y0, 1, height), place(x1, 0, width), place(y1, 1, height)

    def told(self, height: int, width: int) -> str:
        """In words, for whoever gave the picture."""
        w, h = self.crop[2:]
        words = [f"turned by {self.turn} degrees"] if self.turn else []
        if self.cut:
            words.append(f"cut to the middle {w}x{h} ({100 * self.cut:.0f} % of the picture is not seen)")
        if self.canvas != (w, h):
            words.append(f"padded with grey to {self.canvas[0]}x{self.canvas[1]}")
        return ", ".join([*words, f"resized to {width}x{height}"])


def frame(
    width: int, height: int, aspect: Fraction, *, fit: Fit = "crop", turn: int = 0, pixel: Fraction = Fraction(1)
) -> Framing:
    """How a stored picture of ``width`` x ``height`` comes onto a grid ``aspect`` times as wide as it is high.

    ``turn`` in degrees clockwise, a multiple of 90; ``pixel`` is the width of a stored pixel over its height.
    """
    if turn % 180:
        width, height, pixel = height, width, 1 / pixel
    wanted = aspect / pixel  # counted in stored pixels
    across, down = max(1, round(height * wanted)), max(1, round(width / wanted))
    crop = canvas = (width, height)
    if fit == "crop":
        crop = canvas = (min(width, across), min(height, down))
    elif fit == "pad":
        canvas = (max(width, across), max(height, down))
    return Framing(width, height, turn % 360, ((width - crop[0]) // 2, (height - crop[1]) // 2, *crop), canvas)
