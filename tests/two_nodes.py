"""Two nodes on this machine: two checkouts with a store that both see, and a network between them that can be cut.

Each node is a network namespace with one end of a cable; that takes root and ``ip`` (iproute2). Where they cannot be
had, `Nodes` without a network has both on the loopback, with nothing to cut.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.workspace import COPIED, Workspace

ADDRESSES = ("10.91.73.1", "10.91.73.2")


@dataclass
class Nodes:
    """Node 0 is the workspace; node 1 a checkout beside it, whose artifacts and work are those of node 0."""

    workspace: Workspace
    names: tuple[str, ...] = ()
    """Of the network namespaces, where there are any."""
    logs: list[Path] = field(default_factory=list)
    port: int = field(default_factory=lambda: free_port())

    @property
    def second(self) -> Path:
        return self.workspace.folder.with_name("second")

    def start(self, key: str, **environment: str) -> list[subprocess.Popen[bytes]]:
        """The training of one predictor on both: the first node as DVC would start it, the second by torchrun."""
        shutil.copy(self.workspace.folder / "params.yaml", self.second)
        address = ADDRESSES[0] if self.names else "127.0.0.1"
        options = f"--nnodes 2 --nproc-per-node 1 --rdzv-endpoint {address}:{self.port}"
        first = {"CLEVRCAST_TORCHRUN": f"{options} --node-rank 0"}
        launcher = ("torch.distributed.run", *options.split(), "--node-rank", "1", "-m")
        self.logs = [self.workspace.folder.with_name(f"node{k}.log") for k in (0, 1)]
        return [
            self._start(0, self.workspace.folder, "stages.train", key, **environment, **first),
            self._start(1, self.second, *launcher, "stages.train", key, **environment),
        ]

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def cut(self) -> None:
        """No packet gets through any more, and nobody is told."""
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def _start(self, node: int, folder: Path, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        where = ["ip", "netns", "exec", self.names[node]] if self.names else []
        with self.logs[node].open("wb") as log:
            return subprocess.Popen(
                [*where, sys.executable, "-m", *command],
                cwd=folder,
                env={**self.workspace.environment, **environment},
                stdout=log,
                stderr=log,
            )


@contextmanager
def two_nodes(workspace: Workspace, *, network: bool) -> Iterator[Nodes]:
    """Both nodes, with a network of their own between them or without; what is left of it is removed."""
    nodes = Nodes(workspace)
    if not nodes.second.exists():
        nodes.second.mkdir()
        for name in COPIED:
            (nodes.second / name).symlink_to(workspace.folder / name)
        (nodes.second / "params.yaml").unlink()  # its own, as the second node's checkout would have it
        for name in ("artifacts", ".work"):
            (nodes.second / name).symlink_to(workspace.folder / name)
    try:
        if network:
            nodes.names = tuple(f"clevrcast-{os.getpid()}-{k}" for k in (0, 1))
            _connect(nodes.names)
        yield nodes
    finally:
        for name in nodes.names:
            for process in ip("netns", "pids", name).split():
                os.kill(int(process), signal.SIGKILL)
            ip("netns", "del", name)


def why_no_network() -> str:
    """Why no network of one's own can be made here, "" where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip`: install iproute2"
    name = f"clevrcast-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", "cable", "type", "veth", "peer", "name", "end")
        finally:
            ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"this machine lets nobody make network namespaces: {error.stdout.strip()}"
    return ""


def ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, timeout=30
    )
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _connect(names: tuple[str, ...]) -> None:
    for name in names:
        ip("netns", "add", name)
    ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
    for name, address in zip(names, ADDRESSES, strict=True):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
        for device in ("cable", "lo"):
            ip("-n", name, "link", "set", device, "up")
