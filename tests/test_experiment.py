"""Experiments: beside the workspace, which stays as it is; kept as `dvc exp`; going on after a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ParamsError
from pipeline.sweep import assignment, trials
from tests.workspace import Workspace

CLI = "pipeline.cli"


def test_a_sweep_is_every_combination(root: Path) -> None:
    found = trials(root, "x", {"acquire.seed": 3}, {"flow.iterations": [6, 8], "shards.clip": [8, 16]})
    assert [trial.name for trial in found] == ["x-1", "x-2", "x-3", "x-4"]
    assert found[1].changes == {"acquire.seed": 3, "flow.iterations": 6, "shards.clip": 16}
    assert {trial.targets for trial in found} == {()}
    (alone,) = trials(root, "x", {"acquire.seed": 3})
    assert (alone.name, alone.told) == ("x", "acquire.seed=3")


def test_a_sweep_over_the_predictors(root: Path) -> None:
    found = trials(root, "x", {}, {"predictors.*.seed": [1, 2]})
    wanted = [(trial.targets, trial.told) for trial in found if "advect" in trial.told]
    assert wanted == [(("evaluate@advect",), f"predictors.advect.seed={seed}") for seed in (1, 2)]
    assert len(found) % 2 == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("flow.iteration", 3), ("flow.iterations", "3"), ("flow.iterations.x", 3), ("predictors.new.seed", 3)],
)
def test_what_the_schema_refuses_is_refused_before_anything_runs(root: Path, key: str, value: object) -> None:
    with pytest.raises(ParamsError):
        trials(root, "x", {key: value})


def test_values_are_yaml() -> None:
    assert assignment("a.b=[1, 2]") == ("a.b", [1, 2])
    assert assignment("a=b=c") == ("a", "b=c")
    with pytest.raises(ParamsError):
        assignment("a.b: 3")


@pytest.mark.slow
def test_an_experiment_fails_goes_on_and_is_kept(stub: Workspace) -> None:
    before = {name: (stub.folder / name).read_text() for name in ("params.yaml", "dvc.lock")}
    (stub.folder / "notes.txt").write_text("git does not know this file yet")
    (stub.folder / "fail-flow").touch()
    stub.run("git", "add", "notes.txt")
    status = stub.run("git", "status", "--short")
    command = (CLI, "experiment", "tried", "flow", "--set", "flow.iterations=19")
    said = stub.module(*command, ok=False, CLEVRCAST_GPUS="")
    assert "a made-up error" in said
    assert "Traceback" not in said
    (stub.folder / "fail-flow").unlink()
    clone = stub.folder / ".work/experiments/tried"
    (clone / ".work/kept").touch()
    said = stub.module(CLI, "clean", "--dry-run")
    assert "did not come to its end" in said
    said = stub.module(*command, CLEVRCAST_GPUS="")
    assert "flow: ran" in said
    assert not clone.exists()
    assert stub.run("git", "status", "--short") == status.replace("?? fail-flow\n", "")
    assert {name: (stub.folder / name).read_text() for name in before} == before
    shown = json.loads(stub.dvc("exp", "show", "--json"))
    (kept,) = [exp for base in shown for exp in base["experiments"] or () if exp["name"] == "tried"]
    assert kept["revs"][-1]["data"]["params"]["params.yaml"]["data"]["flow"]["iterations"] == 19
    held = stub.run("git", "ls-tree", "-r", "--name-only", kept["revs"][-1]["rev"])
    assert "notes.txt" in held
    assert "iterations: 19" in stub.run("git", "show", f"{kept['revs'][-1]['rev']}:dvc.lock")
    stub.run("git", "rm", "-q", "-f", "notes.txt")
