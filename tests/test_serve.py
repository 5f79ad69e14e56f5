"""`clevrcast serve`: edits, events and orders become runs, one at a time, and nothing that dies takes it down."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.service import Service
from tests.workspace import Workspace, at_work, stub_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def service(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    workspace = stub_workspace(
        root, tmp_path_factory.mktemp("serve"), ("acquire", "decode", "label", "flow", "occlusion")
    )
    service = Service(workspace, tmp_path_factory.mktemp("prefect"))
    yield service
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    assert not at_work(workspace.folder), "nothing outlives it"


def lock(workspace: Workspace) -> str:
    return (workspace.folder / "dvc.lock").read_text()


def test_ten_quick_edits_are_one_run_of_the_last_state(service: Service) -> None:
    assert service.runs() == []
    for value in range(20, 30):
        service.workspace.set("flow.iterations", value)
        time.sleep(0.2)
    edited = time.monotonic()
    service.next_run(0, state="RUNNING")
    waited = time.monotonic() - edited
    run = service.next_run(0)
    assert run["state_name"] == "Completed", run
    assert waited < 15, f"the rebuild began after {waited:.1f} s"
    assert len(service.runs()) == 1
    assert "iterations: 29" in lock(service.workspace)
    assert "decode" not in run["state"]["message"]
    started = {e["stage"] for e in events(service.workspace) if e["event"] == "stage started"}
    assert "flow" in started
    assert not started & {"acquire", "decode", "label"}


def events(workspace: Workspace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workspace.folder / ".work/logs/events.jsonl").read_text().splitlines()]


def test_a_broken_edit_is_reported_and_mended(service: Service) -> None:
    known = len(service.runs())
    file = service.workspace.folder / "params.yaml"
    before = file.read_text()
    file.write_text(before.replace("iterations: 29", "iterations: many"))
    run = service.next_run(known)
    assert run["state_name"] == "Failed"
    assert "flow.iterations" in run["state"]["message"]
    service.until(lambda: "params.yaml is wrong" in service.said(), "the report")
    told = json.loads((service.workspace.folder / "told.json").read_text())
    assert told["what"] == "rebuild"
    assert "flow.iterations" in told["error"]
    file.write_text(before)
    assert service.next_run(known + 1)["state_name"] == "Completed"


def test_an_event_asks_for_a_rebuild(service: Service) -> None:
    known = len(service.runs())
    service.workspace.run(
        sys.executable, "-m", "prefect", "event", "emit", "clevrcast.rebuild",
        "--resource-id", "clevrcast.workspace.test",
        PREFECT_API_URL=f"http://127.0.0.1:{service.port}/api",
    )  # fmt: skip
    run = service.next_run(known)
    assert run["parameters"]["reason"] == "clevrcast.rebuild"
    assert run["state"]["message"] == "everything was up to date"


def test_a_sweep_is_kept_as_experiments_and_the_workspace_is_left_alone(service: Service) -> None:
    known, before = len(service.runs()), lock(service.workspace)
    service.order("clevrcast-experiments", name="tries", over={"flow.iterations": [5, 6]}, targets=["flow"], jobs=2)
    run = service.next_run(known)
    assert run["state"]["message"] == "2 experiments kept: `dvc exp show`"
    assert lock(service.workspace) == before
    shown = json.loads(service.workspace.dvc("exp", "show", "--json"))
    names = {exp["name"] for base in shown for exp in base["experiments"] or ()}
    assert names == {"tries-1", "tries-2"}
    assert len(service.runs()) == known + 1, "an experiment is no edit"


def test_cancelled_by_prefect(service: Service) -> None:
    known = service.settled()
    begin_slowly(service, 31)
    run = service.next_run(known, state="RUNNING")
    wait_for_stage(service)
    service.post(f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}})
    assert service.next_run(known)["state_name"] == "Cancelled"
    service.until(lambda: not stages(service), "the end of the stage", 15)
    go_on(service, known + 1)


@pytest.mark.parametrize("target", ["serve"])  # all of them: tests/test_faults.py
def test_a_kill_in_the_middle_and_it_goes_on_by_itself(service: Service, target: str) -> None:
    known = service.settled()
    begin_slowly(service, {"flow run": 32, "worker": 33, "serve": 34}[target])
    service.next_run(known, state="RUNNING")
    wait_for_stage(service)
    free(service)  # the stage that is running does not look at it any more, the next one does
    words = {"flow run": ["pipeline.orchestrate"], "worker": ["worker", "start"], "serve": ["pipeline.cli", "serve"]}
    service.child(*words[target]).kill()
    if target == "serve":
        service.process.wait()
        deadline = time.monotonic() + 15
        while at_work(service.workspace.folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not at_work(service.workspace.folder)
        service.start()
    assert service.next_run(known + 1)["state_name"] == "Completed"
    assert service.next_run(known)["state_name"] == "Crashed"
    assert up_to_date(service)


def test_a_server_that_dies_is_started_again_and_the_run_goes_on(service: Service) -> None:
    known = service.settled()
    begin_slowly(service, 35, seconds=8)
    service.next_run(known, state="RUNNING")
    wait_for_stage(service)
    service.child("server", "start").kill()
    service.until(lambda: "the server has ended" in service.said(), "the news")
    free(service)
    service.until(lambda: up_to_date(service), "the result")


def begin_slowly(service: Service, value: int, seconds: int = 60) -> None:
    """Edit, and have the stage that the edit concerns last."""
    (service.workspace.folder / "slow-flow").write_text(str(seconds))
    service.workspace.set("flow.iterations", value)


def wait_for_stage(service: Service) -> None:
    service.until(lambda: stages(service), "the stage")
    time.sleep(1)  # it has asked to die with its parent


def stages(service: Service) -> list[psutil.Process]:
    return [p for p in at_work(service.workspace.folder) if "stub_stage.py" in " ".join(p.cmdline())]


def free(service: Service) -> None:
    (service.workspace.folder / "slow-flow").unlink(missing_ok=True)


def go_on(service: Service, known: int) -> None:
    """On demand, and to the end."""
    free(service)
    service.order("clevrcast")
    assert service.next_run(known)["state_name"] == "Completed"
    assert up_to_date(service)


def up_to_date(service: Service) -> bool:
    plan = json.loads(service.workspace.module("pipeline.cli", "plan", "--json"))
    return all(row["state"] == "kept" for row in plan)
