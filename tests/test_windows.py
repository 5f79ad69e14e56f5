"""Evaluation windows: the truth on the model's grid at the right frames, and what the stage's result depends on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.catalog import Catalog, Video
from data.clevrer import MAX_OBJECTS
from data.errors import WeightsError
from data.files import file_digest
from data.store import ArraySpec, ShardPlace, assemble, write_shard
from models.checkpoint import save_checkpoint
from models.perceptual import Perceptual
from models.predictor import build
from pipeline.errors import ParamsError
from pipeline.params import parse_params, read_yaml
from pipeline.stage import Job
from stages import evaluate, label
from stages.evaluate import Windows

T, H, W = 12, 32, 48
X, Y = 3, 4


def store(folder: Path, specs: list[ArraySpec], videos: dict[int, dict[str, np.ndarray]]) -> None:
    write_shard(folder.with_suffix(".work"), specs, videos, 4)
    place = ShardPlace(0, folder.with_suffix(".work"), tuple(videos), "k", {"shard": "0" * 64})
    assemble(folder, specs, [place], 4, manifest={"stage": folder.name, "quarantine": []})


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything before `evaluate` for two videos, of which 0 has labels, at twice the resolution of the frames."""
    artifacts, rng = tmp_path / "artifacts", np.random.default_rng(0)
    (artifacts / "acquire").mkdir(parents=True)
    videos = []
    for i in (0, 1):
        file = artifacts / f"acquire/{i}.mp4"
        file.touch()
        videos.append(Video(i, "test", file.name, file_digest(file), None, None))
    Catalog(artifacts / "acquire", tuple(videos), ()).save(stage="acquire")
    frames = {i: {"frames": rng.integers(0, 255, (T, H, W, 3), np.uint8)} for i in (0, 1)}
    store(artifacts / "decode", [ArraySpec("frames", (T, H, W, 3), "uint8", tuple("tyxc"), 4, "picture")], frames)
    flow = ArraySpec("flow_bwd", (T - 1, 2, H, W), "int16", tuple("tcyx"), 4, "field")
    store(artifacts / "flow", [flow], {i: {"flow_bwd": np.zeros(flow.item, np.int16)} for i in (0, 1)})
    seen = ArraySpec("visible", (T - 1, H, W), "uint8", tuple("tyx"), 4, "field")
    store(artifacts / "occlusion", [seen], {i: {"visible": np.full(seen.item, 255, np.uint8)} for i in (0, 1)})
    specs = label.specs(T, 2 * H, 2 * W, 4)
    arrays = {spec.name: np.zeros(spec.item, spec.dtype) for spec in specs}
    for t in range(T):
        arrays["boxes"][t, 1] = (2 * t, 10, 2 * t + 8, 20)
        arrays["presence"][t, 1] = 1
        arrays["collision"][t] = t in (4, 7)
    store(artifacts / "label", specs, {0: arrays})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLEVRCAST_WORKERS", "1")
    copy = build("copy_last", {}, vaes={}, height=H, width=W, context=X)
    save_checkpoint(artifacts / "train/copy_last", copy, name="copy_last", options={}, steps=0)
    return tmp_path


def job(root: Path, **changes: Any) -> Job:
    params = read_yaml(root / "params.yaml")
    params["decode"] |= {"frames": T, "stride": 1, "resolution": [H, W]}
    params["evaluate"] |= {"protocol": "test", "context": X, "horizon": Y, "window_stride": 2, **changes}
    for block in params["predictors"].values():
        block["horizon"] = 1
    return Job("evaluate", "copy_last", parse_params(params), root, ("cpu",))


def test_truth_belongs_to_the_predicted_frames_on_their_grid(root: Path, workspace: Path) -> None:
    windows = Windows(job(root))
    window = windows.of(0)
    assert window.start.tolist() == [0, 2, 4]
    assert window.true_boxes is not None
    assert window.true_boxes.shape == (3, Y, MAX_OBJECTS, 4)
    # The second window predicts frames 5 to 8; boxes are halved, as the labels' grid is twice as fine.
    assert window.true_boxes[1, :, 1].tolist() == [[t, 5, t + 4, 10] for t in range(5, 9)]
    assert window.true_presence is not None
    assert window.true_presence[1].sum(dim=1).tolist() == [1] * Y
    assert window.true_presence[1, :, 1].tolist() == [1] * Y
    assert window.true_collision is not None
    assert window.true_collision.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]


def test_a_video_without_labels_has_no_truth(root: Path, workspace: Path) -> None:
    window = Windows(job(root)).of(1)
    assert {k for k, v in vars(window).items() if v is None} == {
        "foreground", "true_flow_bwd", "true_visible", "true_boxes", "true_presence", "true_collision",
    }  # fmt: skip


def test_only_what_has_a_flow_head_adapts(root: Path, workspace: Path) -> None:
    stage = job(root)
    block = stage.params.predictors["copy_last"].model_copy(update={"adaptation": {"steps": 1}})
    params = stage.params.model_copy(update={"predictors": {**stage.params.predictors, "copy_last": block}})
    with pytest.raises(ParamsError, match=r"predictors\.copy_last\.adaptation is given and copy_last has no flow head"):
        evaluate.run(replace(stage, params=params))


def test_lpips_is_measured_where_its_weights_are_given(root: Path, workspace: Path) -> None:
    def run(**changes: Any) -> tuple[dict[str, Any], str]:
        stage = job(root, **changes)
        evaluate.run(stage)
        manifest = json.loads((stage.out / "manifest.json").read_text())
        return json.loads((stage.out / "metrics.json").read_text())["overall"], manifest["fingerprint"]

    for name, seed in (("a.pt", 0), ("b.pt", 1)):
        torch.manual_seed(seed)
        network = Perceptual().lpips
        weights = {k: torch.randn_like(v) if "lin" in k else v for k, v in network.state_dict().items()}
        torch.save(weights, workspace / name)
    (workspace / "same.pt").write_bytes((workspace / "a.pt").read_bytes())
    without, bare = run()
    first, a = run(lpips=str(workspace / "a.pt"))
    same, again = run(lpips=str(workspace / "same.pt"))
    second, b = run(lpips=str(workspace / "b.pt"))
    assert "lpips" not in without
    assert first == without | {name: first[name] for name in ("lpips", "tlpips")}
    assert (same, again) == (first, a), "the file's name does not matter"
    assert second["lpips"] != first["lpips"]
    assert len({bare, a, b}) == 3, "its content does"
    with pytest.raises(WeightsError, match=r"there is no file .*gone\.pt"):
        run(lpips="gone.pt")
