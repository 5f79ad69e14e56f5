"""The stages `vae` and `encode` for frames and flow: what they write, start from and refuse, and when they run anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.catalog import Catalog, Video
from data.clips import ClipSource
from data.errors import WeightsError
from data.store import ArraySpec, ShardPlace, Store, assemble, pack_flow, write_shard
from models.autoencoder import WEIGHTS, encode_windows, load_vae
from models.checkpoint import digest
from models.kl_vae import KLVAE
from pipeline.errors import ParamsError
from pipeline.params import parse_params, read_yaml
from pipeline.stage import Job
from stages import encode, vae

H, W, T = 32, 48, 6
TRAIN, TEST = (0, 1, 2), (15000,)
FLOW = {"options": {"stride": 4, "latent_channels": 8, "width": 8}, "training": {"steps": 3, "warmup": 1}, "batch": 4}
KL = {"block_out_channels": [8, 16], "norm_num_groups": 4}


def store(stage: str, spec: ArraySpec, videos: dict[int, np.ndarray]) -> None:
    places = []
    for bucket in sorted({video // 100 for video in videos}):
        members = {video: {spec.name: value} for video, value in videos.items() if video // 100 == bucket}
        folder = Path("shards") / stage / str(bucket)
        write_shard(folder, [spec], members, 100)
        places.append(ShardPlace(bucket, folder, tuple(members), f"{stage}{bucket}"))
    assemble(Path("artifacts") / stage, [spec], places, 100, manifest={"stage": stage, "fingerprint": ""})


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `acquire`, `decode` and `flow` are done: squares that move, flow at twice the resolution."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLEVRCAST_WORKERS", "1")
    frames, flows = {}, {}
    for video in (*TRAIN, *TEST):
        rng = np.random.default_rng(video)
        picture = np.full((T, H, W, 3), 120, np.uint8)
        flow = np.zeros((T - 1, 2, 2 * H, 2 * W))
        y, x, dy, dx = (*rng.integers(2, 10, 2), *rng.integers(1, 4, 2))
        for t in range(T):
            top, left = y + t * dy // 2, x + t * dx
            picture[t, top : top + 8, left : left + 8] = rng.integers(0, 255, 3)
            if t:
                flow[t - 1, 0, 2 * top : 2 * top + 16, 2 * left : 2 * left + 16] = -2 * dx
        frames[video], flows[video] = picture, pack_flow(flow)
    store("decode", ArraySpec("frames", (T, H, W, 3), "uint8", ("time", "y", "x", "rgb"), 4, "picture"), frames)
    store("flow", ArraySpec("flow_bwd", (T - 1, 2, 2 * H, 2 * W), "int16", ("pair", "d", "y", "x"), 4, "field"), flows)
    videos = [Video(v, "train" if v in TRAIN else "test", f"{v}.mp4", "", None, None) for v in (*TRAIN, *TEST)]
    Path("artifacts/acquire").mkdir()
    for video in videos:
        Path("artifacts/acquire", video.video).touch()
    Catalog(Path("artifacts/acquire"), tuple(videos), ()).save(stage="acquire")
    return tmp_path


def job(root: Path, stage: str, key: str, **block: Any) -> Job:
    raw = read_yaml(root / "params.yaml")
    raw["decode"] |= {"resolution": [H, W], "frames": 2 * T, "stride": 2}
    raw["evaluate"] |= {"protocol": "test", "context": 2, "horizon": 2}
    for predictor in raw["predictors"].values():
        predictor["horizon"] = 2
    raw["vae"]["frame"] = {"training": {"steps": 2, "warmup": 1}, "batch": 4}
    raw["vae"][key] = {**raw["vae"].get(key, {}), **block}
    return Job(stage, key, parse_params(raw), root, ("cpu",))


def run(root: Path, stage: Any, key: str, **block: Any) -> Job:
    made = job(root, stage.__name__.rpartition(".")[2], key, **block)
    stage.run(made)
    return made


def test_flow_goes_through_both_stages(root: Path, workspace: Path) -> None:
    assert run(root, vae, "flow", **FLOW).made == 1
    folder = Path("artifacts/vae/flow")
    curves = json.loads((folder / "curves.json").read_text())
    assert len(curves["loss"]) == 3
    assert not {"equivariance", "perceptual", "adversarial"} & set(curves)
    found = json.loads((folder / "metrics.json").read_text())
    assert found.keys() == {"split", "images", "epe", "epe_moving"}
    assert (found["split"], found["images"]) == ("test", T - 1)
    assert 0 < found["epe"] < found["epe_moving"] < 1
    promised = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(promised) == {"config.json", WEIGHTS, "curves.json", "metrics.json"}

    run(root, encode, "flow", **FLOW)
    latents = Store("artifacts/encode/flow")
    assert latents.ids == (*TRAIN, *TEST)
    assert tuple(latents.specs["latents"]["item"]) == (T - 1, 8, H // 4, W // 4)
    # What a predictor reads is what it would get by encoding the teacher's flow of the same windows.
    stores = {"frames": Store("artifacts/decode"), "flow_bwd": Store("artifacts/flow"), "flow_latents": latents}
    source = ClipSource(stores, height=H, width=W, videos=TRAIN)
    clip = source.clip([(0, 1), (2, 0)], 4)
    again = encode_windows(load_vae(folder), clip.require("flow_bwd"))
    assert clip.require("flow_latents").shape == (2, 3, 8, H // 4, W // 4)
    torch.testing.assert_close(clip.require("flow_latents"), again, atol=5e-3, rtol=2e-3)
    assert again.std() > 0.3


def test_frames_are_judged_as_frames(root: Path, workspace: Path) -> None:
    run(root, vae, "frame")
    found = json.loads(Path("artifacts/vae/frame/metrics.json").read_text())
    assert found.keys() == {"split", "images", "psnr", "psnr_foreground"}
    assert 15 < found["psnr_foreground"] < found["psnr"]
    run(root, encode, "frame")
    item = Store("artifacts/encode/frame").specs["latents"]["item"]
    assert tuple(item) == (T, 6, H // 2, W // 2)


def test_weights_taken_as_they_are_keep_their_latents(root: Path, workspace: Path) -> None:
    run(root, vae, "flow", **FLOW)
    before = digest(load_vae(Path("artifacts/vae/flow")))
    shutil.copytree("artifacts/vae/flow", "own")
    as_is = {"pretrained": "own", "options": {}, "training": {"steps": 0}}
    assert run(root, vae, "flow", **as_is).made == 1
    assert digest(load_vae(Path("artifacts/vae/flow"))) == before
    assert run(root, vae, "flow", **as_is).made == 0
    # Other weights under the same name are another result.
    weights = load_file(f"own/{WEIGHTS}")
    weights["latent_mean"] += 1
    save_file(weights, f"own/{WEIGHTS}")
    assert run(root, vae, "flow", **as_is).made == 1
    assert digest(load_vae(Path("artifacts/vae/flow"))) != before
    torch.testing.assert_close(load_vae(Path("artifacts/vae/flow")).latent_mean, weights["latent_mean"])


def test_a_plain_checkpoint_is_calibrated_and_can_be_trained_on(root: Path, workspace: Path) -> None:
    torch.manual_seed(0)
    plain = KLVAE(block_out_channels=(8, 16), norm_num_groups=4)
    plain.save_pretrained("theirs")
    weights = load_file(f"theirs/{WEIGHTS}")
    save_file({k: v for k, v in weights.items() if not k.startswith("latent_")}, f"theirs/{WEIGHTS}")
    block = {"architecture": "kl", "pretrained": "theirs", "batch": 4}
    run(root, vae, "frame", **block, training={"steps": 0})
    used = load_vae(Path("artifacts/vae/frame"))
    assert torch.equal(used.encoder.conv_in.weight, plain.encoder.conv_in.weight)  # pyright: ignore[reportAttributeAccessIssue]
    assert used.latent_std.max() != 1
    latents = used.to_latents(torch.from_numpy(Store("artifacts/decode").read("frames", 0)).permute(0, 3, 1, 2) / 255)
    assert 0.3 < latents.std() < 3
    run(root, vae, "frame", **block, training={"steps": 1})
    assert digest(load_vae(Path("artifacts/vae/frame"))) != digest(used)


def test_the_kl_architecture_goes_through_both_stages(root: Path, workspace: Path) -> None:
    block = {"architecture": "kl", "options": KL, "batch": 4, "training": {"steps": 2, "warmup": 1}}
    run(root, vae, "frame", **block)
    assert type(load_vae(Path("artifacts/vae/frame"))) is KLVAE
    run(root, encode, "frame", **block)
    assert tuple(Store("artifacts/encode/frame").specs["latents"]["item"]) == (T, 4, H // 2, W // 2)


def test_the_weights_of_lpips_are_part_of_the_fingerprint(root: Path, workspace: Path, shared: Path) -> None:
    shutil.copy(shared / "weights/lpips_squeeze.pt", "lpips.pt")
    training = {"steps": 1, "warmup": 1, "perceptual": 0.1, "perceptual_weights": "lpips.pt", "adversarial": 0.1}
    assert run(root, vae, "frame", training=training).made == 1
    assert run(root, vae, "frame", training=training).made == 0
    weights = torch.load("lpips.pt", weights_only=True)
    weights["lin0.model.1.weight"] = weights["lins.0.model.1.weight"] = 2 * weights["lins.0.model.1.weight"]
    torch.save(weights, "lpips.pt")
    assert run(root, vae, "frame", training=training).made == 1


@pytest.mark.parametrize(
    ("key", "block", "kind", "said"),
    [
        ("frame", {"training": {"steps": 0}}, ParamsError, r"steps is 0 and vae\.frame\.pretrained names no folder"),
        ("flow", {"training": {"equivariance": 1.0}}, ParamsError, r"vae\.flow\.training\.equivariance = 1\.0"),
        ("frame", {"training": {"perceptual": 0.1}}, ParamsError, "perceptual_weights names no file"),
        ("frame", {"options": {"strid": 4}}, ParamsError, r"vae\.frame\.options\.strid.*did you mean 'stride'"),
        ("frame", {"options": {"stride": 1}}, ParamsError, r"vae\.frame\.options: latent_channels=6 exceeds the 3"),
        ("frame", {"options": {"stride": 5}}, ParamsError, r"stride of 5, which does not divide decode\.resolution"),
        ("frame", {"architecture": "kl", "options": {"stride": 2}}, ParamsError, r"vae\.frame\.options\.stride"),
        ("frame", {"pretrained": "absent"}, WeightsError, "no autoencoder in absent"),
        (
            "frame",
            {"training": {"perceptual": 0.1, "perceptual_weights": "absent.pt"}},
            WeightsError,
            r"no file absent\.pt",
        ),
    ],
)
def test_what_does_not_go_together_is_said_before_training(
    root: Path, workspace: Path, key: str, block: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        run(root, vae, key, **block)
    assert not list(Path(".work").glob("vae*/*"))


def test_the_parameters_name_architecture_and_key(root: Path) -> None:
    raw = read_yaml(root / "params.yaml")
    raw["vae"]["flow"] = dict(FLOW)
    assert parse_params(raw).vae["flow"].architecture == "block"
    for change, said in (
        ({"flow": {"architecture": "vq"}, "frame": {}}, r"vae\.flow\.architecture = 'vq'"),
        ({"flow": {}}, r"vae\.frame is missing"),
        ({"frame": {}, "depth": {}}, "depth"),
    ):
        with pytest.raises(ParamsError, match=said):
            parse_params({**raw, "vae": change})
