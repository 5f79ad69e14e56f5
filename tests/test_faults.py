"""kill -9 of DVC, of the stage and of single workers at random moments: nothing is lost, doubled or left running.

A few rounds on small videos run with the suite. The full proof, on the real sample beside the checkout::

    CLEVRCAST_FAULT_ROUNDS=20 python -m pytest tests/test_faults.py -n 0 -s
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.workspace import Workspace, local_workspace, write_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROUNDS = int(os.environ.get("CLEVRCAST_FAULT_ROUNDS", "0"))
STAGES, TARGETS, WORKERS = ("decode", "flow"), ("dvc", "stage", "worker"), 2
TOKEN = "CLEVRCAST_TEST_TOKEN"


@dataclass(frozen=True)
class Process:
    pid: int
    role: str


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: what the stores are, and how long each stage takes."""

    workspace: Workspace
    digests: dict[str, dict[str, str]]
    seconds: dict[str, float]
    units: int


@pytest.fixture(scope="module")
def reference(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "checkout").mkdir()
    if ROUNDS:
        source = root.parent / "shared/clevrer"
        if not source.is_dir():
            pytest.skip(f"the full proof needs the real CLEVRER sample in {source}")
        videos = {"train": "1-10", "test": "0,11,1000,2000,10000"}
    else:
        source = write_source(folder / "source", [*range(5), 15000])
        videos = {"train": "0-4", "test": "15000"}
    workspace = local_workspace(root, folder / "checkout", source, videos, 1)
    for stage in ("acquire", "label"):
        workspace.repro("-s", stage)
    seconds = {}
    for stage in STAGES:
        start = time.monotonic()
        workspace.repro("-s", stage)
        seconds[stage] = time.monotonic() - start
    digests = {stage: workspace.digests(stage) for stage in STAGES}
    return Reference(workspace, digests, seconds, len(finished(workspace, "flow")))


def finished(workspace: Workspace, stage: str) -> dict[str, int]:
    """Time of the marker of every finished unit."""
    markers = (workspace.folder / ".work" / stage).glob("*/*/unit.json")
    return {marker.parent.name: marker.stat().st_mtime_ns for marker in markers}


def ours(token: str) -> list[Process]:
    """Every living process that inherited the token, by what it does."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            if token.encode() not in environment:
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if not command:
            continue  # a zombie: dead, not yet waited for
        role = "other"
        if "stages." in command and "-m dvc" not in command:
            role = "worker" if b"CLEVRCAST_HELPER=" in environment else "stage"
        elif "-m dvc" in command:
            role = "dvc"
        found.append(Process(int(folder.name), role))
    return found


def kill(token: str, target: str, patience: float) -> str:
    """Kill one process of the wanted role as soon as there is one; the role that was killed, "" if the run ended."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        chosen = [p for p in ours(token) if p.role == target]
        if chosen:
            os.kill(random.choice(chosen).pid, signal.SIGKILL)
            return target
        time.sleep(0.02)
    return ""


@pytest.mark.parametrize("number", range(ROUNDS or 4))
def test_a_kill_at_a_random_moment(reference: Reference, number: int) -> None:
    rng = random.Random(number)
    stage, target = STAGES[number % 2], TARGETS[number % 3]
    workspace, token = reference.workspace, uuid.uuid4().hex
    workspace.run("rm", "-rf", f".work/{stage}", f"artifacts/{stage}")
    workspace.run("rm", "-rf", ".dvc/cache/runs")  # or DVC would bring the result back without a run
    environment = {**workspace.environment, TOKEN: token, "CLEVRCAST_WORKERS": str(WORKERS)}
    lock = workspace.folder / "dvc.lock"
    whole = lock.read_bytes()
    run = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "-s", "-f", stage],
        cwd=workspace.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while run.poll() is None and not any(p.role == "stage" for p in ours(token)):
        time.sleep(0.02)
    # Every other pair of rounds: not at any moment, most of which are start-up, but with some shards finished.
    at_least = rng.randint(1, reference.units - 3) if number % 4 >= 2 else 0
    while run.poll() is None and len(finished(workspace, stage)) < at_least:
        time.sleep(0.02)
    moment = rng.uniform(0, 1 if at_least else 0.9 * reference.seconds[stage])
    time.sleep(moment)
    killed = kill(token, target, patience=2.0)
    before = finished(workspace, stage)
    if killed in ("dvc", "stage"):
        run.wait(60)
        dying = time.monotonic()
        while ours(token) and time.monotonic() - dying < 10:
            time.sleep(0.02)
        assert ours(token) == [], "orphans"
        before = finished(workspace, stage)
        half_built = list((workspace.folder / ".work" / stage).glob("*/.*.building"))
        assert len(half_built) <= WORKERS
        if killed == "dvc":
            # DVC writes its lock file in place and may be cut in the middle; a user takes the whole one from git.
            lock.write_bytes(whole)
        # By force: where everything is in DVC's cache it would bring the outputs back without running the stage.
        workspace.repro("-s", "-f", stage)
        assert workspace.last_run(stage)["built"] == reference.units - len(before)
    else:  # a worker died or nobody did: the run goes on to its end
        assert run.wait(600) == 0
    after = finished(workspace, stage)
    assert {key: after[key] for key in before} == before, "a finished shard was built again"
    assert len(after) == reference.units
    assert workspace.digests(stage) == reference.digests[stage]
    assert ours(token) == [], "orphans"
    print(f"round {number}: {stage}, killed {killed or 'nobody'} with {len(before)} of {reference.units} shards done")
