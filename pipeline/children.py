"""Programs of Prefect that run beside ours: started, watched, started again, and taken along when we end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import WorkspaceError
from pipeline.health.server import answers
from pipeline.process import LOGS, Said, end_group, ended_with_us, last_lines

API = "PREFECT_API_URL"
START_SECONDS = 90.0
"""In which a server has to answer."""
LIVES_SECONDS = 30.0
"""A child that lived less is started again later and later."""


class Child:
    """A process that is started again whenever it dies, and that dies with this one."""

    def __init__(self, command: Sequence[str], log: Path, name: str) -> None:
        self.command, self.log, self.name = command, log, name
        self.process: subprocess.Popen[bytes] | None = None
        self._began = self._due = 0.0
        self._early = 0

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=ended_with_us(),
            )
        self._began = time.monotonic()

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def revive(self, say: Said) -> bool:
        """Start it again where it has died, at once or, if it keeps dying young, after a while; whether it was."""
        now = time.monotonic()
        if self.alive():
            return False
        if self._due == 0.0:
            self._early = self._early + 1 if now - self._began < LIVES_SECONDS else 0
            wait = min(60.0, 2.0**self._early - 1)
            code = self.process.returncode if self.process else None
            say(f"{self.name} has ended (exit code {code}, {self.log}); it is started again in {wait:.0f} s")
            self._due = now + wait
        if now < self._due:
            return False
        self._due = 0.0
        self.start()
        return True

    def end(self) -> None:
        if self.process is not None:
            end_group(self.process)


@contextmanager
def server_at(host: str, port: int, say: Said, stopped: Callable[[], bool] = lambda: False) -> Iterator[Child | None]:
    """Join the server of ``PREFECT_API_URL``, or one that answers at the port, or start one, which is given back; from
    then on ``PREFECT_API_URL`` names it. Once ``stopped()`` is true its start is not waited for."""
    if url := os.environ.get(API):
        if not answers(url):
            raise unreachable(url)
        yield None
        return
    os.environ[API] = url = f"http://{host}:{port}/api"
    if answers(url):
        say(f"joining the server at {url}")
        yield None
        return
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    server = Child(command, LOGS / "server.log", "the server")
    try:
        server.start()
        wait_for(url, server, stopped)
        yield server
    finally:
        server.end()


def wait_for(url: str, server: Child, stopped: Callable[[], bool]) -> None:
    """Until the server answers. Raises WorkspaceError where it has ended or takes too long."""
    until = time.monotonic() + START_SECONDS
    while not answers(url) and not stopped():
        if not server.alive() or time.monotonic() > until:
            raise WorkspaceError(
                f"no Prefect server could be started at {url}, {server.log}:\n{last_lines(server.log, 8)}",
                remedy="use another --port if this one is taken, or name a server in PREFECT_API_URL",
            )
        time.sleep(0.3)


def unreachable(url: str) -> WorkspaceError:
    return WorkspaceError(
        f"no Prefect server answers at {API}={url}",
        remedy=f"start it (`prefect server start`), correct the address, or unset {API} to do without one",
    )
