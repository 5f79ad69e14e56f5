"""The whole pipeline on the `tiny` profile: what runs, what is left alone, what survives a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import pytest

from stages import look
from tests.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The tiny pipeline, run once from nothing."""
    workspace = Workspace(root, tmp_path_factory.mktemp("built"))
    ran = workspace.repro()
    stages = ["acquire", "decode", "label", "flow", "occlusion", "vae@frame", "vae@flow", "encode@frame", "encode@flow"]
    predictors = ("copy_last", "advect", "latent_warp")
    assert sorted(ran) == sorted(
        [*stages, *(f"train@{p}" for p in predictors), *(f"evaluate@{p}" for p in predictors), "report"]
    )
    workspace.commit("ran")
    return workspace


@pytest.fixture
def again(built: Workspace) -> Iterator[Workspace]:
    """The same workspace, put back to its committed state afterwards."""
    yield built
    built.run("git", "checkout", "-q", ".")
    built.repro()


def test_nothing_runs_twice_and_git_stays_clean(built: Workspace) -> None:
    assert built.repro() == []
    assert built.run("git", "status", "--porcelain") == ""
    assert built.dvc("status").strip() == "Data and pipelines are up to date."


def test_the_report_stands_alone(built: Workspace) -> None:
    page = (built.folder / "artifacts/report/index.html").read_text()
    for name in ("copy_last", "advect", "latent_warp", "vae_ceiling"):
        assert name in page
    assert "http" + "://" not in page.replace("http://www.w3.org/", "")
    table = built.module("pipeline.cli", "results")
    assert table.index("copy_last") < table.index("advect") < table.index("latent_warp") < table.index("vae_ceiling")


def test_every_stage_can_be_looked_at(
    built: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(built.folder)
    keyed = ("vae@frame", "vae@flow", "encode@frame", "encode@flow", "evaluate@latent_warp")
    for title in ("acquire", "decode", "label", "flow", "occlusion", *keyed):
        file = tmp_path / f"{title}.png"
        assert look.main([title, "--video", "15000", "--frame", "3", "--out", str(file)]) == 0, title
        image = cv2.imread(str(file))
        assert image is not None
        assert min(image.shape[:2]) > 200
    assert look.main(["train@latent_warp", "--out", str(tmp_path / "curve.png")]) == 0
    assert look.main(["report"]) == 0
    file = tmp_path / "clip.mp4"
    assert look.main(["flow", "--video", "15000", "--out", str(file)]) == 0
    with av.open(str(file)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 19
    assert look.main(["flow", "--video", "3"]) == 1
    said = capsys.readouterr().err
    assert "error: flow holds no video 3" in said
    assert "0-2, 15000" in said


def test_dvc_shows_metrics_params_and_plots(built: Workspace) -> None:
    metrics = json.loads(built.dvc("metrics", "show", "--json"))[""]["data"]
    report = metrics["artifacts/report/metrics.json"]["data"]
    assert report["copy_last"]["skill"] == 0
    assert {"epe", "epe_moving"} <= set(report["teacher"])
    built.set("occlusion.absolute", 0.75)
    assert "occlusion.absolute" in built.dvc("params", "diff")
    built.run("git", "checkout", "-q", "params.yaml")
    plots = built.dvc("plots", "show", "-o", "plots")
    page = Path(plots.strip().splitlines()[-1].removeprefix("file://"))
    assert "latent_warp" in page.read_text()
    shutil.rmtree(built.folder / "plots")


def test_a_parameter_reruns_its_stage_and_what_depends_on_it(again: Workspace) -> None:
    again.set("occlusion.absolute", 0.75)
    assert again.repro("train@latent_warp") == ["occlusion", "train@latent_warp"]
    # Of what has not run, the plan says it (tests/test_plan.py shows that repro does what the plan says).
    plan = {row["title"]: row["state"] for row in json.loads(again.module("pipeline.cli", "plan", "--json"))}
    assert {plan[stage] for stage in ("acquire", "decode", "flow", "vae@frame", "encode@frame")} == {"kept"}
    assert {"kept"}.isdisjoint(plan[stage] for stage in ("evaluate@latent_warp", "evaluate@copy_last", "report"))


def test_a_comment_is_linked_again_without_computing(again: Workspace) -> None:
    before = again.digests("flow")
    again.edit("stages/flow.py", "from __future__", "# a comment\nfrom __future__")
    assert again.repro("-s", "flow") == ["flow"]
    assert again.last_run("flow")["built"] == 0
    assert again.digests("flow") == before


def test_a_changed_line_of_code_computes_again(again: Workspace) -> None:
    again.edit("stages/occlusion.py", "(soft * 255).round()", "(soft * 254).round()")
    again.repro("-s", "occlusion")
    assert again.last_run("occlusion")["built"] == 3


def test_a_new_video_costs_its_own_shard(again: Workspace) -> None:
    again.set("acquire.videos.train", "0-3")
    for stage in ("acquire", "decode", "flow"):
        again.repro("-s", stage)
        assert again.last_run(stage)["built"] == 1, stage


SIXTH = '''"""A sixth predictor: fades to the mean colour of the last frame, as fast as it learns to."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field

from models.predictor import Predictor, Rollout


class Options(BaseModel):
    """Of the rollout alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    brighter: float = Field(default=0.0, description="added to every prediction")


class Fade(Predictor):
    """See the module."""

    needs = frozenset({"frames"})

    def __init__(self, options, *, vaes, height, width, context):
        super().__init__(height=height, width=width, context=context)
        self.brighter = options.brighter
        self.rate = torch.nn.Parameter(torch.tensor(-2.0))

    def faded(self, last, k):
        kept = (1 - torch.sigmoid(self.rate)) ** k
        return kept * last + (1 - kept) * last.mean((-2, -1), keepdim=True)

    def forward(self, batch):
        frames, x = batch.require("frames"), self.context
        loss = sum((self.faded(frames[:, x - 1], k) - frames[:, x - 1 + k]).square().mean() for k in (1, 2))
        return loss, {"faded": loss.detach()}

    def rollout(self, context, horizon, generator):
        frames = [self.faded(context.frames[:, -1], k + 1) + self.brighter for k in range(horizon)]
        return Rollout(frames=torch.stack(frames, 1).clamp(0, 1))
'''


def test_a_sixth_predictor_is_one_file_and_one_block(again: Workspace) -> None:
    (again.folder / "models/predictors/sixth.py").write_text(SIXTH)
    block = {"model": "sixth", "horizon": 2, "batch": 2, "training": {"steps": 3, "warmup": 1}}
    again.set("predictors.sixth", block)
    try:
        assert again.repro() == ["train@sixth", "evaluate@sixth", "report"]
        assert "sixth" in json.loads((again.folder / "artifacts/report/metrics.json").read_text())
        assert "sixth" in (again.folder / "artifacts/report/index.html").read_text()
        shutil.copytree(again.root / "tests", again.folder / "tests")
        said = again.module("pytest", "-q", "--collect-only", "-k", "sixth", "tests/test_predictors.py")
        assert said.count("sixth") > 5, "the contract of predictors is tested of it too"
        # The same weights roll out otherwise: they are evaluated again.
        before = again.digests("evaluate/sixth")["metrics.json"]
        again.set("predictors.sixth", block | {"options": {"brighter": 0.1}})
        for stage in ("train", "evaluate"):
            again.module(f"stages.{stage}", "sixth")
        assert again.last_run("evaluate@sixth")["built"] == 1
        assert again.digests("evaluate/sixth")["metrics.json"] != before
    finally:
        (again.folder / "models/predictors/sixth.py").unlink(missing_ok=True)
        shutil.rmtree(again.folder / "tests", ignore_errors=True)


def test_kill_9_in_the_middle_of_flow_leaves_identical_stores(again: Workspace) -> None:
    before = again.digests("flow")
    shutil.rmtree(again.folder / ".work/flow")
    shutil.rmtree(again.folder / "artifacts/flow")
    shutil.rmtree(again.folder / ".dvc/tmp/../cache/runs", ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "-s", "-f", "flow"],
        cwd=again.folder,
        env={**again.environment, "CLEVRCAST_WORKERS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    work = again.folder / ".work/flow"
    deadline = time.monotonic() + 120
    while not list(work.glob("*/*/unit.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(work.glob("*/*/unit.json"))) < 3
    assert not (again.folder / "artifacts/flow/manifest.json").exists()
    again.repro("-s", "flow")
    assert again.last_run("flow")["built"] < 3
    assert again.digests("flow") == before


def test_workers_give_the_same_bytes(again: Workspace) -> None:
    before = {stage: again.digests(stage) for stage in ("flow", "encode/frame")}  # decode: tests/test_executors.py
    shutil.rmtree(again.folder / ".work")
    for stage, *key in (("flow",), ("encode", "frame")):
        again.module(f"stages.{stage}", *key, CLEVRCAST_WORKERS="1")  # before: one per core
    assert {stage: again.digests(stage) for stage in before} == before
