"""`clevrcast run`: the result of `dvc repro`, side by side, and nothing left behind however it ends."""

from __future__ import annotations

import base64
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.leases import leased
from pipeline.reproduce import read_log
from tests.workspace import Workspace, at_work

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workspace(stub: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return stub.twin(tmp_path_factory.mktemp("run") / "checkout")


def state(workspace: Workspace) -> tuple[str, dict[str, str]]:
    return (workspace.folder / "dvc.lock").read_text(), workspace.digests(".")


def left(folder: Path) -> list[str]:
    """Commands of the processes at work in the folder."""
    return [" ".join(process.cmdline()) for process in at_work(folder)]


def test_the_result_is_that_of_repro(workspace: Workspace, tmp_path: Path) -> None:
    workspace.set("flow.iterations", 8)
    workspace.set("predictors.again", {"model": "advect"})
    other = workspace.twin(tmp_path / "twin")
    other.dvc("repro", "-q")
    said = workspace.module("pipeline.cli", "run", "--jobs", "4", CLEVRCAST_GPUS="", STUB_SECONDS="0.5")
    assert state(workspace) == state(other)
    assert "flow: ran" in said
    assert "train@again: ran" in said
    assert "decode" not in said
    assert workspace.module("pipeline.cli", "run") == "everything is up to date\n"


def test_devices_are_shared_and_never_twice(workspace: Workspace) -> None:
    workspace.set("flow.iterations", 9)
    said = workspace.module("pipeline.cli", "run", "--jobs", "4", CLEVRCAST_GPUS="fake:0,fake:1", STUB_SECONDS="0.5")
    assert "evaluate@advect: " in said
    assert sorted(file.name for file in (workspace.folder / ".work/devices").glob("*")) == [
        "fake:0.lock",
        "fake:1.lock",
    ]


def test_what_fails_is_shown_and_the_rest_goes_on(workspace: Workspace) -> None:
    (workspace.folder / "fail-train@advect").touch()
    for key in ("advect", "latent_warp"):
        workspace.set(f"predictors.{key}.seed", 5)
    said = workspace.module("pipeline.cli", "run", "--jobs", "2", CLEVRCAST_GPUS="", ok=False)
    assert "train@latent_warp: ran" in said
    assert "train@advect: failed (exit code 4)" in said
    assert "a made-up error" in said
    assert "evaluate@advect: skipped" in said
    assert "Traceback" not in said
    (workspace.folder / "fail-train@advect").unlink()
    said = workspace.module("pipeline.cli", "run", "--jobs", "2", CLEVRCAST_GPUS="")
    assert "train@advect: ran" in said
    assert "latent_warp" not in said


@pytest.mark.parametrize("sign", [signal.SIGTERM])  # the others: tests/test_faults.py
def test_nothing_outlives_it(workspace: Workspace, sign: signal.Signals) -> None:
    workspace.set("decode.frames", {signal.SIGINT: 48, signal.SIGTERM: 52, signal.SIGKILL: 56}[sign])
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "run", "--jobs", "2"],
        cwd=workspace.folder,
        env={**workspace.environment, "STUB_SECONDS": "60", "CLEVRCAST_GPUS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 60
    while not any("stub_stage.py decode" in line for line in left(workspace.folder)):
        assert time.monotonic() < until, left(workspace.folder)
        time.sleep(0.1)
    time.sleep(1)  # the stub has asked to die with its parent
    process.send_signal(sign)
    said, _ = process.communicate(timeout=60)
    until = time.monotonic() + 10
    while left(workspace.folder) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left(workspace.folder)
    if sign != signal.SIGKILL:
        assert process.returncode == 130
        assert "the same command goes on" in said
    said = workspace.module("pipeline.cli", "run", "--jobs", "2", CLEVRCAST_GPUS="")
    assert "decode: ran" in said


def test_prefect_sees_every_stage_and_the_result_is_the_same(workspace: Workspace, tmp_path: Path) -> None:
    (workspace.folder / "fail-train@advect").touch()
    for key in ("advect", "latent_warp"):
        workspace.set(f"predictors.{key}.seed", 6)
    other = workspace.twin(tmp_path / "twin")
    other.dvc("repro", "--keep-going", "-q", ok=False)
    home = {"PREFECT_HOME": str(tmp_path / "prefect"), "CLEVRCAST_GPUS": ""}
    said = workspace.run(sys.executable, "-m", "pipeline.cli", "run", "--jobs", "2", "--prefect", ok=False, **home)
    assert state(workspace) == state(other)
    assert "Traceback" not in said
    assert "train@advect: failed (exit code 4)" in said
    with closing(sqlite3.connect(tmp_path / "prefect/prefect.db")) as base:
        ended = dict(base.execute("select name, state_name from task_run"))
        artifacts = dict(base.execute("select key, data from artifact"))
        logs = [row[0] for row in base.execute("select message from log")]
        (flow_state,) = base.execute("select state_name from flow_run").fetchone()
    assert ended["train@latent_warp"] == ended["evaluate@latent_warp"] == "Completed"
    assert ended["train@advect"] == flow_state == "Failed"
    drawn = base64.b64decode(artifacts["graph"].split("base64,")[1].rstrip(')"')).decode()
    assert re.search(r"evaluate@advect</text>\n.*skipped</text>", drawn)
    rows = {row["stage"]: row for row in json.loads(json.loads(artifacts["stages"]))}
    assert rows["decode"]["became"] == "unchanged"
    assert rows["train@advect"]["became"] == "failed"
    assert "predictors.advect.seed" in rows["train@advect"]["why"]
    assert "Running stage 'train@latent_warp':" in logs
    assert {"stages", "metrics"} < artifacts.keys()
    (workspace.folder / "fail-train@advect").unlink()
    workspace.dvc("repro", "-q")


def test_a_lease_ends_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.leases import leased\n"
        f"with leased(['a', 'b'], 2, folder=Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(InterruptedError), leased(["a", "b"], 1, stopped=stop.is_set, folder=tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with leased(["a", "b"], 1, folder=tmp_path) as one, leased(["a", "b"], 5, folder=tmp_path / "other") as all_of_them:
        assert one == ("a",)
        assert all_of_them == ("a", "b")
    with leased([], 3, folder=tmp_path) as none:
        assert none == ()


def test_what_dvc_prints_is_understood() -> None:
    assert read_log("Stage 'a' didn't change, skipping\n", 0) == ("kept", 0)
    assert read_log("Stage 'a' is cached - skipping run, checking out outputs\n", 0) == ("restored", 0)
    assert read_log("Running stage 'a':\n> python\n", 0) == ("ran", 0)
    failed = "ERROR: failed to reproduce 'a': failed to run: python -m stages.a, exited with 4"
    assert read_log(failed, 255) == ("failed", 4)
