"""Decoding that cannot hang: decord in a worker process that is killed when it takes too long, PyAV second.

decord's ``get_batch`` can loop forever while holding the interpreter lock when a container promises more frames than
it holds (dmlc/decord 373, 375), so no thread and no signal handler can end it: it runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import UInt8

from data.errors import VideoError

_REMEDY = "check the file with `ffprobe`, fetch it again, or leave this video out of acquire.videos"


class VideoReader:
    """Reads frames of many videos through one worker process, which is replaced after a time-out or a crash.

    ``expected_frames`` and the native size are checked for every file: a video that promises or holds another number
    of frames is refused, never padded or cut.
    """

    def __init__(self, *, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._context = multiprocessing.get_context("spawn")
        self._worker: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(
        self, path: Path | str, frames: Sequence[int], *, height: int, width: int, expected_frames: int
    ) -> UInt8[np.ndarray, "t {height} {width} 3"]:
        """RGB frames at the given indices, resized while decoding (bilinear with area support, as libswscale does).

        Raises:
            VideoError: naming the path, what was expected and what was found, after both decoders failed.
        """
        path = Path(path)
        if not path.exists():
            raise VideoError(
                f"{path}: there is no such video", remedy="run `dvc repro acquire`, or mend acquire.videos"
            )
        if path.stat().st_size == 0:
            raise VideoError(f"{path}: the file is empty (0 bytes)", remedy=_REMEDY)
        request = (str(path), list(frames), height, width, expected_frames)
        reasons = []
        for decoder in ("decord", "pyav"):
            answer = self._ask(decoder, request)
            if isinstance(answer, np.ndarray):
                return answer
            reasons.append(f"{decoder}: {answer}")
        raise VideoError(f"{path}: {'; '.join(reasons)}", remedy=_REMEDY)

    def close(self) -> None:
        """End the worker. The reader may be used again: it starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.join()
        if self._pipe is not None:
            self._pipe.close()
        self._worker = self._pipe = None

    def _ask(self, decoder: str, request: tuple[object, ...]) -> np.ndarray | str:
        """The frames, or the reason why there are none."""
        worker, pipe = self._connect()
        try:
            pipe.send((decoder, *request))
            if not pipe.poll(self.timeout):
                self.close()
                return f"no answer within {self.timeout:g} s, the decoder was killed"
            return pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            worker.join(1)
            self.close()
            return f"the decoder died (exit code {worker.exitcode})"

    def _connect(self) -> tuple[BaseProcess, Connection]:
        if self._worker is None or self._pipe is None or not self._worker.is_alive():
            self.close()
            self._pipe, theirs = self._context.Pipe()
            self._worker = self._context.Process(target=_serve, args=(theirs,), daemon=True, name="decoder")
            self._worker.start()
            theirs.close()
        return self._worker, self._pipe


def _serve(pipe: Connection) -> None:
    """The worker: answers requests until its parent is gone."""
    decoders = {"decord": _read_decord, "pyav": _read_pyav}
    while True:
        try:
            decoder, *request = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(decoders[decoder](*request))
        except Exception as error:  # noqa: BLE001 - decoders raise anything; the reason goes to the reader's message
            pipe.send(f"{type(error).__name__}: {_first_line(str(error))}")


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _read_decord(path: str, frames: list[int], height: int, width: int, expected: int) -> np.ndarray:
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # the reader's own error says it better
    reader = decord.VideoReader(path, width=width, height=height, num_threads=1)
    if len(reader) != expected:
        raise ValueError(f"the video has {len(reader)} frames, expected {expected}")
    # Contiguous reads: seeking between kept frames is slower and less safe than decoding all of them.
    batch = reader.get_batch(list(range(max(frames) + 1))).asnumpy()
    return np.ascontiguousarray(batch[frames])


def _read_pyav(path: str, frames: list[int], height: int, width: int, expected: int) -> np.ndarray:
    """The same bytes as decord's: it scales with libavfilter's ``scale=flags=bilinear`` (measured, every pixel)."""
    import av
    import av.filter

    wanted, kept, count = set(frames), {}, 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        chain = [
            graph.add_buffer(template=stream),
            graph.add("scale", f"{width}:{height}:flags=bilinear"),
            graph.add("format", "pix_fmts=rgb24"),
            graph.add("buffersink"),
        ]
        for upper, lower in pairwise(chain):
            upper.link_to(lower)
        graph.configure()
        for frame in container.decode(stream):
            if count in wanted:
                graph.push(frame)
                kept[count] = graph.pull().to_ndarray()  # type: ignore[union-attr]  # a video graph yields video frames
            count += 1
    if count != expected:
        raise ValueError(f"the video has {count} frames, expected {expected}")
    return np.stack([kept[i] for i in frames])
