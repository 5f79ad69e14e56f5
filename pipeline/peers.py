"""The processes of one torchrun watch one another: a lost node ends the run, and nodes with different stores are told.

A process that is killed closes its connections, and the others notice at once. A node that loses power or network
closes nothing: gloo would wait for its gradients for half an hour, nccl for ten minutes. Therefore every process counts
up in the store that torchrun keeps on the first node; the first process watches all others, and these watch the first.
Whoever finds one silent says so there, and every process ends with that message. So it does when a process ends with an
error of its own, wherever in the run it is.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from pipeline.errors import PipelineError
from pipeline.ranks import rank, world_size

LOST_SECONDS = "CLEVRCAST_LOST_SECONDS"
"""After how many seconds of silence a process counts as lost (30)."""
COMING_SECONDS = 300.0
"""How long a process may take from its start to its first sign of life: PyTorch may come from a slow file system."""
NETWORK = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
"""What errors of collective operations mention, some of which PyTorch raises as plain RuntimeErrors."""
AGAIN = "start the same command on every node again: training goes on after the last saved step"


class LostError(PipelineError):
    """Another process of the run is gone, or no longer reached."""


def store() -> Any:
    """A connection to the store of this torchrun, which its agent on the first node serves."""
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served = TCPStore(*place, is_master=False, timeout=timedelta(seconds=COMING_SECONDS))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"clevrcast/{os.environ['TORCHELASTIC_RUN_ID']}/{attempt}", served)


def agree(view: Mapping[str, str], remedy: str) -> None:
    """Compare what this process sees with what every other one sees; nothing where it is alone.

    Raises:
        PipelineError: two of them see different things, or one does not come.
    """
    if world_size() > 1:
        compare(store(), rank(), world_size(), view, remedy)


def compare(store: Any, me: int, world: int, view: Mapping[str, str], remedy: str) -> None:
    """`agree` of process ``me`` of ``world``, by way of a store that all have."""
    store.set(f"view/{me}", json.dumps({"host": platform.node(), **view}))
    try:
        first, *others = (json.loads(store.get(f"view/{number}")) for number in range(world))
    except RuntimeError as error:  # all that torch.distributed raises is one
        raise LostError(f"not every process of this run has come: {_line(error)}", remedy=AGAIN) from error
    for number, other in enumerate(others, 1):
        for name in view:
            if other[name] != first[name]:
                raise PipelineError(
                    f"process {number} (on {other['host']}) and process 0 (on {first['host']}) do not train the same: "
                    f"{name} is {other[name]} there and {first[name]} here",
                    remedy=remedy,
                )


def lost_seconds() -> float:
    """What ``CLEVRCAST_LOST_SECONDS`` says. Raises PipelineError where it is no number above 0."""
    asked = os.environ.get(LOST_SECONDS, "") or "30"
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise PipelineError(f"{LOST_SECONDS}={asked} is no number of seconds", remedy="use a number above 0")
    return seconds


@contextmanager
def watched(*good: type[BaseException]) -> Iterator[None]:
    """While the block runs, end this process as soon as another one of its torchrun is lost or has failed.

    ``good``: exceptions by which the block may end well.

    Raises:
        LostError: instead of an error of the network.
    """
    if world_size() == 1:
        yield
        return
    watch = Watch(store(), rank(), world_size(), silence=lost_seconds(), lost=_end)
    watch.start()
    try:
        yield
    except good:
        watch.leave()
        raise
    except BaseException as error:
        if _of_the_network(error):
            what = f"the connection to another process of this run broke: {_line(error)}"
            raise LostError(what, remedy=AGAIN) from error
        watch.leave(f"{type(error).__name__}: {_line(error)}")
        raise
    watch.leave()


class Watch:
    """The counting and looking of one process. ``lost`` is called once, with what is wrong, by a thread of its own."""

    def __init__(self, store: Any, me: int, world: int, *, silence: float, lost: Callable[[str], None]) -> None:
        self.store, self.me, self.world, self.silence, self.lost = store, me, world, silence, lost
        self.beat = min(3.0, silence / 4)
        now = time.monotonic()
        self._answered = now
        self._heard: dict[int, tuple[str, float]] = {}
        self._began = now
        self._left = threading.Event()

    def start(self) -> None:
        """From now on; both threads end with the process."""
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def leave(self, why: str = "") -> None:
        """This process ends: well, or for a reason that the others are to know."""
        self._left.set()
        with suppress(RuntimeError):  # the store may be gone, and with it whoever could read this
            if why:
                self._say(f"process {self.me} on {platform.node()} ended with {why}")
            self.store.set(self._key(self.me), "left")

    def _key(self, number: int) -> str:
        return f"alive/{number}"

    def _say(self, what: str) -> None:
        self.store.compare_set("lost", "", what)

    def _talk(self) -> None:
        """Count up, and hear the others. May block for good in a dead network: `_judge` does not."""
        watched = range(1, self.world) if self.me == 0 else range(1)
        count = 0
        try:
            while not self._left.is_set():
                count += 1
                self.store.set(self._key(self.me), str(count))
                now = time.monotonic()
                for number in watched:
                    said = self.store.get(self._key(number)).decode() if self.store.check([self._key(number)]) else ""
                    if said and said != self._heard.get(number, ("", 0.0))[0]:
                        self._heard[number] = (said, now)
                if self.store.check(["lost"]):
                    self._report(self.store.get("lost").decode())
                    return
                if self.me == 0 and (silent := self._silent(watched)):
                    self._say(silent)
                self._answered = time.monotonic()
                self._left.wait(self.beat)
        except RuntimeError as error:
            self._report(f"the first node, which keeps the store of this run, is gone: {_line(error)}")

    def _judge(self) -> None:
        """Look at the clock: whether the store has answered and, but for the first process, the first one is heard."""
        while not self._left.wait(self.beat):
            if time.monotonic() - self._answered > self.silence:
                self._report(f"the first node has not answered for {self.silence:.0f} s")
            elif self.me and (silent := self._silent(range(1))):
                self._report(silent)

    def _silent(self, watched: range) -> str:
        now = time.monotonic()
        for number in watched:
            said, when = self._heard.get(number, ("", self._began))
            if said != "left" and now - when > (self.silence if said else COMING_SECONDS):
                return f"process {number} has not been heard of for {now - when:.0f} s"
        return ""

    def _report(self, what: str) -> None:
        if not self._left.is_set():
            self._left.set()
            self.lost(what)


def _end(what: str) -> None:
    """The main thread may be waiting for the lost process in a collective operation: nothing can be raised there."""
    print(f"\nerror: {LostError.__name__}: {LostError(what, remedy=AGAIN)}", file=sys.stderr, flush=True)
    os._exit(LostError.exit_code)


def _of_the_network(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in NETWORK)


def _line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")[:300]
