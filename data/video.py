"""Decoding that cannot hang and is never silently wrong: checked first, then decord, then PyAV, in a killable process.

decord's ``get_batch`` can loop forever while holding the interpreter lock when a container promises more frames than
it holds (dmlc/decord 373, 375), so no thread and no signal handler can end it: it runs in a process of its own.
A damaged stream that is again valid H.264 passes every check of `data.decoders`; only the file's digest can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import UInt8

from data.decoders import DECODERS, Decoder, find_fault, load_decoders
from data.errors import VideoError
from data.files import file_digest
from data.worker import NoAnswerError, Worker
from data.world import FPS, HEIGHT, WIDTH

_REMEDY = "check the file with `ffprobe`, fetch it again, or leave this video out of acquire.videos"


class VideoReader:
    """Reads frames of many videos through one worker process, which is replaced after a time-out or a crash.

    ``timeout`` is in seconds and holds for each attempt (the check, then each of ``decoders``), without the start of
    the worker. The worker ends with this process, even if that is killed.
    """

    def __init__(self, *, timeout: float = 60.0, decoders: Mapping[str, Decoder] | None = None) -> None:
        self.worker = Worker(load_decoders, timeout=timeout)
        self.decoders = DECODERS if decoders is None else decoders

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(
        self,
        path: Path | str,
        frames: Sequence[int],
        *,
        height: int,
        width: int,
        expected_frames: int,
        native: tuple[int, int] = (HEIGHT, WIDTH),
        fps: int = FPS,
        expected_sha256: str | None = None,
    ) -> UInt8[np.ndarray, "t {height} {width} 3"]:
        """RGB frames at the given indices, resized while decoding (bilinear with area support, as libswscale does).

        The file must hold exactly ``expected_frames`` intact frames of ``native`` (height, width), frame t at t / fps
        seconds, and have the digest ``expected_sha256`` where one is given. Without it one in seventeen flipped bits
        of a stream goes unnoticed (`data.decoders`).

        Raises:
            VideoError: naming the path, what was expected and what was found.
            MachineError: the decoding process was killed from outside, twice.
            IndexError: an index is outside 0..expected_frames - 1.
        """
        path = Path(path)
        if not frames or min(frames) < 0 or max(frames) >= expected_frames:
            raise IndexError(f"frames {list(frames)} of a video of {expected_frames}: give some of 0..n-1")
        _check_file(path, expected_sha256)
        try:
            fault = self.worker.ask(find_fault, str(path), native, expected_frames, fps)
        except NoAnswerError as error:
            fault = str(error)
        if fault is not None:
            raise VideoError(f"{path}: {fault}", remedy=_REMEDY)
        reasons = []
        for name, decoder in self.decoders.items():
            try:
                return self.worker.ask(decoder, str(path), list(frames), height, width, expected_frames)
            except NoAnswerError as error:
                reasons.append(f"{name}: {error}")
        raise VideoError(f"{path}: {'; '.join(reasons)}", remedy=_REMEDY)

    def close(self) -> None:
        """End the worker. The reader may be used again: it starts another."""
        self.worker.close()


def _check_file(path: Path, expected_sha256: str | None) -> None:
    again = "run `clevrcast verify --repair acquire`, then `clevrcast retry-failed` with the stage that says this"
    if not path.is_file():  # nor a folder or a pipe, which would be waited for
        raise VideoError(f"{path}: there is no such video", remedy=again)
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes)", remedy=_REMEDY)
    if expected_sha256 is not None and (found := file_digest(path)) != expected_sha256:
        raise VideoError(
            f"{path}: its sha256 is {found}, expected {expected_sha256}: the file has changed", remedy=again
        )
