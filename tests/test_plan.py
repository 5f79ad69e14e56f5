"""The plan: what it says is what `dvc repro` then does, after whatever was edited."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections import Counter
from typing import Any

import pytest

from pipeline.dag import differences
from tests.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
EDITS = int(os.environ.get("CLEVRCAST_PLAN_EDITS", "1"))
"""How many random edits are planned and run; 200 take a quarter of an hour."""
PARAMS: dict[str, list[Any]] = {
    "acquire.videos.train": ["0-2", "0-3", "0-4"],
    "acquire.seed": [0, 1],
    "decode.frames": [40, 44],
    "flow.iterations": [12, 6],
    "flow.gate.radius": [8, 10],
    "occlusion.absolute": [2.0, 1.5],
    "occlusion.softness": [0.25, 0.5],
    "vae.frame.training.steps": [4, 5],
    "vae.flow.training.steps": [4, 5],
    "predictors.latent_warp.training.steps": [3, 4],
    "predictors.latent_warp.options.width": [16, 24],
    "evaluate.window_stride": [16, 8],
    "report.examples": [3, 2],
}
CODE = ["stages/decode.py", "data/files.py", "models/warp.py", "models/training.py", "models/predictors/advect.py"]


@pytest.fixture(scope="module")
def workspace(stub: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return stub.twin(tmp_path_factory.mktemp("plan") / "checkout")


def planned(workspace: Workspace) -> dict[str, dict[str, Any]]:
    return {row["title"]: row for row in json.loads(workspace.module("pipeline.cli", "plan", "--json"))}


def done(workspace: Workspace) -> dict[str, str]:
    """What `dvc repro` does to every stage."""
    said = workspace.dvc("repro")
    patterns = {
        "kept": r"Stage '([^']+)' didn't change, skipping",
        "restored": r"Stage '([^']+)' is cached - skipping run",
        "ran": r"Running stage '([^']+)'",
    }
    return {title: what for what, pattern in patterns.items() for title in re.findall(pattern, said)}


def edit(workspace: Workspace, rng: random.Random) -> str:
    """One random edit; returns what it was."""
    kind = rng.choice(["parameter", "parameter", "comment", "meaning", "delete", "tamper", "forget"])
    if kind == "parameter":
        path = rng.choice(list(PARAMS))
        value = rng.choice(PARAMS[path])
        workspace.set(path, value)
        return f"{path} = {value}"
    if kind in ("comment", "meaning"):
        file = rng.choice(CODE)
        line = f"# {rng.random()}" if kind == "comment" else f"_EDITED = {rng.randrange(3)}"
        path = workspace.folder / file
        path.write_text(f"{path.read_text()}\n{line}\n")
        return f"{file}: {line}"
    outs = [out for out in sorted((workspace.folder / "artifacts").glob("*")) if out.is_dir()]
    out = rng.choice(outs)
    if kind == "delete":
        shutil.rmtree(out)
        return f"{out.name} deleted"
    if kind == "tamper":
        file = rng.choice([file for file in sorted(out.rglob("*")) if file.is_file()])
        file.unlink()  # it is a link into DVC's cache
        file.write_text(f"{rng.random()}")
        return f"{file.relative_to(workspace.folder)} overwritten"
    shutil.rmtree(workspace.folder / ".dvc/cache/runs", ignore_errors=True)
    return "the run cache forgotten"


def agree(plan: dict[str, dict[str, Any]], did: dict[str, str]) -> list[str]:
    """Stages of which the plan said something else than was done."""
    allowed = {"kept": {"kept"}, "restored": {"restored"}, "linked": {"ran"}, "computed": {"ran"}}
    wrong = []
    for title, row in plan.items():
        may = allowed.get(row["state"], {"restored", "ran"} if row["certain"] else {"kept", "restored", "ran"})
        if did[title] not in may:
            wrong.append(f"{title}: planned {row['state']} {row['reasons']}, {did[title]}")
    return wrong


def test_the_plan_is_what_repro_does(workspace: Workspace) -> None:
    seed = time.time_ns()
    rng, states = random.Random(seed), Counter[str]()
    for number in range(EDITS):
        edits = [edit(workspace, rng) for _ in range(rng.randint(1, 3))]
        plan, did = planned(workspace), done(workspace)
        assert plan.keys() == did.keys()
        assert not agree(plan, did), f"seed {seed}, round {number}: {edits}"
        states.update(row["state"] for row in plan.values())
        states["unforeseen"] += sum(row["state"] == "open" and did[t] == "kept" for t, row in plan.items())
    print(dict(states))
    rest = planned(workspace)
    assert all(row["state"] == "kept" and row["reasons"] == [] for row in rest.values())


def test_reasons_name_old_and_new_values(workspace: Workspace) -> None:
    workspace.set("flow.iterations", 7)
    plan = planned(workspace)
    assert plan["decode"]["state"] == "kept"
    assert plan["flow"]["state"] == "computed"
    (reason,) = plan["flow"]["reasons"]
    assert re.fullmatch(r"flow\.iterations: (12|6) -> 7", reason["what"])
    assert plan["occlusion"]["state"] == "open"
    assert not plan["occlusion"]["certain"]
    assert {"kind": "upstream", "what": "flow"} in plan["occlusion"]["reasons"]
    shown = workspace.module("pipeline.cli", "plan")
    assert "-> 7" in shown
    assert "may run" in shown
    workspace.dvc("repro", "-q")


def test_a_comment_links_and_what_follows_is_kept(workspace: Workspace) -> None:
    path = workspace.folder / "stages/decode.py"
    path.write_text(path.read_text() + "\n# only words\n")
    plan = planned(workspace)
    assert plan["decode"]["state"] == "linked"
    assert {row["state"] for title, row in plan.items() if title != "decode"} == {"kept"}
    assert done(workspace)["decode"] == "ran"


def test_a_stage_that_never_ran_says_so(workspace: Workspace) -> None:
    workspace.set("predictors.again", {"model": "advect"})
    plan = planned(workspace)
    assert plan["train@again"]["state"] == "computed"
    assert plan["train@again"]["reasons"] == [{"kind": "new", "what": "it has never run here"}]
    assert plan["report"]["state"] == "open"
    workspace.dvc("repro", "-q")


def test_a_broken_pipeline_is_one_clear_error(workspace: Workspace) -> None:
    graph = workspace.folder / "dvc.yaml"
    before = graph.read_text()
    graph.write_text(before.replace("    cmd:", "    command:", 1))
    said = workspace.module("pipeline.cli", "plan", ok=False)
    graph.write_text(before)
    assert "Traceback" not in said
    assert "what to do: mend dvc.yaml" in said


def test_differences_go_down_to_the_leaf() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3, "e": 4}}
    assert differences(old, new, "x") == ["x.a.c: 2 -> 3", "x.a.e: (absent) -> 4", "x.d: [1] -> (absent)"]
