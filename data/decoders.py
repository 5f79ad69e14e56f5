"""What reads one file: the check that every file must pass, and two decoders that give the same bytes.

Both decoders hide damage: libavcodec repairs what it cannot read from neighbouring pictures, decord repeats frames
that do not exist. So `find_fault` decodes a file as a whole first, and refuses it unless each frame is intact and in
its place. All three are called in a process that can be killed (`data.worker`).

Of 240 single bits flipped in the streams of four real videos, all of which changed the picture, `find_fault` named 226
(libavcodec's own ``err_detect=explode`` as many, its error log 23 of 40); decord refused one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from av.filter import Graph

Decoder = Callable[[str, list[int], int, int, int], np.ndarray]
"""(path, indices, height, width, expected frames) -> uint8 (t, height, width, 3); a function of a module, since the
worker imports it by name."""


def load_decoders() -> None:
    """What both decoders need, loaded and quiet."""
    import av  # noqa: F401
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # the reader's own error says it better


def find_fault(path: str, native: tuple[int, int], expected: int, fps: int) -> str | None:
    """What keeps a file from being the video that it should be, or None. Decodes every frame."""
    import av
    from av.error import FFmpegError

    count, first, damaged = 0, 0, []
    try:
        with av.open(path) as container:
            if len(container.streams.video) != 1:
                return f"it has {len(container.streams.video)} video streams, expected 1"
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            promised = stream.frames or "no number of"  # a container need not say
            for t, frame in enumerate(container.decode(stream)):
                if (frame.height, frame.width) != native:
                    return (
                        f"frame {t} is {frame.height}x{frame.width} (height x width), expected {native[0]}x{native[1]}"
                    )
                if frame.rotation:
                    return f"frame {t} is to be shown turned by {frame.rotation} degrees, expected 0"
                if frame.pts is None or frame.time_base is None:
                    return f"frame {t} has no time, expected {t / fps:g} s"
                first = frame.pts if t == 0 else first
                # Within a tick of the container's clock, which need not be a multiple of the rate.
                if abs((frame.pts - first) - t / (fps * frame.time_base)) >= 1:
                    seconds = float((frame.pts - first) * frame.time_base)
                    return f"frame {t} is shown at {seconds:g} s, expected {t / fps:g} s (constant {fps} frames/s)"
                if frame.is_corrupt:
                    damaged.append(t)
                count += 1
    except FFmpegError as error:
        return f"only {count} of {expected} frames can be decoded ({error.strerror})"
    if damaged:
        return f"{len(damaged)} of {count} frames are damaged, the first is frame {damaged[0]}"
    if count != expected or promised not in (expected, "no number of"):
        return f"it promises {promised} frames and holds {count}, expected {expected}"
    return None


def read_decord(path: str, frames: list[int], height: int, width: int, expected: int) -> np.ndarray:
    import decord

    # The smallest share of frames made up from their neighbours is too much (0 would mean any number).
    reader = decord.VideoReader(path, width=width, height=height, num_threads=1, fault_tol=1e-9)  # type: ignore[arg-type]
    if len(reader) != expected:
        raise ValueError(f"the video has {len(reader)} frames, expected {expected}")
    # Contiguous reads: seeking between kept frames is slower and less safe than decoding all of them.
    batch = reader.get_batch(list(range(max(frames) + 1))).asnumpy()
    return np.ascontiguousarray(batch[frames])


def read_pyav(path: str, frames: list[int], height: int, width: int, expected: int) -> np.ndarray:
    """The same bytes as decord's: it scales with libavfilter's ``scale=flags=bilinear`` (measured, every pixel)."""
    import av

    wanted, kept, count = set(frames), {}, 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        graph = filter_graph(
            {"template": stream}, [("scale", f"{width}:{height}:flags=bilinear"), ("format", "pix_fmts=rgb24")]
        )
        for frame in container.decode(stream):
            if count in wanted:
                graph.push(frame)
                kept[count] = graph.pull().to_ndarray()  # type: ignore[union-attr]  # a video graph yields video frames
            count += 1
    if count != expected:
        raise ValueError(f"the video has {count} frames, expected {expected}")
    return np.stack([kept[i] for i in frames])


def filter_graph(buffer: Mapping[str, Any], filters: Sequence[tuple[str, str]]) -> Graph:
    """libavfilter's ``filters`` (name, arguments) in a row; ``buffer`` says what goes in, as PyAV's add_buffer does."""
    import av.filter

    graph = av.filter.Graph()
    chain = [graph.add_buffer(**buffer), *(graph.add(*step) for step in filters), graph.add("buffersink")]
    for upper, lower in pairwise(chain):
        upper.link_to(lower)
    graph.configure()
    return graph


DECODERS: Final[Mapping[str, Decoder]] = MappingProxyType({"decord": read_decord, "pyav": read_pyav})
"""In the order in which they are tried; both give the same bytes."""
