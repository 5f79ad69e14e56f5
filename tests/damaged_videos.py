"""A corpus of damaged videos, made from a good one: what disks, downloads and encoders do to MP4 files.

An MP4 file is a tree of boxes (ISO/IEC 14496-12): four bytes of length, four of name, then the payload. Of a track's
sample table, ``stsz`` holds the size of every frame, ``stts`` how long each is shown, ``ctts`` its shift in
presentation, ``stsc`` and ``stco`` where it lies, ``stss`` which stand alone; ``elst`` says which part is played.
"""

from __future__ import annotations

import ctypes
import io
import os
import random
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import av
import numpy as np

from data.decoders import read_pyav
from data.picture import encode_png, encode_video

Edits = Mapping[bytes, Callable[[bytes], bytes]]

_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"}
_QUARTER_TURN = (0, 0x10000, 0, -0x10000 % 2**32, 0, 0, 0, 0, 0x40000000)


def words(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in numbers)


def word(payload: bytes, index: int) -> int:
    return int.from_bytes(payload[4 * index : 4 * index + 4], "big")


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and payload of each box at the top of ``content``."""
    while content:
        length = word(content, 0)
        yield content[4:8], content[8:length]
        content = content[length:]


def box(name: bytes, payload: bytes) -> bytes:
    return words(len(payload) + 8) + name + payload


def find(content: bytes, name: bytes) -> bytes:
    """The payload of the first box of that name, at any depth; empty where there is none."""
    for found, payload in boxes(content):
        if found == name:
            return payload
        if found in _PARENTS and (inner := find(payload, name)):
            return inner
    return b""


def edited(content: bytes, edits: Edits) -> bytes:
    """The file with boxes of its index replaced. The new index stands at the end, so that no frame moves."""
    return content.replace(b"moov", b"free", 1) + box(b"moov", _edit(find(content, b"moov"), edits))


def _edit(payload: bytes, edits: Edits) -> bytes:
    out = b""
    for name, inner in boxes(payload):
        if name in _PARENTS:
            inner = _edit(inner, edits)
        elif name in edits:
            inner = edits[name](inner)
        out += box(name, inner)
    return out


def over_reporting(content: bytes, extra: int, *, repeated: int | None) -> bytes:
    """The sample table promises ``extra`` more frames than there are: of no bytes, or the bytes of frame ``repeated``
    again. libavcodec drops a frame that it has seen; decord makes up as many as were promised."""
    sizes, duration = find(content, b"stsz"), word(find(content, b"stts"), 3)
    count, chunks = word(sizes, 2), word(find(content, b"stco"), 1)
    length = 0 if repeated is None else word(sizes, 3 + repeated)
    place = word(find(content, b"stco"), 2)
    place += sum(word(sizes, 3 + i) for i in range(repeated or 0))
    return edited(
        content,
        {
            b"stts": lambda _: words(0, 1, count + extra, duration),
            b"stsz": lambda old: old[:8] + words(count + extra) + old[12:] + words(*[length] * extra),
            b"stsc": lambda old: words(0, word(old, 1) + 1) + old[8:] + words(chunks + 1, 1, 1),
            b"stco": lambda old: words(0, chunks + extra) + old[8:] + words(*[place] * extra),
            b"elst": lambda _: words(0, 0),
        },
    )


def flipped(content: bytes, part: bytes, seed: int) -> bytes:
    """One random bit of the top-level box ``part`` (``mdat``: the frames, ``moov``: their index) is inverted."""
    rng = random.Random(seed)
    start = content.index(part) + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    position = start + rng.randrange(length)
    return content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :]


def corpus(good: bytes, frames: np.ndarray, fps: int) -> dict[str, bytes]:
    """Damaged versions of a film and its pictures that have to be refused without any digest."""
    count, half = len(frames), len(good) // 2
    duration = word(find(good, b"stts"), 3)
    start = good.index(b"mdat") + 4
    end = start - 8 + word(good[start - 8 :], 0)

    def timed(*runs: int) -> bytes:
        return edited(good, {b"stts": lambda _: words(0, len(runs) // 2, *runs), b"elst": lambda _: words(0, 0)})

    return {
        "empty": b"",
        "text": b"this is not a video\n" * 200,
        "picture": encode_png(frames[0]),
        "archive": _zip(good),
        "sound": _sound(),
        "cut in the header": good[:20],
        "cut in the index": good[: good.index(b"stsz") + 40],
        "cut behind the index": good[:start],
        "cut in the middle": good[: (start + end) // 2],
        "last byte of the last frame lost": good[: end - 1],
        "second half zero": good[:half] + bytes(len(good) - half),
        "no index": good.replace(b"moov", b"none"),
        "too few frames": encode_video(frames[: count - 1], fps),
        "too many frames": encode_video(np.concatenate([frames, frames[-1:]]), fps),
        "times for more frames": timed(2 * count, duration),
        "frames of no bytes": over_reporting(good, 20, repeated=None),
        "one frame made up": over_reporting(good, 1, repeated=1),
        "many frames made up": over_reporting(good, 20, repeated=1),
        "first frame hidden": edited(good, {b"elst": lambda old: old[:12] + words(duration) + old[16:]}),
        "played in part": edited(good, {b"elst": lambda old: old[:8] + words(400) + old[12:]}),
        "one frame late": timed(count // 2, duration, 1, 2 * duration, count - count // 2 - 1, duration),
        "slower and slower": timed(*(n for t in range(count) for n in (1, duration + t))),
        "all at once": timed(count, 0),
        "twice the rate": encode_video(frames, 2 * fps),
        "nearly the rate": timed(count, duration + 1),
        "other size": encode_video(frames[:, :-16], fps),
        "transposed": encode_video(np.ascontiguousarray(frames.swapaxes(1, 2)), fps),
        "turned": edited(good, {b"tkhd": lambda old: old[:40] + words(*_QUARTER_TURN) + old[76:]}),
    }


def _zip(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("video_00000.mp4", content)
    return stream.getvalue()


def _sound() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path.read_bytes()


def looping(good: bytes) -> bytes:
    """A hundred frames made up, one of them marked as a key frame: `seek` never returns from it (decord 0.6.0)."""
    count = word(find(good, b"stsz"), 2)
    return edited(over_reporting(good, 100, repeated=1), {b"stss": lambda _: words(0, 2, 1, count + 10)})


def seek(path: str, frames: list[int], height: int, width: int, expected: int) -> np.ndarray:
    """decord as most programs use it: only the wanted frames are asked for."""
    import decord

    return decord.VideoReader(path, width=width, height=height, num_threads=1).get_batch(frames).asnumpy()


def hang(path: str, *_: object) -> np.ndarray:
    """A decoder that never returns nor lets go of the interpreter lock, as decord's ``get_batch`` does."""
    Path(path).with_suffix(".hanging").touch()
    ctypes.PyDLL(None).sleep(3600)  # PyDLL calls with the lock held
    raise AssertionError("an hour has passed")


def killed_once(path: str, frames: list[int], *size: int) -> np.ndarray:
    """A decoder whose process is killed from outside while it reads the file for the first time."""
    seen = Path(path).with_suffix(".killed")
    if not seen.exists():
        seen.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return read_pyav(path, frames, *size)


def killed(path: str, *_: object) -> np.ndarray:
    """A decoder whose process is always killed from outside, as where memory lacks."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(f"it outlived SIGKILL, reading {path}")


def die(path: str, *_: object) -> np.ndarray:
    """A decoder that crashes the process."""
    raise AssertionError(f"read {ctypes.string_at(0)!r} where nothing is, for {path}")
