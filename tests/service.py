"""A workspace that is served, for tests."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.workspace import Workspace, at_work


class Service:
    """A served workspace, and its server's API."""

    def __init__(self, workspace: Workspace, home: Path, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.workspace = workspace
        self.environment = {**workspace.environment, "PREFECT_HOME": str(home), "CLEVRCAST_GPUS": "", **environment}
        program = 'import sys; open("told.json", "w").write(sys.stdin.read())'
        self.environment["CLEVRCAST_ON_FAILURE"] = shlex.join([sys.executable, "-c", program])
        self.log = home / "serve.log"
        self.start()

    def start(self) -> None:
        """Serve, and wait until it does."""
        begun = self.said().count("serving /")
        self.launch()
        self.until(lambda: self.said().count("serving /") > begun, "serving")

    def launch(self) -> None:
        command = [sys.executable, "-m", "pipeline.cli", "serve", "--port", str(self.port), "--name", "test"]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, cwd=self.workspace.folder, env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, true: Callable[[], Any], what: str, seconds: float = 90) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := true():
                return found
            assert self.process.poll() is None, self.said()
            time.sleep(0.2)
        raise AssertionError(f"waited {seconds} s for {what}:\n{self.said()}\n{at_work(self.workspace.folder)}")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        for patience in (1, 2, 4, 8, 0):
            try:
                with urllib.request.urlopen(request, timeout=20) as response:
                    return json.load(response)
            except OSError:  # 503 while its database is busy; nobody there while it starts again
                if not patience:
                    raise
                time.sleep(patience)
        raise AssertionError

    def runs(self) -> list[dict[str, Any]]:
        """Every run so far, oldest first."""
        return sorted(self.post("flow_runs/filter", {}), key=lambda run: run["created"])

    def settled(self) -> int:
        """How many runs there have been, once all have ended and no other one has come for some seconds."""
        final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        quiet = [time.monotonic(), -1.0]

        def still() -> bool:
            states = [run["state_type"] for run in self.runs()]
            if not final.issuperset(states) or len(states) != quiet[1]:
                quiet[:] = [time.monotonic(), len(states)]
            return time.monotonic() - quiet[0] > 4

        self.until(still, "quiet")
        return len(self.runs())

    def next_run(self, known: int, *, state: str | None = None) -> dict[str, Any]:
        """The run after the first ``known``, once it is in a state of that type (none: any that is final)."""
        final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

        def there() -> dict[str, Any] | None:
            runs = self.runs()
            if len(runs) <= known or (run := runs[known])["state_type"] not in ({state} if state else final):
                return None
            return run

        return self.until(there, f"run {known + 1}: {state or 'the end'}")

    def order(self, flow: str, **parameters: Any) -> None:
        found = self.post("deployments/filter", {"flows": {"name": {"any_": [flow]}}})
        self.post(f"deployments/{found[0]['id']}/create_flow_run", {"parameters": parameters})

    def child(self, *words: str) -> psutil.Process:
        """The one process of the service whose command has these words."""
        found = [p for p in at_work(self.workspace.folder) if all(word in " ".join(p.cmdline()) for word in words)]
        assert found, at_work(self.workspace.folder)
        return found[0]
