"""Decoding that cannot hang and is never silently wrong: checked first, then decord, then PyAV, in a killable process.

decord's ``get_batch`` can loop forever while holding the interpreter lock when a container promises more frames than
it holds (dmlc/decord 373, 375), so no thread and no signal handler can end it: it runs in a process of its own.
A damaged stream that is again valid H.264 passes every check of `data.decoders`; only the file's digest can tell.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final

import numpy as np
from jaxtyping import UInt8

from data.decoders import DECODERS, Decoder, find_fault, first_line
from data.errors import MachineError, VideoError
from data.files import file_digest
from data.world import FPS, HEIGHT, WIDTH

_REMEDY = "check the file with `ffprobe`, fetch it again, or leave this video out of acquire.videos"
_START_LIMIT: Final = 300.0
"""Seconds that the worker may take to start; a busy machine is not the fault of the first video."""
_KILLED: Final = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a worker that was ended from outside: by the kernel for want of memory, by who stops a job. A decoder
that crashes ends by other signals."""
_ATTEMPTS: Final = 2


class VideoReader:
    """Reads frames of many videos through one worker process, which is replaced after a time-out or a crash.

    ``timeout`` is in seconds and holds for each attempt (the check, then each of ``decoders``), without the start of
    the worker. The worker ends with this process, even if that is killed.
    """

    def __init__(self, *, timeout: float = 60.0, decoders: Mapping[str, Decoder] | None = None) -> None:
        self.timeout = timeout
        self.decoders = DECODERS if decoders is None else decoders
        self._context = multiprocessing.get_context("spawn")
        self._worker: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._frames: _SharedFrames | None = None

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
        fault = self._ask(find_fault, str(path), native, expected_frames, fps)
        if fault is not None:
            raise VideoError(f"{path}: {fault}", remedy=_REMEDY)
        reasons = []
        for name, decoder in self.decoders.items():
            answer = self._ask(decoder, str(path), list(frames), height, width, expected_frames)
            if isinstance(answer, np.ndarray):
                return answer
            reasons.append(f"{name}: {answer}")
        raise VideoError(f"{path}: {'; '.join(reasons)}", remedy=_REMEDY)

    def close(self) -> None:
        """End the worker. The reader may be used again: it starts another."""
        if self._worker is not None and self._worker.pid is not None:  # else it could not even be started
            self._worker.kill()
            self._worker.join()
            self._worker.close()
        if self._pipe is not None:
            self._pipe.close()
        if self._frames is not None:
            self._frames.close()
        self._worker = self._pipe = self._frames = None

    def _ask(self, function: Callable[..., Any], *arguments: object) -> np.ndarray | str | None:
        """What ``function`` returned in the worker, or the reason why it returned nothing.

        A worker that was killed from outside says nothing about the video: a fresh one is asked. Raises MachineError
        if that is killed too.
        """
        code = None
        for _ in range(_ATTEMPTS):
            worker, pipe, shared = self._connect()
            try:
                pipe.send((function, arguments))
                if not pipe.poll(self.timeout):
                    self.close()
                    return f"no answer within {self.timeout:g} s, the decoder was killed"
                answer = pipe.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                worker.join(1)
                code = worker.exitcode
                self.close()
                if code not in _KILLED:
                    return f"the decoder died (exit code {code})"
            else:
                return shared.take(answer) if isinstance(answer, tuple) else answer
        raise MachineError(
            f"{arguments[0]}: {_ATTEMPTS} decoding processes in a row were killed from outside (exit code {code})",
            remedy="look into the kernel's log for a lack of memory: use fewer workers (CLEVRCAST_WORKERS) or a larger "
            "machine, and run the same command again",
        )

    def _connect(self) -> tuple[BaseProcess, Connection, _SharedFrames]:
        if self._worker is None or self._pipe is None or self._frames is None or not self._worker.is_alive():
            self.close()
            self._frames = _SharedFrames()
            self._pipe, theirs = self._context.Pipe()
            arguments = (theirs, self._frames, os.getpid())
            self._worker = self._context.Process(target=_serve, args=arguments, daemon=True, name="decoder")
            with _no_main():
                self._worker.start()
            theirs.close()
            self._await_start(self._worker, self._pipe)
        return self._worker, self._pipe, self._frames

    def _await_start(self, worker: BaseProcess, pipe: Connection) -> None:
        # Not a VideoError: a machine that cannot decode anything must not quarantine every video.
        try:
            if pipe.poll(_START_LIMIT):
                pipe.recv()
                return
            reason = f"is not ready after {_START_LIMIT:g} s"
        except EOFError:
            worker.join(1)
            reason = f"ended at its start (exit code {worker.exitcode}); its own message stands above"
        self.close()
        raise RuntimeError(f"the decoding process {reason}")


class _SharedFrames:
    """A file without a name that reader and worker hold: four times as fast as pickling frames through the pipe.

    Nothing is left of it once both processes have ended, however they ended.
    """

    def __init__(self) -> None:
        if sys.platform == "linux":
            self._file = os.fdopen(os.memfd_create("frames"), "r+b", buffering=0)
        else:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the reader

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._file.fileno())  # while the worker is being spawned, which inherits it

    def __setstate__(self, handle: Any) -> None:
        self._file = os.fdopen(handle.detach(), "r+b", buffering=0)

    def close(self) -> None:
        self._file.close()

    def put(self, array: UInt8[np.ndarray, "t h w 3"]) -> tuple[int, ...]:
        """Store an array; the shape is what `take` needs."""
        if (written := os.pwrite(self._file.fileno(), np.ascontiguousarray(array).data, 0)) != array.nbytes:
            raise OSError(f"{written} of {array.nbytes} bytes of frames could be shared")
        return array.shape

    def take(self, shape: tuple[int, ...]) -> UInt8[np.ndarray, "t h w 3"]:
        """A copy of the array that the worker stored."""
        array = np.empty(shape, np.uint8)
        if (found := os.preadv(self._file.fileno(), [array.data], 0)) != array.nbytes:
            raise OSError(f"{found} of {array.nbytes} bytes of frames were shared")
        return array


@contextmanager
def _no_main() -> Iterator[None]:
    """Start a process without loading our program's main module into it, which may be a stage with all of PyTorch."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


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


def _serve(pipe: Connection, frames: _SharedFrames, parent: int) -> None:
    """The worker: calls what it is told to until its parent is gone."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    import av  # noqa: F401 - the decoders are loaded before the clock of the first video starts
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # the reader's own error says it better
    pipe.send(None)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments)
            pipe.send(frames.put(answer) if isinstance(answer, np.ndarray) else answer)
        except Exception as error:  # noqa: BLE001 - decoders raise anything; the reason goes to the reader's message
            pipe.send(f"{type(error).__name__}: {first_line(str(error))}")


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends: a decoder that hangs would not see the pipe close."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request
        os.kill(os.getpid(), signal.SIGKILL)
