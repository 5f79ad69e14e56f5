"""The autoencoders: ranges, statistics, the start before training, saving, loading and checkpoints of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

from data.errors import EmptyError, WeightsError
from models.autoencoder import (
    WEIGHTS,
    BlockOptions,
    BlockVAE,
    KLOptions,
    LatentVAE,
    build_vae,
    load_vae,
    read_pretrained,
    read_vae,
)
from models.checkpoint import digest
from models.kl_vae import KLVAE
from models.reconstruction import psnr


def pictures(count: int = 8, seed: int = 0) -> torch.Tensor:
    """Smooth grey scenes, each with one coloured square somewhere, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(0.3, 0.6, 32)[None, None, :, None].expand(count, 3, 32, 48).clone()
    for image in slope:
        y, x = (int(torch.randint(4, high, (1,), generator=generator)) for high in (20, 36))
        image[:, y : y + 8, x : x + 8] = torch.rand(3, 1, 1, generator=generator)
    return slope


def small_vae(**options: int) -> BlockVAE:
    torch.manual_seed(0)
    return BlockVAE(**{"latent_channels": 12, "stride": 4, "width": 16, "blocks": 1, **options})


@pytest.mark.parametrize(("stride", "channels"), [(2, 4), (4, 16), (8, 32)])
def test_shapes_and_the_linear_start(stride: int, channels: int) -> None:
    vae, x = small_vae(stride=stride, latent_channels=channels), pictures()
    vae.fit_basis(x)
    z = vae.encode(x).latent_dist.mean
    assert z.shape == (8, channels, 32 // stride, 48 // stride)
    assert vae.decode(z).sample.shape == x.shape
    assert z.std((0, 2, 3)).max() < 1.1
    assert psnr(vae(x).sample, x).mean() > 24


def test_all_channels_reconstruct_exactly_before_training() -> None:
    vae, x = small_vae(latent_channels=48), pictures()
    vae.fit_basis(x)
    torch.testing.assert_close(vae(x).sample, x, atol=1e-4, rtol=0)


def test_statistics_normalise_the_latents() -> None:
    vae, x = small_vae(), pictures(32)
    vae.fit_basis(x)
    vae.calibrate(x.split(7))
    latents = vae.to_latents(x)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(vae.denormalise(latents), vae.encode(x).latent_dist.mean)


def test_gain_says_how_much_a_channel_shows() -> None:
    vae, x = small_vae(), pictures(32)
    vae.fit_basis(x)
    vae.calibrate([x])
    # Principal components are orthonormal: a unit of a channel spreads its deviation over the block's 48 values,
    # and the input's scale turns [-1, 1] into [0, 1].
    expected = vae.synthesis.weight.detach()[:, :, 0, 0].norm(dim=0) / 48**0.5 * vae.latent_std * 0.5
    torch.testing.assert_close(vae.latent_gain, expected, rtol=1e-3, atol=1e-7)


def test_frames_are_clamped_and_samples_are_not() -> None:
    vae, x = small_vae(), pictures()
    vae.fit_basis(x)
    loud = 50 * torch.randn(2, 12, 8, 12, generator=torch.Generator().manual_seed(0))
    frames = vae.to_frames(loud)
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert vae.decode(loud).sample.abs().max() > 1


def test_flow_units_are_scaled_inside() -> None:
    vae = BlockVAE(in_channels=2, latent_channels=32, stride=4, width=8, blocks=1, shift=0.0, scale=8.0)
    flow = 5 * torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    vae.fit_basis(flow)
    torch.testing.assert_close(vae(flow).sample, flow, atol=1e-3, rtol=0)


def test_errors_name_both_values() -> None:
    with pytest.raises(ValueError, match="height 30 and width 48 must be divisible by the stride 4"):
        small_vae().encode(torch.zeros(1, 3, 30, 48))
    with pytest.raises(ValueError, match="latent_channels=99 exceeds the 48"):
        small_vae(latent_channels=99)
    with pytest.raises(EmptyError):
        small_vae().calibrate([])


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    vae, x = small_vae(), pictures()
    vae.fit_basis(x)
    vae.calibrate([x])
    vae.save_pretrained(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = load_vae(tmp_path)
    assert digest(again) == digest(vae)
    assert torch.equal(again.to_latents(x), vae.to_latents(x))
    assert not any(p.requires_grad for p in again.parameters())


def small_kl(key: str = "frame", **options: Any) -> LatentVAE:
    torch.manual_seed(0)
    small = KLOptions.model_validate({"block_out_channels": (8, 16, 16), "norm_num_groups": 4, **options})
    return build_vae("kl", key, small)


def test_the_kl_architecture_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    vae, x = small_kl(), pictures()
    assert vae.stride == 4
    assert vae.encode(x).latent_dist.mean.shape == (8, 4, 8, 12)
    vae.calibrate([x])
    vae.save_pretrained(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = load_vae(tmp_path)
    assert type(again) is KLVAE
    assert digest(again) == digest(vae)
    assert torch.equal(again.to_latents(x), vae.to_latents(x))
    torch.testing.assert_close(again.to_latents(x).std((0, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_the_kl_architecture_works_in_bfloat16_and_keeps_its_posterior_exact() -> None:
    vae, x = small_kl(), pictures(2)
    with torch.autocast("cpu", torch.bfloat16):
        posterior, out = vae.encode(x).latent_dist, vae(x).sample
    assert posterior.mean.dtype == out.dtype == torch.float32
    torch.testing.assert_close(out, vae(x).sample, atol=0.05, rtol=0)


def plain(folder: Path, **config: Any) -> AutoencoderKL:
    """A checkpoint as diffusers saves it."""
    torch.manual_seed(1)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4, "scaling_factor": 0.3, **levels, **config}
    vae = AutoencoderKL(**small).eval()
    vae.save_pretrained(str(folder))
    return vae


def test_a_plain_checkpoint_of_diffusers_is_read_in_its_own_scaling(tmp_path: Path) -> None:
    theirs, x = plain(tmp_path), pictures()
    ours, calibrated = read_vae(tmp_path)
    assert not calibrated
    assert ours.config["scaling_factor"] == 0.3
    with torch.no_grad():
        z = theirs.encode(2 * x - 1).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(ours.encode(x).latent_dist.mean, z)
        assert torch.equal(ours(x).sample, theirs.decode(z).sample * 0.5 + 0.5)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(WeightsError, match="no statistics of its latents"):
        load_vae(tmp_path)


def test_diffusers_reads_our_weights(tmp_path: Path) -> None:
    vae = small_kl()
    vae.save_pretrained(str(tmp_path))
    theirs = AutoencoderKL.from_pretrained(str(tmp_path), low_cpu_mem_usage=False)
    own = vae.state_dict()
    assert all(torch.equal(own[key], value) for key, value in theirs.state_dict().items())


def test_attention_weights_under_their_former_names_are_read(tmp_path: Path) -> None:
    theirs = plain(tmp_path)
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    file, renamed = tmp_path / WEIGHTS, {}
    for key, value in load_file(file).items():
        for new, old in former.items():
            key = key.replace(new, old)
        renamed[key] = value
    assert set(renamed) != set(theirs.state_dict())
    save_file(renamed, file)
    ours, _ = read_vae(tmp_path)
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())


def test_a_pretrained_folder_has_to_be_what_was_asked_for(tmp_path: Path) -> None:
    plain(tmp_path)
    vae, _ = read_pretrained(tmp_path, "kl", "frame", KLOptions())  # options that are not set agree with anything
    assert vae.stride == 2
    read_pretrained(tmp_path, "kl", "frame", KLOptions(block_out_channels=(8, 16), norm_num_groups=4))
    for architecture, key, options, said in (
        ("block", "frame", BlockOptions(), "architecture is kl instead of block"),
        ("kl", "flow", KLOptions(), r"in_channels is 3 instead of 2.*scale is 0\.5 instead of 8\.0"),
        ("kl", "frame", KLOptions(latent_channels=8), "latent_channels is 4 instead of 8"),
        ("kl", "frame", KLOptions(block_out_channels=(8,)), r"block_out_channels is \[8, 16\] instead of \[8\]"),
    ):
        with pytest.raises(WeightsError, match=said):
            read_pretrained(tmp_path, architecture, key, options)


def test_folders_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    def refused(said: str) -> None:
        with pytest.raises(WeightsError, match=said):
            read_vae(tmp_path)

    refused(r"no autoencoder in .*config\.json is absent")
    plain(tmp_path)
    weights, config = tmp_path / WEIGHTS, tmp_path / "config.json"
    good, settings = load_file(weights), config.read_text()
    save_file({key: value for key, value in good.items() if key != "quant_conv.bias"}, weights)
    refused("does not fit: quant_conv.bias is missing")
    save_file({**good, "extra": torch.zeros(1)}, weights)
    refused("does not fit: extra is unknown")
    save_file({**good, "quant_conv.bias": torch.zeros(5)}, weights)
    refused(r"cannot be loaded: .* size mismatch for quant_conv\.bias.*\[5\].*\[8\]")
    weights.write_bytes(b"no tensors")
    refused("cannot be loaded")
    weights.unlink()
    torch.save(good, tmp_path / "diffusion_pytorch_model.bin")
    refused(r"has no diffusion_pytorch_model\.safetensors")
    config.write_text(settings.replace("AutoencoderKL", "UNet2DModel"))
    refused("_class_name 'UNet2DModel', known are BlockVAE, KLVAE, AutoencoderKL")
    config.write_text("{")
    refused("is not JSON")


def test_errors_of_the_kl_architecture_name_both_values() -> None:
    with pytest.raises(ValueError, match="norm_num_groups=3 does not divide block_out_channels"):
        small_kl(norm_num_groups=3)
    with pytest.raises(ValueError, match="height 30 and width 48 must be divisible by the stride 4"):
        small_kl().encode(torch.zeros(1, 3, 30, 48))
    with pytest.raises(ValueError, match="out_channels=4 is not in_channels=3"):
        KLVAE(out_channels=4)
