"""The stage `flow`: the teachers it takes, what its manifest says of them, and finished work that needs no network."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import fake_ptlflow
import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import Raft_Small_Weights, raft_small

import models.flow_teachers
from data.catalog import Catalog, Video
from data.clevrer import FPS, FRAMES, HEIGHT, WIDTH
from data.errors import ClevrcastError, WeightsError
from data.files import file_digest
from data.picture import write_video
from data.store import Store
from models.flow_teachers import FlowPair
from models.ptlflow_teacher import PYTHON
from pipeline.errors import ParamsError
from pipeline.params import parse_params, read_yaml
from pipeline.stage import Job
from stages import flow

H, W = 128, 136


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short file of noise that lasts as long as CLEVRER's."""
    path = tmp_path_factory.mktemp("video") / "video_00000.mp4"
    three = np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
    write_video(path, three[np.minimum(np.arange(FRAMES), 2)], FPS)
    return path


@pytest.fixture
def workspace(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `acquire` is done."""
    acquired = tmp_path / "artifacts/acquire"
    acquired.mkdir(parents=True)
    (acquired / video.name).symlink_to(video)
    Catalog(acquired, (Video(0, "train", video.name, file_digest(video), None, None),), ()).save(stage="acquire")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLEVRCAST_WORKERS", "1")
    monkeypatch.setenv("TORCH_HOME", os.fspath(tmp_path / "home"))
    return tmp_path


def raw(root: Path, **changes: Any) -> dict[str, Any]:
    params = read_yaml(root / "params.yaml")
    params["decode"] |= {"frames": 4, "stride": 1}
    params["evaluate"] |= {"protocol": "test", "context": 2, "horizon": 2}
    for block in params["predictors"].values():
        block["horizon"] = 1
    params["flow"] |= {"resolution": [H, W], "iterations": 1, **changes}
    return params


def run(root: Path, **changes: Any) -> Job:
    job = Job("flow", "", parse_params(raw(root, **changes)), root, ("cpu",))
    flow.run(job)
    return job


def manifest() -> dict[str, Any]:
    return json.loads(Path("artifacts/flow/manifest.json").read_text())


def weights_file(workspace: Path) -> Path:
    path = workspace / "home/hub/checkpoints" / Path(Raft_Small_Weights.C_T_V1.url).name
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), path)
    return path


def test_finished_work_is_found_again_without_a_network_but_not_without_its_weights(
    root: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights_file(workspace)
    first = run(root, teacher="raft_small")
    assert (first.made, first.facts["teacher_calls"]) == (1, 1)
    assert first.facts["pairs_per_second"] > 0
    assert manifest()["teacher"]["weights_sha256"] == file_digest(path)

    def built(*_: object) -> str:
        raise AssertionError("a network was built for finished work")

    with monkeypatch.context() as patch:
        patch.setattr(models.flow_teachers, "load_raft_weights", built)
        second = run(root, teacher="raft_small")
        assert second.facts == {"teacher_calls": 0}
        with pytest.raises(AssertionError, match="was built"):
            run(root, teacher="raft_small", iterations=2)
    path.unlink()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=path.name):
        run(root, teacher="raft_small")


def test_dis_is_called_once_a_video(root: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    call = models.flow_teachers.DisTeacher.__call__

    def counted(self: models.flow_teachers.DisTeacher, frames: torch.Tensor) -> FlowPair:
        calls.append(len(frames))
        return call(self, frames)

    monkeypatch.setattr(models.flow_teachers.DisTeacher, "__call__", counted)
    assert run(root, teacher="dis").facts["teacher_calls"] == 1
    assert calls == [4]


@pytest.fixture
def package(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = fake_ptlflow.write(workspace / "package")
    monkeypatch.setenv("PYTHONPATH", os.fspath(folder))
    monkeypatch.setenv(PYTHON, sys.executable)
    return folder


def test_a_ptlflow_teacher_goes_through_the_stage_and_says_loudly_that_it_is_untrained(
    root: Path, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = read_yaml(root / "params.yaml")["flow"]["gate"] | {"enabled": False}
    settings = {"teacher": "ptlflow:probe", "weights": "random", "gate": gate}
    assert run(root, **settings).facts["teacher_calls"] == 1
    assert "ptlflow:probe: RANDOM, UNTRAINED WEIGHTS" in capsys.readouterr().err
    said = manifest()
    assert said["params"]["weights"] == "random"
    assert "UNTRAINED" in said["teacher"]["warning"]
    assert said["teacher"]["ptlflow"] == fake_ptlflow.VERSION
    stored = Store("artifacts/flow").read_flow("flow_bwd", 0)
    assert stored.shape == (3, 2, H, W)
    assert 0.3 < stored.mean() < 0.7  # the colours of noise, as shares of one

    monkeypatch.setenv("FAKE_UNBUILDABLE", "1")
    assert run(root, **settings).facts == {"teacher_calls": 0}
    # Another version of ptlflow is another teacher, and so is another checkpoint.
    init = package / "ptlflow/__init__.py"
    init.write_text(init.read_text().replace(fake_ptlflow.VERSION, "0.4.other"))
    with pytest.raises(WeightsError, match="nothing was to be built"):
        run(root, **settings)


def test_an_absent_checkpoint_stops_the_stage_before_it_decodes(
    root: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("a video was decoded")

    monkeypatch.setattr(flow.VideoReader, "read", decoded)
    with pytest.raises(WeightsError, match="there is no file"):
        run(root, teacher="ptlflow:probe", weights="weights/absent.ckpt")
    with pytest.raises(ClevrcastError, match="no model 'prob'"):
        run(root, teacher="ptlflow:prob", weights="random")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "raft_smal"}, r"flow\.teacher = 'raft_smal'.*did you mean 'raft_small'"),
        ({"teacher": "ptlflow:"}, r"flow\.teacher = 'ptlflow:'.*ptlflow:NAME"),
        ({"teacher": "ptlflow:a b", "weights": "random"}, r"flow\.teacher = 'ptlflow:a b'"),
        ({"teacher": "ptlflow:sea_raft_s"}, r"flow\.weights is missing: ptlflow:sea_raft_s needs.*things.*random"),
        ({"teacher": "ptlflow:sea_raft_s", "weights": ""}, r"flow\.weights is missing"),
        ({"teacher": "ptlflow:sea_raft_s", "weights": 3}, r"flow\.weights = 3"),
        ({"teacher": "dis", "weights": "random"}, r"flow\.weights = 'random' is for ptlflow:NAME.*dis: leave it out"),
    ],
)
def test_teachers_and_weights_that_do_not_belong_together(root: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        parse_params(raw(root, **changes))


def test_weights_are_named_by_path_by_publication_or_as_random(root: Path) -> None:
    for weights in ("weights/own.ckpt", "things", "random"):
        params = parse_params(raw(root, teacher="ptlflow:sea_raft_s", weights=weights))
        assert params.flow.weights == weights
