"""Which frames of the source videos are kept: one answer for every stage that reads them."""

from __future__ import annotations

from dataclasses import dataclass

from data.catalog import Catalog
from data.clevrer import read_annotation
from data.entries import first_without_entry
from pipeline.sections import Decode


@dataclass(frozen=True)
class Kept:
    """Every ``decode.stride``-th frame from the first on; with ``decode.no_entry``, from the frame on that puts the
    first window without an entry (`data.entries`) among them. A video without annotation starts at its first frame."""

    catalog: Catalog
    decode: Decode

    def frames(self, video: int) -> range:
        """Indices into the source video; as many for every video."""
        start = self.window(video) or 0
        return range(start % self.decode.stride, self.decode.frames, self.decode.stride)

    def window(self, video: int) -> int | None:
        """With ``decode.no_entry``, the source frame at which the video's only window starts, None where it has none.
        0 without it."""
        wanted, annotation = self.decode.no_entry, self.catalog.video(video).annotation
        if wanted is None or annotation is None:
            return 0
        return first_without_entry(
            read_annotation(self.catalog.root / annotation),
            context=wanted.context,
            horizon=wanted.horizon,
            stride=self.decode.stride,
        )

    def inputs(self, video: int) -> tuple[str, ...]:
        """Digests of what decides which frames are kept, besides parameters."""
        annotation = self.catalog.video(video).annotation_sha256
        return () if self.decode.no_entry is None or annotation is None else (annotation,)
