"""Checkpoints: a folder rebuilds its model bit for bit, and says so when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.clips import Context
from data.errors import WeightsError
from models.autoencoder import BlockVAE
from models.checkpoint import digest, load_predictor, load_pretrained, read_meta, save_checkpoint
from models.predictor import Predictor, build

OPTIONS = {"width": 16, "features": 16, "blocks": 2}


def vae_with(seed: int) -> BlockVAE:
    torch.manual_seed(seed)
    return BlockVAE(latent_channels=8, stride=4, width=8, blocks=1).eval()


def saved(folder: Path, vae: BlockVAE) -> Predictor:
    torch.manual_seed(1)
    predictor = build("latent_warp", dict(OPTIONS), vaes={"frame": vae}, height=32, width=48, context=4).eval()
    with torch.no_grad():
        for parameter in predictor.own_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    save_checkpoint(
        folder, predictor, name="latent_warp", options=dict(OPTIONS), steps=7, vaes={"frame": vae}, extra={"seed": 1}
    )
    return predictor


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    vae = vae_with(0)
    predictor = saved(tmp_path / "run", vae)
    again = load_predictor(tmp_path / "run", vaes={"frame": vae_with(0)})
    assert digest(again) == digest(predictor)
    assert not again.training
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(1, 4, 3, 32, 48, generator=generator)
    context = Context(frames, torch.rand(1, 3, 2, 32, 48, generator=generator), torch.ones(1, 3, 1, 32, 48))
    with torch.no_grad():
        a, b = (p.rollout(context, 2, torch.Generator()) for p in (predictor, again))
    assert torch.equal(a.frames, b.frames)


def test_meta_is_readable_and_the_vae_is_not_saved_twice(tmp_path: Path) -> None:
    vae = vae_with(0)
    saved(tmp_path, vae)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["name"] == "latent_warp"
    assert meta["options"] == OPTIONS
    assert meta["steps"] == 7
    assert meta["vae_digests"] == {"frame": digest(vae)}
    assert meta["extra"] == {"seed": 1}
    assert {p.name for p in tmp_path.iterdir()} == {"meta.json", "model.safetensors"}
    assert b"vae." not in (tmp_path / "model.safetensors").read_bytes()[:20_000]


def test_another_vae_is_refused_with_both_digests(tmp_path: Path) -> None:
    saved(tmp_path, vae_with(0))
    with pytest.raises(WeightsError) as caught:
        load_predictor(tmp_path, vaes={"frame": vae_with(5)})
    assert digest(vae_with(0)) in str(caught.value)
    assert digest(vae_with(5)) in str(caught.value)
    with pytest.raises(WeightsError, match="none was given"):
        load_predictor(tmp_path)


def test_statistics_are_part_of_the_vae(tmp_path: Path) -> None:
    vae = vae_with(0)
    before = digest(vae)
    vae.latent_mean += 1
    assert digest(vae) != before


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    vae = vae_with(0)
    saved(tmp_path, vae)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match="has the digest"):
        load_predictor(tmp_path, vaes={"frame": vae})
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(WeightsError, match="cannot be read"):
        load_predictor(tmp_path, vaes={"frame": vae})


def test_an_unfinished_checkpoint_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no finished checkpoint"):
        read_meta(tmp_path)
    saved(tmp_path, vae_with(0))
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(WeightsError, match="not a checkpoint's meta"):
        read_meta(tmp_path)


def test_baselines_have_checkpoints_too(tmp_path: Path) -> None:
    baseline = build("copy_last", {}, vaes={}, height=32, width=48, context=4)
    save_checkpoint(tmp_path, baseline, name="copy_last", options={}, steps=0)
    assert type(load_predictor(tmp_path)) is type(baseline)


def test_training_starts_from_a_checkpoint_of_the_same_model_and_latents(tmp_path: Path) -> None:
    vaes = {"frame": vae_with(0)}
    trained = saved(tmp_path, vaes["frame"])
    torch.manual_seed(7)
    # Another option, and another size, of the same shapes.
    fresh = build("latent_warp", {**OPTIONS, "flow": 0.5}, vaes=vaes, height=64, width=96, context=4)
    assert digest(fresh) != digest(trained)
    meta = load_pretrained(tmp_path, fresh, name="latent_warp", vaes=vaes)
    assert digest(fresh) == digest(trained) == meta.weights_digest
    wider = build("latent_warp", {**OPTIONS, "width": 24}, vaes=vaes, height=32, width=48, context=4)
    with pytest.raises(WeightsError, match=r"LatentWarp does not fit: trunk") as caught:
        load_pretrained(tmp_path, wider, name="latent_warp", vaes=vaes)
    assert "meta.json" in caught.value.remedy
    with pytest.raises(WeightsError, match="holds 'latent_warp', this predictor is 'copy_last'"):
        load_pretrained(tmp_path, fresh, name="copy_last", vaes=vaes)
    with pytest.raises(WeightsError) as caught:
        load_pretrained(tmp_path, fresh, name="latent_warp", vaes={"frame": vae_with(5)})
    assert digest(vae_with(0)) in str(caught.value)
    assert digest(vae_with(5)) in str(caught.value)
