"""Who builds a stage changes no byte of it: serial, process, parts, a Ray cluster that loses a node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import WorkspaceError
from pipeline.executors import Call, crew_for, executor, part_of, worker_count
from pipeline.journal import lease
from pipeline.ray_crew import on_gpus
from tests.workspace import Workspace, local_workspace, write_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
UNITS = 8


@pytest.fixture(scope="module")
def workspace(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Eight shards of one video, decoded and with flow, all by one process."""
    folder = tmp_path_factory.mktemp("executors")
    source = write_source(folder / "source", [*range(UNITS - 1), 15000])
    (folder / "checkout").mkdir()
    workspace = local_workspace(root, folder / "checkout", source, {"train": "0-6", "test": "15000"}, 1)
    workspace.set("flow.resolution", [320, 480])  # seconds a shard: long enough to lose a node in the middle
    for stage in ("acquire", "decode", "flow"):
        workspace.module(f"stages.{stage}", CLEVRCAST_EXECUTOR="serial")
    return workspace


@pytest.fixture
def expected(workspace: Workspace) -> dict[str, str]:
    """Digests of the flow that one process built; its work is forgotten."""
    digests = workspace.digests("flow")
    assert len(digests) > 2 * UNITS
    workspace.run("rm", "-rf", ".work/flow", "artifacts/flow")
    return digests


def finished(workspace: Workspace, stage: str) -> int:
    return len(list((workspace.folder / ".work" / stage).glob("*/*/unit.json")))


def test_processes(workspace: Workspace, expected: dict[str, str]) -> None:
    workspace.module("stages.flow", CLEVRCAST_EXECUTOR="process", CLEVRCAST_WORKERS="3")
    assert workspace.digests("flow") == expected
    log = (workspace.folder / ".work/flow/workers.log").read_text()
    assert "Error" not in log, log


def test_parts_are_built_apart_and_published_by_one_run(workspace: Workspace, expected: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "part", "flow"]
    parts = [
        subprocess.Popen([*command, f"{i}/3"], cwd=workspace.folder, env=workspace.environment, stdout=subprocess.PIPE)
        for i in (1, 3)
    ]
    said = [part.communicate()[0].decode() for part in parts]
    assert [part.returncode for part in parts] == [0, 0]
    assert "3 of 8 units are this part" in said[0]
    assert "2 of 8 units are this part" in said[1]
    assert finished(workspace, "flow") == 5
    assert not (workspace.folder / "artifacts/flow").exists()
    # The second part never came: whoever publishes builds what is missing.
    workspace.module("stages.flow")
    assert workspace.last_run("flow")["built"] == 3
    assert workspace.digests("flow") == expected


class Cluster:
    """Two Ray nodes in a process of their own."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("ray_cluster.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self._line()

    def kill_second_node(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
        assert self._line() == "killed"

    def _line(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if ":" in line or line.strip() == "killed":
                return line.strip()
        raise AssertionError("the cluster has ended")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="needs Ray: pip install -c constraints.txt -e '.[ray]'")
    cluster = Cluster()
    with cluster.process:  # closes its pipes, at which it ends, and waits
        yield cluster


def test_a_ray_cluster_that_loses_a_node_in_the_middle(
    workspace: Workspace, expected: dict[str, str], cluster: Cluster
) -> None:
    log = workspace.folder / "ray.log"
    with log.open("w") as stream:
        stage = subprocess.Popen(
            [sys.executable, "-m", "stages.flow"],
            cwd=workspace.folder,
            env={
                **workspace.environment,
                "CLEVRCAST_EXECUTOR": "ray",
                "CLEVRCAST_RAY_ADDRESS": cluster.address,
            },
            stdout=stream,
            stderr=stream,
        )
        deadline = time.monotonic() + 240
        # Until one shard is finished and both nodes are at work on others.
        work = workspace.folder / ".work/flow"
        while not finished(workspace, "flow") or len(list(work.glob("*/.*.building"))) < 2:
            assert time.monotonic() < deadline, log.read_text()
            assert stage.poll() is None, log.read_text()
            time.sleep(0.05)
        done = finished(workspace, "flow")
        cluster.kill_second_node()
        assert stage.wait(180) == 0, log.read_text()
    assert done < UNITS, "the node was to die in the middle"
    assert "a Ray actor died" in log.read_text()
    assert workspace.digests("flow") == expected
    # The driver only looked on: its own process built nothing, two nodes did.
    hosts = [json.loads(f.read_text())["host"] for f in (workspace.folder / ".work/flow").glob("*/*/unit.json")]
    assert len(hosts) == UNITS


def test_a_head_without_a_gpu_drives_those_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLEVRCAST_DEVICE", raising=False)
    call = Call("flow", "", Path(), "", ("cpu",), Path())
    gpus, cores = (SimpleNamespace(cluster_resources=lambda r=r: r) for r in ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}))
    assert on_gpus(gpus, call)
    assert not on_gpus(cores, call)
    assert not on_gpus(gpus, replace(call, computes=False))
    assert on_gpus(gpus, replace(call, devices=("cuda:0",)))
    monkeypatch.setenv("CLEVRCAST_DEVICE", "cpu")
    assert not on_gpus(gpus, call)


def test_a_stage_of_one_unit_does_not_leave_a_machine_that_has_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLEVRCAST_EXECUTOR", "ray")
    monkeypatch.setenv("CLEVRCAST_RAY_ADDRESS", "nowhere:1")
    monkeypatch.delenv("CLEVRCAST_DEVICE", raising=False)
    with crew_for(Call("train", "x", Path(), "", ("cuda:0",), Path(), single=True), 1) as crew:
        assert crew.alone
    monkeypatch.setenv("CLEVRCAST_DEVICE", "cpu")
    with crew_for(Call("train", "x", Path(), "", ("cpu",), Path(), single=True), 1) as crew:
        assert crew.alone


def test_a_second_run_of_a_stage_refuses(workspace: Workspace) -> None:
    with lease(workspace.folder / ".work/flow/stage.lock", "the stage flow"):
        said = workspace.module("stages.flow", ok=False)
    assert f"the stage flow is being built by another process (pid {os.getpid()}" in said
    assert "what to do" in said
    workspace.module("stages.flow")


@pytest.mark.parametrize("text", ["0/3", "4/3", "a", "1/0", "1"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(WorkspaceError, match=r"is not i/N"):
        part_of([1, 2, 3], text)


def test_parts_cover_everything_once() -> None:
    for count in (1, 2, 3, 7, 20):
        parts = [part_of(list(range(11)), f"{i}/{count}") for i in range(1, count + 1)]
        assert sorted(x for part in parts for x in part) == list(range(11))


def test_workers_follow_devices_units_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLEVRCAST_WORKERS", raising=False)
    assert worker_count(["cuda:0", "cuda:1", "cuda:2"], 100) == 3
    assert worker_count(["cuda:0", "cuda:1", "cuda:2"], 2) == 2
    assert 1 <= worker_count(["cpu"], 100) <= 8
    monkeypatch.setenv("CLEVRCAST_WORKERS", "5")
    assert worker_count(["cpu"], 100) == 5
    monkeypatch.setenv("CLEVRCAST_EXECUTOR", "dask")
    with pytest.raises(WorkspaceError, match="CLEVRCAST_EXECUTOR=dask is no executor"):
        executor()
