"""Teachers out of ptlflow (SEA-RAFT, FlowFormer, WAFT, NeuFlow, ...), run by a Python that has it.

ptlflow cannot be installed beside our pinned packages (docs/adr/005-ptlflow-has-its-own-environment.md). So its
networks run in a process of another environment, and frames and flows go through pipes (`models.ptlflow_server`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from io import BufferedIOBase
from typing import IO, Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from data.errors import ClevrcastError, WeightsError
from models import ptlflow_server
from models.flow_teachers import FlowPair, FlowTeacher, at_least_two
from models.ptlflow_server import RANDOM, Options, receive, send
from models.raft_engine import Precision

PYTHON = "CLEVRCAST_PTLFLOW_PYTHON"
PAIRS = 4
"""Pairs at once: bounds the memory (a correlation volume of 320x480 takes 30 MB a pair)."""
ANSWER_SECONDS = 900.0
"""Without an answer for a batch, or the network with its weights, after so long the process is killed."""


class PtlflowTeacher(FlowTeacher):
    """The network ``model`` of ptlflow with ``weights``: a path, the name of a published checkpoint, or `RANDOM`.

    Its process is started at once and says what it would compute with; the network is built at the first call. It is
    run by ``$CLEVRCAST_PTLFLOW_PYTHON``, else by this Python, and it ends with the teacher and with this process.
    ptlflow's networks scale, pad (to their own stride, by replication) and crop for themselves.

    Raises:
        WeightsError: the checkpoint is not there and cannot be had, or (at the first call) is not this network's.
        ClevrcastError: there is no ptlflow, no such model in it, or (at a call) the network fails, dies or hangs.
    """

    def __init__(
        self,
        model: str,
        weights: str,
        *,
        device: str = "cpu",
        precision: Precision = "float32",
        batch: int = PAIRS,
        timeout: float = ANSWER_SECONDS,
    ) -> None:
        self.name, self.weights, self.timeout = f"ptlflow:{model}", weights, timeout
        self._process, self._log = _start(Options(model, weights, device, precision, batch, os.getpid()))
        self._end = weakref.finalize(self, _end, self._process, self._log)
        about, _ = self._answer()
        self.about: Mapping[str, str] = about
        self.weights_digest, self.licence = about["weights_sha256"], about["licence"]
        if weights == RANDOM:
            self.warning = "RANDOM, UNTRAINED WEIGHTS: these flows mean nothing"

    @property
    def identity(self) -> str:
        # Random weights depend on the versions alone.
        return " ".join((self.about["ptlflow"], self.about["torch"], self.weights_digest or RANDOM))

    @property
    def facts(self) -> dict[str, str]:
        versions = {"ptlflow": self.about["ptlflow"], "torch": self.about["torch"]}
        return super().facts | {"weights": self.weights} | versions

    def __call__(self, frames: UInt8[Tensor, "t h w 3"]) -> FlowPair:
        at_least_two(frames)
        request = {"shape": list(frames.shape), "threads": torch.get_num_threads()}
        try:
            send(_pipe(self._process.stdin), request, frames.cpu().contiguous().numpy())
        except (OSError, ValueError):  # it is gone, or was ended
            raise self._death() from None
        pairs, batches = len(frames) - 1, []
        while sum(map(len, batches)) < 2 * pairs:
            header, payload = self._answer()
            batches.append(torch.frombuffer(payload, dtype=torch.float32).reshape(header["shape"]))
        flows = torch.cat(batches)
        return FlowPair(flows[:pairs], flows[pairs:])

    def close(self) -> None:
        """End the process; the teacher is of no use afterwards."""
        self._end()

    def _answer(self) -> tuple[Any, bytearray]:
        started = time.monotonic()
        watch = threading.Timer(self.timeout, self._process.kill)
        watch.start()
        try:
            message = receive(_pipe(self._process.stdout))
        except (OSError, ValueError):
            raise self._death() from None
        finally:
            watch.cancel()
        if message is None:
            hung = time.monotonic() - started >= self.timeout
            raise self._death(f"gave no answer within {self.timeout:g} s and was killed" if hung else None)
        header, payload = message
        if "error" in header:
            kind = WeightsError if header["weights"] else ClevrcastError
            raise kind(header["error"], remedy=header["remedy"])
        return header, payload

    def _death(self, how: str | None = None) -> ClevrcastError:
        if self._log.closed:
            return ClevrcastError(f"{self.name} was closed", remedy="build the teacher anew")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        how = how or f"ended with exit code {self._process.wait()}"
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()[-8:]
        return ClevrcastError(
            "\n    ".join([f"the process of {self.name} (started with {interpreter()}) {how}; its last words:", *said]),
            remedy="run the stage again (finished units are kept); if memory ran out, lower flow.resolution",
        )


def interpreter() -> str:
    """The Python that runs ptlflow: ``CLEVRCAST_PTLFLOW_PYTHON``, a fact of the machine, else this one."""
    return os.environ.get(PYTHON) or sys.executable


def _start(options: Options) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """The process, and the file that takes what it prints."""
    command = [interpreter(), str(ptlflow_server.__file__), json.dumps(asdict(options))]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log), log
    except OSError as error:
        log.close()
        raise ClevrcastError(
            f"{PYTHON} is {interpreter()}, which cannot be run: {error}",
            remedy=f"set {PYTHON} to the python of the environment that has ptlflow (docs/teachers.md)",
        ) from error


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdout, log):
        _pipe(stream).close()
    with suppress(BrokenPipeError):  # half a request was left in the buffer
        _pipe(process.stdin).close()


def _pipe(stream: IO[bytes] | None) -> BufferedIOBase:
    assert isinstance(stream, BufferedIOBase)  # Popen was asked for every pipe
    return stream
