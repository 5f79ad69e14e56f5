"""Another machine gets everything through a DVC remote, a folder or an S3 server, and what is torn there is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

import pytest

from tests.two_nodes import free_port
from tests.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECOND = 6
"""``flow.iterations`` of the last run; those of the first one stand in the profile."""


class Remote(Protocol):
    """Where DVC pushes to, and what a test does behind its back."""

    url: str

    def config(self) -> dict[str, str]: ...
    def objects(self) -> list[str]: ...
    def delete(self, name: str) -> None: ...
    def overwrite(self, name: str) -> None: ...


@dataclass
class FolderRemote:
    url: str

    def config(self) -> dict[str, str]:
        return {}

    def objects(self) -> list[str]:
        return sorted(str(f.relative_to(self.url)) for f in Path(self.url).rglob("files/md5/*/*"))

    def delete(self, name: str) -> None:
        (Path(self.url) / name).unlink(missing_ok=True)

    def overwrite(self, name: str) -> None:
        self.delete(name)
        (Path(self.url) / name).write_text("torn")


@dataclass
class S3Remote:
    """A bucket of a server in a process of its own."""

    server: str
    url: str = "s3://bucket/clevrcast"

    def config(self) -> dict[str, str]:
        return {"endpointurl": self.server}

    def objects(self) -> list[str]:
        listing = ElementTree.fromstring(self._ask("GET", "?prefix=clevrcast/files"))
        return sorted(key.text.removeprefix("clevrcast/") for key in listing.iterfind(".//{*}Key") if key.text)

    def delete(self, name: str) -> None:
        self._ask("DELETE", f"/clevrcast/{name}")

    def overwrite(self, name: str) -> None:
        self._ask("PUT", f"/clevrcast/{name}", b"torn")

    def _ask(self, method: str, what: str, body: bytes | None = None) -> bytes:
        signed = {"Authorization": "AWS any:any"}  # by whom, the server does not ask
        request = urllib.request.Request(f"{self.server}/bucket{what}", body, signed, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()


@pytest.fixture
def s3() -> Iterator[S3Remote]:
    pytest.importorskip("moto", reason="needs a server that speaks S3: pip install -c constraints.txt -e '.[dev]'")
    remote = S3Remote(f"http://127.0.0.1:{free_port()}")
    port = remote.server.rpartition(":")[2]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                remote._ask("PUT", "")
                break
            except urllib.error.URLError:
                assert time.monotonic() < until
                time.sleep(0.1)
        yield remote
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    return request.getfixturevalue("s3") if request.param == "s3" else FolderRemote(str(tmp_path / "remote"))


@pytest.fixture(scope="module")
def first(stub: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The machine that has run two versions of the parameters."""
    made = stub.twin(tmp_path_factory.mktemp("remote") / "first")
    made.environment |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    made.set("flow.iterations", SECOND)
    made.dvc("repro", "-q")
    made.commit("the second version")
    return made


def clone(workspace: Workspace, folder: Path) -> Workspace:
    """A machine that has nothing but git."""
    workspace.run("git", "clone", "-q", ".", str(folder))
    made = workspace.at(folder)
    assert not (folder / ".dvc/cache").exists()
    return made


def planned(workspace: Workspace) -> dict[str, str]:
    """What becomes of every stage."""
    return {row["title"]: row["state"] for row in json.loads(workspace.module("pipeline.cli", "plan", "--json"))}


REMOTES = [("folder", "lost"), ("s3", "torn")] if os.environ.get("CLEVRCAST_REMOTES") == "all" else [("s3", "torn")]
"""The folder, whose ways are a part of S3's, takes another half minute."""


@pytest.mark.parametrize(("remote", "damage"), REMOTES, indirect=["remote"])
def test_another_machine_goes_on_and_what_is_damaged_is_told(
    first: Workspace, remote: Remote, damage: str, tmp_path: Path
) -> None:
    first.dvc("remote", "add", "--force", "-d", "store", remote.url)
    for name, value in {"verify": "true", **remote.config()}.items():
        first.dvc("remote", "modify", "store", name, value)
    first.commit(f"a remote: {remote.url}")
    assert "files pushed" in first.dvc("push", "--run-cache")

    second = clone(first, tmp_path / "second")
    second.dvc("pull", "-q", "--run-cache")
    assert set(planned(second).values()) == {"kept"}
    assert second.digests(".") == first.digests(".")
    # What the first machine once ran is there, the edit and its way back.
    for value in (12, SECOND):
        second.set("flow.iterations", value)
        assert planned(second)["flow"] == "restored"
        assert "Stage 'flow' is cached - skipping run" in second.dvc("repro", "flow")
    assert second.digests("flow") == first.digests("flow")

    bad = next(name for name in remote.objects() if not name.endswith(".dir"))
    if damage == "lost":
        remote.delete(bad)
    else:
        remote.overwrite(bad)
    third = clone(first, tmp_path / "third")
    said = third.dvc("pull", ok=False)
    assert "failed to pull data from the cloud" in said
    if damage == "lost":
        assert bad.replace("/", "").removeprefix("filesmd5") in said
    assert not any(path.read_bytes() == b"torn" for path in (third.folder / "artifacts").rglob("*") if path.is_file())
    # A push does not look into folders whose list is there: the lists have to go, and what is torn.
    assert "up to date" in first.dvc("push")
    for name in [bad, *(name for name in remote.objects() if name.endswith(".dir"))]:
        remote.delete(name)
    assert "files pushed" in first.dvc("push")
    third.dvc("pull", "-q")
    assert third.digests(".") == first.digests(".")
