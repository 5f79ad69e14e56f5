"""The training stage as a program: killed and resumed, by several processes, and from given weights."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.errors import WeightsError
from models.training_state import TrainingState, load_state
from tests.two_nodes import Nodes, two_nodes, why_no_network
from tests.workspace import Workspace, at_work, local_workspace, write_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 150
BLOCK: dict[str, Any] = {
    "model": "drift",
    "horizon": 2,
    "batch": 4,
    "training": {"steps": STEPS, "warmup": 3, "precision": "float32"},
}
NODES: dict[str, Any] = {**BLOCK, "options": {"noise": 0.0}, "training": {**BLOCK["training"], "steps": 120}}


@pytest.fixture(scope="module")
def workspace(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Decoded videos, which is all that the small predictor here needs, and that predictor."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "checkout").mkdir()
    source = write_source(folder / "source", [0, 1, 15000])
    made = local_workspace(root, folder / "checkout", source, {"train": "0-1", "test": "15000"}, 1)
    made.environment["OMP_NUM_THREADS"] = "1"
    (made.folder / "models/predictors/drift.py").write_text((root / "tests/drift_predictor.py").read_text())
    for stage in ("acquire", "decode"):
        made.module(f"stages.{stage}")
    return made


def trained(workspace: Workspace, key: str, block: dict[str, Any], *launcher: str) -> Path:
    workspace.set(f"predictors.{key}", block)
    workspace.module(*([*launcher, "-m"] if launcher else []), "stages.train", key)
    return workspace.folder / f"artifacts/train/{key}"


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> Path:
    """An uninterrupted run."""
    return trained(workspace, "whole", BLOCK)


def saved(workspace: Workspace, key: str) -> TrainingState | None:
    states = list((workspace.folder / f".work/train@{key}").glob("*/.*.state/state.safetensors"))
    return load_state(states[0]) if states else None


def test_kill_9_costs_the_steps_since_the_last_save_and_no_bit(workspace: Workspace, whole: Path) -> None:
    key, rng = "killed", random.Random(time.time_ns())
    workspace.set(f"predictors.{key}", BLOCK)
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.train", key],
        cwd=workspace.folder,
        env={**workspace.environment, "CLEVRCAST_SAVE_SECONDS": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    moment = rng.randint(1, STEPS // 2)
    deadline = time.monotonic() + 300
    try:
        while (state := saved(workspace, key)) is None or state.step < moment:
            assert process.poll() is None, f"it ended before step {moment}"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    kept = saved(workspace, key)
    assert kept is not None
    assert moment <= kept.step < STEPS
    assert not (workspace.folder / f"artifacts/train/{key}").exists()
    said = workspace.module("stages.train", key)
    assert f"goes on after step {kept.step}" in said
    assert workspace.last_run(f"train@{key}")["resumed_at"] == kept.step
    for name in ("model.safetensors", "curves.json", "meta.json"):
        assert (workspace.folder / f"artifacts/train/{key}/{name}").read_bytes() == (whole / name).read_bytes(), name
    assert saved(workspace, key) is None


def test_curves_are_complete_and_watched_live(workspace: Workspace, whole: Path) -> None:
    curves = json.loads((whole / "curves.json").read_text())
    assert {len(curve) for curve in curves.values()} == {STEPS}
    assert curves["loss"][-1] < curves["loss"][0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (workspace.folder / ".work/train@whole").glob("*/*.curves")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, STEPS + 1))
    torch.testing.assert_close(torch.tensor([event.value for event in events]), torch.tensor(curves["loss"]))


@pytest.fixture(scope="module")
def alone(workspace: Workspace) -> Path:
    """What one process makes of the block that several train."""
    return trained(workspace, "quiet", NODES)


def test_two_processes_publish_one_result(workspace: Workspace, alone: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    together = trained(workspace, "together", NODES, *launcher)
    assert workspace.last_run("train@together")["built"] == 1
    a, b = load_file(alone / "model.safetensors"), load_file(together / "model.safetensors")
    for name in set(a) - {"seen"}:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4)
    assert b["seen"] == a["seen"] / 2
    # What a torchrun has built is found ready by the run that DVC starts.
    workspace.module("stages.train", "together")
    assert workspace.last_run("train@together")["built"] == 0
    workspace.set("predictors.together.batch", 3)
    said = workspace.module(*launcher, "-m", "stages.train", "together", ok=False)
    assert "batch 3 cannot be shared equally by 2 processes" in said
    said = workspace.module("stages.decode", ok=False, TORCHELASTIC_RUN_ID="as under torchrun")
    assert "does not train a predictor" in said


def together(nodes: Nodes, key: str, *, until: int, **environment: str) -> list[subprocess.Popen[bytes]]:
    """Both nodes at work on one predictor, and at least ``until`` steps of it saved."""
    before = saved(nodes.workspace, key)
    begun = before.step if before else 0
    processes = nodes.start(key, CLEVRCAST_SAVE_SECONDS="0", **environment)
    deadline = time.monotonic() + 120
    while (state := saved(nodes.workspace, key)) is None or state.step < begun + until:
        assert all(process.poll() is None for process in processes), nodes.said()
        assert time.monotonic() < deadline, nodes.said()
        time.sleep(0.05)
    return processes


def test_a_node_is_lost_and_two_nodes_go_on_to_the_result_of_one(workspace: Workspace, alone: Path) -> None:
    workspace.set("predictors.nodes", NODES)
    with two_nodes(workspace, network=not why_no_network()) as nodes:
        first, second = together(nodes, "nodes", until=5)
        second.kill()
        assert first.wait(60) == 1
        said = nodes.said()[0]
        assert "LostError" in said
        assert "start the same command on every node again" in said
        assert second.wait(60)
        assert [at_work(folder) for folder in (workspace.folder, nodes.second)] == [[], []]
        state = saved(workspace, "nodes")
        assert state is not None
        assert 5 <= state.step < NODES["training"]["steps"]
        first, second = nodes.start("nodes")
        assert (first.wait(120), second.wait(60)) == (0, 0), nodes.said()
        assert f"goes on after step {state.step}" in nodes.said()[0]
        assert "units built" not in nodes.said()[1], "the first node alone publishes"
    assert workspace.last_run("train@nodes")["resumed_at"] == state.step
    a, b = (load_file(place / "model.safetensors") for place in (alone, workspace.folder / "artifacts/train/nodes"))
    for name in set(a) - {"seen"}:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4)
    # What both have built is found ready by the run that DVC starts.
    workspace.module("stages.train", "nodes")
    assert workspace.last_run("train@nodes")["built"] == 0


def test_a_network_that_is_cut_ends_both_nodes(workspace: Workspace) -> None:
    if reason := why_no_network():
        pytest.skip(reason)
    workspace.set("predictors.cut", NODES)
    with two_nodes(workspace, network=True) as nodes:
        processes = together(nodes, "cut", until=2, CLEVRCAST_LOST_SECONDS="6")
        nodes.cut()
        assert [process.wait(40) for process in processes] == [1, 1]
        for said in nodes.said():
            assert "LostError" in said, nodes.said()
            assert "start the same command on every node again" in said
        assert [at_work(folder) for folder in (workspace.folder, nodes.second)] == [[], []]


def test_training_starts_from_given_weights(workspace: Workspace, whole: Path) -> None:
    block = {**BLOCK, "pretrained": "artifacts/train/whole", "training": {"steps": 0}}
    same = trained(workspace, "same", block)
    assert (same / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((same / "curves.json").read_text()) == {}
    tuned = trained(workspace, "tuned", {**block, "training": {**BLOCK["training"], "steps": 2}})
    before, after = (json.loads((f / "curves.json").read_text())["loss"] for f in (whole, tuned))
    assert after[0] < before[0]
    # Other weights in the same folder are another fingerprint.
    moving = workspace.folder / "moving"
    block["pretrained"] = "moving"
    for given in (whole, tuned):
        shutil.rmtree(moving, ignore_errors=True)
        shutil.copytree(given, moving)
        trained(workspace, "same", block)
    assert workspace.last_run("train@same")["built"] == 1
    workspace.set("predictors.same", {**block, "frozen": ["nets"]})
    said = workspace.module("stages.train", "same", ok=False)
    assert "predictors.same.frozen: there is no module nets to freeze; there are: net" in said
    block["pretrained"] = "artifacts/train/nowhere"
    workspace.set("predictors.same", block)
    said = workspace.module("stages.train", "same", ok=False)
    assert f"{WeightsError.__name__}: artifacts/train/nowhere holds no finished checkpoint" in said
