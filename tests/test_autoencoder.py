"""The frame VAE: ranges, statistics, equivariance's start, saving, and that training improves it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch

from data.errors import EmptyError
from models.autoencoder import BlockVAE, load_vae
from models.checkpoint import digest
from models.reconstruction import psnr
from models.vae_training import VaeOptions, random_flow, train_vae


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small run faster on one thread, and several times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def test_random_flow_stays_in_its_range() -> None:
    flow = random_flow(torch.zeros(4, 3, 32, 48), 5.0, torch.Generator().manual_seed(0))
    assert flow.shape == (4, 2, 32, 48)
    assert 4.0 < flow.abs().max() <= 5.0


def test_training_improves_and_is_deterministic() -> None:
    options = VaeOptions(steps=12, learning_rate=6e-3, warmup=2, precision="float32", ema=0.5)

    def run() -> tuple[BlockVAE, list[float]]:
        vae = small_vae(latent_channels=6)
        result = train_vae(vae, repeat(pictures()), options, generator=torch.Generator().manual_seed(0))
        return vae, result.curves["loss"]

    first, losses = run()
    second, _ = run()
    assert digest(first) == digest(second)
    assert losses[-1] < 0.8 * losses[0]


def test_without_data_training_says_so() -> None:
    with pytest.raises(EmptyError):
        train_vae(small_vae(), iter([]), VaeOptions(), generator=torch.Generator())
