"""The pictures of a video stream one after another, with their times; what is damaged is found out.

Part of `data.film`, and like it called in a process that can be killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class Shot:
    """A picture to be shown at ``seconds``; whether it is intact, and whether something is missing before it."""

    seconds: float
    picture: VideoFrame
    good: bool
    after_damage: bool


def sought(container: InputContainer, stream: VideoStream, seconds: float, damage: list[str]) -> Iterator[Shot] | None:
    """The shots from a key frame before ``seconds`` on, or None (rewound) where that place cannot be found."""
    from av.error import FFmpegError

    assert stream.start_time is not None
    assert stream.time_base is not None
    try:
        container.seek(stream.start_time + int(seconds / stream.time_base), stream=stream)
        shots = shots_of(container, stream, 0.0, True, damage, origin=stream.start_time)
        first = next((shot for shot in shots if shot.picture.key_frame), None)
        if first is not None and first.seconds <= seconds + 0.5 and first.picture.pts is not None:
            return _with(first, shots)
    except FFmpegError:
        pass  # no index to go by: it is read from its start
    damage.clear()
    container.seek(0)
    return None


def _with(first: Shot, rest: Iterator[Shot]) -> Iterator[Shot]:
    yield replace(first, good=True, after_damage=False)
    yield from rest


def shots_of(
    container: InputContainer,
    stream: VideoStream,
    rate: float,
    timed: bool,
    damage: list[str],
    origin: int | None = None,
) -> Iterator[Shot]:
    """Pictures in order of time. After damage none is good until the next key frame, and what has no time or goes
    back in it is left out (without ``timed`` the n-th is shown at n / ``rate``)."""
    index, last, good, gap = 0, -1.0, True, False
    for picture in _decoded(container, stream, damage):
        if picture is None:
            good, gap = False, True
            continue
        if picture.is_corrupt or (not good and picture.key_frame):
            good = not picture.is_corrupt
        if timed and picture.pts is not None and picture.time_base is not None:
            origin = picture.pts if origin is None else origin
            seconds = float((picture.pts - origin) * picture.time_base)
        else:
            seconds = index / rate if rate else last
        index += 1
        if not good and not gap:
            damage.append(f"frame at {seconds:.2f} s is damaged")
            gap = True
        if seconds > last:
            yield Shot(seconds, picture, good, gap)
            last, gap = seconds, not good


def _decoded(container: InputContainer, stream: VideoStream, damage: list[str]) -> Iterator[VideoFrame | None]:
    """Every picture that can be decoded, and None where something could not."""
    from av.error import FFmpegError

    count, packets = 0, container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            pictures = packet.decode()
        except FFmpegError as error:
            if not damage or not damage[-1].startswith("the stream"):
                damage.append(f"the stream breaks near frame {count} ({error.strerror})")
            yield None
            continue
        for picture in pictures:
            count += 1
            yield picture  # type: ignore[misc]  # a video stream yields video frames
