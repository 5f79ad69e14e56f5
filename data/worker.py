"""A process that works on files nobody vouches for: what hangs or crashes in it is ended, and the next file is served.

It is asked one thing at a time, by `Worker.ask`, and ends with the process that started it, even if that is killed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, Final

import numpy as np
from jaxtyping import UInt8

from data.errors import MachineError

_START_LIMIT: Final = 300.0
"""Seconds that the worker may take to start; a busy machine is not the fault of the first file."""
_KILLED: Final = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a worker that was ended from outside: by the kernel for want of memory, by who stops a job. A decoder
that crashes ends by other signals."""
_ATTEMPTS: Final = 2


class NoAnswerError(Exception):
    """The worker hung, died or raised: the reason, in one line. Never shown as it is: who asked knows the file."""


class Worker:
    """One process that is replaced after a time-out or a crash.

    ``timeout`` is in seconds and holds for each question, without the start of the worker. ``prepare`` is called in
    the worker before the clock of the first question starts: it loads what the questions need.
    """

    def __init__(self, prepare: Callable[[], None], *, timeout: float) -> None:
        self.prepare, self.timeout = prepare, timeout
        self._context = multiprocessing.get_context("spawn")
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._frames: _SharedFrames | None = None

    def ask(self, function: Callable[..., Any], *arguments: object) -> Any:
        """What ``function``, one of a module, returned in the worker.

        A worker that was killed from outside says nothing about the file: a fresh one is asked.

        Raises:
            NoAnswerError: it did not return, or raised.
            MachineError: the fresh worker was killed from outside too.
        """
        code = None
        for _ in range(_ATTEMPTS):
            process, pipe, shared = self.connect()
            try:
                pipe.send((function, arguments))
                if not pipe.poll(self.timeout):
                    self.close()
                    raise NoAnswerError(f"no answer within {self.timeout:g} s, the decoder was killed")
                answer = pipe.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                process.join(1)
                code = process.exitcode
                self.close()
                if code not in _KILLED:
                    raise NoAnswerError(f"the decoder died (exit code {code})") from None
            else:
                if isinstance(answer, _Raised):
                    raise NoAnswerError(answer.reason)
                return shared.take(answer.shape) if isinstance(answer, _Shared) else answer
        raise MachineError(
            f"{arguments[0]}: {_ATTEMPTS} decoding processes in a row were killed from outside (exit code {code})",
            remedy="look into the kernel's log for a lack of memory: use fewer workers (CLEVRCAST_WORKERS) or a larger "
            "machine, and run the same command again",
        )

    def close(self) -> None:
        """End the worker. It may be asked again: it starts another."""
        if self._process is not None and self._process.pid is not None:  # else it could not even be started
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._pipe is not None:
            self._pipe.close()
        if self._frames is not None:
            self._frames.close()
        self._process = self._pipe = self._frames = None

    def connect(self) -> tuple[BaseProcess, Connection, _SharedFrames]:
        """The process, started if there is none, and what leads to it. Raises RuntimeError if none can be started."""
        if self._process is None or self._pipe is None or self._frames is None or not self._process.is_alive():
            self.close()
            self._frames = _SharedFrames()
            self._pipe, theirs = self._context.Pipe()
            arguments = (theirs, self._frames, self.prepare, os.getpid())
            self._process = self._context.Process(target=_serve, args=arguments, daemon=True, name="decoder")
            with _no_main():
                self._process.start()
            theirs.close()
            self._await_start(self._process, self._pipe)
        return self._process, self._pipe, self._frames

    def _await_start(self, process: BaseProcess, pipe: Connection) -> None:
        # Not a NoAnswerError: a machine that cannot decode anything must not quarantine every video.
        try:
            if pipe.poll(_START_LIMIT):
                pipe.recv()
                return
            reason = f"is not ready after {_START_LIMIT:g} s"
        except EOFError:
            process.join(1)
            reason = f"ended at its start (exit code {process.exitcode}); its own message stands above"
        self.close()
        raise RuntimeError(f"the decoding process {reason}")


@dataclass(frozen=True)
class _Raised:
    reason: str


@dataclass(frozen=True)
class _Shared:
    shape: tuple[int, ...]


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


def first_line(text: str) -> str:
    """The first line of a library's message that is not blank, cut at 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _serve(pipe: Connection, frames: _SharedFrames, prepare: Callable[[], None], parent: int) -> None:
    """The worker: calls what it is told to until its parent is gone."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    prepare()
    pipe.send(None)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments)
            pipe.send(_Shared(frames.put(answer)) if isinstance(answer, np.ndarray) else answer)
        except Exception as error:  # noqa: BLE001 - decoders raise anything; the reason goes to who asked
            pipe.send(_Raised(f"{type(error).__name__}: {first_line(str(error))}"))


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends: a decoder that hangs would not see the pipe close."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request
        os.kill(os.getpid(), signal.SIGKILL)
