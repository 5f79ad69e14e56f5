"""Where a video may start so that nothing comes into view while it is predicted: SlotFormer's choice of clips.

Wu et al. (SlotFormer, ICLR 2023) score one window of each validation video, the first that passes; their code reads the
same flag ``inside_camera_view`` of the annotation.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from data.world import Annotation

SEEN_BEFORE = 3
"""Observed frames in which an object must have been seen: what comes into view before them may be predicted."""


def entries(annotation: Annotation) -> Int[np.ndarray, " n"]:
    """Frames, ascending, at which some object is inside the camera's view and was not in the frame before."""
    inside = annotation.inside_camera_view
    return np.nonzero((inside[1:] & ~inside[:-1]).any(axis=1))[0] + 1


def first_without_entry(annotation: Annotation, *, context: int, horizon: int, stride: int) -> int | None:
    """The first source frame from which a window of ``context + horizon`` frames, ``stride`` apart, holds no entry
    after its third-last observed frame; None where every start has one.

    A start s is less than ``frames - (context + horizon - 1) * stride``, so the window ends within the video.
    """
    span = (context + horizon - 1) * stride
    times = entries(annotation)
    for start in range(annotation.frames - span):
        after = start + (context - SEEN_BEFORE) * stride
        if not ((times > after) & (times <= start + span)).any():
            return start
    return None
