"""What autoencoders minimise and how they are judged: every term by hand, and that training does what it is for."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data.errors import EmptyError
from models.autoencoder import BlockOptions, BlockVAE, LatentVAE, build_vae
from models.checkpoint import digest
from models.discriminator import Adversary
from models.losses import charbonnier, foreground_weight, motion_weight, weighted_mean
from models.perceptual import Perceptual, load_lpips
from models.reconstruction import flow_quality, frame_quality, psnr, reconstruct
from models.training import TrainResult
from models.vae_training import FlowVaeOptions, FrameObjective, VaeOptions, random_flow, train_vae
from models.warp import backward_warp, resize_flow

STEPS = {"learning_rate": 6e-3, "warmup": 2, "precision": "float32", "ema": 0.5}


def pictures(count: int = 8) -> torch.Tensor:
    """Grey ramps, each with one coloured square somewhere, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    ramps = torch.linspace(0.3, 0.6, 32)[None, None, :, None].expand(count, 3, 32, 48).clone()
    for image in ramps:
        y, x = (int(torch.randint(4, high, (1,), generator=generator)) for high in (20, 36))
        image[:, y : y + 8, x : x + 8] = torch.rand(3, 1, 1, generator=generator)
    return ramps


def moving_squares(count: int, seed: int) -> torch.Tensor:
    """Flow of two squares of 10 pixels that move by up to 6 pixels each, over ground at rest."""
    generator = torch.Generator().manual_seed(seed)
    flow = torch.zeros(count, 2, 32, 48)
    for field in flow:
        for _ in range(2):
            y, x = (int(torch.randint(0, high, (1,), generator=generator)) for high in (22, 38))
            field[:, y : y + 10, x : x + 10] = (12 * torch.rand(2, generator=generator) - 6)[:, None, None]
    return flow


def small_vae(**options: int) -> BlockVAE:
    torch.manual_seed(0)
    return BlockVAE(**{"latent_channels": 6, "stride": 4, "width": 16, "blocks": 1, **options})


def trained(vae: LatentVAE, options: VaeOptions, **more: Any) -> TrainResult:
    return train_vae(vae, repeat(pictures()), options, generator=torch.Generator().manual_seed(0), **more)


def test_random_flow_stays_in_its_range() -> None:
    flow = random_flow(torch.zeros(4, 3, 32, 48), 5.0, torch.Generator().manual_seed(0))
    assert flow.shape == (4, 2, 32, 48)
    assert 4.0 < flow.abs().max() <= 5.0


def test_training_improves_and_is_deterministic() -> None:
    options = VaeOptions(steps=12, **STEPS)

    def run() -> tuple[BlockVAE, list[float]]:
        vae = small_vae()
        return vae, trained(vae, options).curves["loss"]

    first, losses = run()
    second, _ = run()
    assert digest(first) == digest(second)
    assert losses[-1] < 0.8 * losses[0]


def test_without_data_training_says_so() -> None:
    with pytest.raises(EmptyError):
        train_vae(small_vae(), iter([]), VaeOptions(), generator=torch.Generator())


def test_the_loss_is_its_terms_and_draws_noise_first_then_motion() -> None:
    """The order of the draws is part of what a seed means."""
    vae, x, options = small_vae(), pictures(), VaeOptions(kl=0.1, equivariance=0.5, foreground=7.0)
    vae.fit_basis(x)
    loss, logs = FrameObjective(vae, options, torch.Generator().manual_seed(3))(x)

    drawn = torch.Generator().manual_seed(3)
    posterior = vae.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=drawn)
    flow = random_flow(x, options.largest_shift, drawn)
    weight = foreground_weight(x, 7.0)
    moved = vae.decode(backward_warp(z, resize_flow(flow, 8, 12))).sample
    expected = {
        "reconstruction": weighted_mean(charbonnier((vae.decode(z).sample - x) / 0.5), weight),
        "kl": posterior.kl().sum() / posterior.mean.numel(),
        "equivariance": weighted_mean(charbonnier((moved - backward_warp(x, flow)) / 0.5), backward_warp(weight, flow)),
    }
    torch.testing.assert_close(logs, expected)
    torch.testing.assert_close(loss, logs["reconstruction"] + 0.1 * logs["kl"] + 0.5 * logs["equivariance"])


def test_a_pretrained_vae_starts_from_its_own_weights() -> None:
    vae = small_vae()
    trained(vae, VaeOptions(steps=6, **STEPS))
    before = digest(vae)
    vae.requires_grad_(False)  # as `read_vae` gives it
    trained(vae, VaeOptions(steps=0), pretrained=True)
    assert digest(vae) == before
    trained(vae, VaeOptions(steps=1, **STEPS), pretrained=True)
    assert digest(vae) != before


def test_motion_counts_more_than_rest() -> None:
    flow = torch.tensor([[0.0, 0.2, 0.0, 3.0], [0.0, 0.1, 0.3, 4.0]]).reshape(1, 2, 1, 4)
    assert motion_weight(flow, 5.0).flatten().tolist() == [1, 1, 6, 6]


def test_the_flow_vae_learns() -> None:
    torch.manual_seed(0)
    vae = build_vae("block", "flow", BlockOptions(stride=4, latent_channels=8, width=16))
    options = FlowVaeOptions(steps=150, **{**STEPS, "learning_rate": 2e-3, "warmup": 10, "ema": 0.9})
    fields = [moving_squares(8, seed) for seed in range(16)]
    held_out = moving_squares(32, 99)
    vae.fit_basis(torch.cat(fields))
    before = flow_quality(reconstruct(vae, held_out), held_out)
    train_vae(vae, (fields[i % 16] for i in range(300)), options, generator=torch.Generator().manual_seed(0))
    vae.calibrate(fields)
    after = flow_quality(reconstruct(vae, held_out), held_out)
    assert after["epe"] is not None
    assert after["epe"] < 0.2
    # The loss cares for what moves, where principal components blur the edges.
    assert after["epe_moving"] is not None
    assert before["epe_moving"] is not None
    assert after["epe_moving"] < 0.75 * before["epe_moving"]


def test_flow_takes_no_term_that_moves_or_looks_at_pictures() -> None:
    for name in ("equivariance", "perceptual", "adversarial"):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            FlowVaeOptions.model_validate({name: 1.0})


def test_the_perceptual_term_needs_its_weights() -> None:
    with pytest.raises(ValidationError, match="perceptual_weights names no file"):
        VaeOptions(perceptual=0.1)
    with pytest.raises(ValueError, match="no perceptual network was given"):
        trained(small_vae(), VaeOptions(steps=1, perceptual=0.1, perceptual_weights="lpips.pt"))


@pytest.mark.real
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_term_at_once_trains(shared: Path, precision: str) -> None:
    perceptual = load_lpips(shared / "weights/lpips_squeeze.pt")
    options = VaeOptions(
        steps=4, perceptual=0.5, perceptual_weights="lpips.pt", adversarial=0.1, adversarial_start=2,
        **{**STEPS, "precision": precision},
    )  # fmt: skip
    vae = small_vae()
    curves = trained(vae, options, perceptual=perceptual).curves
    assert set(curves) >= {"reconstruction", "kl", "equivariance", "perceptual", "adversarial", "discriminator"}
    assert all(torch.isfinite(torch.tensor(values)).all() for values in curves.values())
    assert min(curves["perceptual"]) > 0
    assert curves["adversarial"][:2] == curves["discriminator"][:2] == [0, 0]
    assert min(map(abs, curves["discriminator"][2:])) > 0
    assert all(p.grad is None for p in perceptual.parameters())


def test_lpips_lowers_the_perceptual_distance(shared: Path) -> None:
    perceptual = load_lpips(shared / "weights/lpips_squeeze.pt")

    def distance(weight: float) -> float:
        vae = small_vae()
        trained(
            vae,
            VaeOptions(steps=25, equivariance=0.0, perceptual=weight, perceptual_weights="lpips.pt", **STEPS),
            perceptual=perceptual,
        )
        return float(perceptual(vae(pictures()).sample.detach(), pictures()).mean())

    assert distance(3.0) < 0.9 * distance(0.0)


def test_terms_of_weight_zero_change_no_bit() -> None:
    plain, given = small_vae(), small_vae()
    trained(plain, VaeOptions(steps=3, **STEPS))
    trained(given, VaeOptions(steps=3, adversarial_start=1, **STEPS), perceptual=Perceptual())
    assert digest(plain) == digest(given)


def test_the_adversary_changes_the_vae_only_once_it_has_a_say() -> None:
    def after(steps: int, **options: Any) -> str:
        vae = small_vae()
        trained(vae, VaeOptions(steps=steps, equivariance=0.0, **options, **STEPS))
        return digest(vae)

    late = {"adversarial": 0.5, "adversarial_start": 3}
    assert after(3, **late) == after(3, **{**late, "adversarial": 5.0})
    assert after(4, **late) != after(4, **{**late, "adversarial": 5.0})
    assert after(4, **late) == after(4, **late)


def test_the_discriminator_learns_to_tell_real_from_made() -> None:
    adversary = Adversary(learning_rate=2e-3, seed=0)
    real, made = pictures(), pictures() + 0.1 * torch.randn(8, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    losses = [float(adversary.learn(real, made)) for _ in range(40)]
    assert losses[0] == pytest.approx(1, abs=0.3)
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        assert adversary.network(real).mean() > adversary.network(made).mean()
    # What it objects to: the gradient takes the pictures towards a better score, and leaves it alone.
    made.requires_grad_(True)
    adversary.object_to(made).backward()
    assert made.grad is not None
    better = adversary.object_to(made.detach() - 10 * made.grad)
    assert better < adversary.object_to(made.detach())
    assert all(p.grad is None or not p.requires_grad for p in adversary.network.parameters())


def test_the_discriminator_uses_up_no_random_number_and_is_seeded() -> None:
    torch.manual_seed(3)
    one, two, other = (Adversary(learning_rate=1e-3, seed=seed) for seed in (0, 0, 1))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    score = one.network.eval()(pictures())
    assert torch.equal(two.network.eval()(pictures()), score)
    assert not torch.equal(other.network.eval()(pictures()), score)


def test_quality_by_hand() -> None:
    frames = torch.zeros(3, 3, 4, 4)
    frames[0, :, 0, 0] = 0.8  # the only pixel that is not the median's
    decoded = frames + 0.01
    decoded[0, :, 0, 0] = 0.7
    found = frame_quality(decoded, frames)
    assert found["psnr"] == pytest.approx(float(psnr(decoded, frames).mean()))
    assert found["psnr_foreground"] == pytest.approx(20)
    assert frame_quality(decoded, torch.zeros_like(frames))["psnr_foreground"] is None

    flow = torch.zeros(1, 2, 2, 2)
    flow[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    error = torch.tensor([3.0, 4.0])[:, None, None] * torch.tensor([[0.2, 0.0], [0.1, 0.0]])
    found = flow_quality(flow + error, flow)
    assert found["epe"] == pytest.approx((1.0 + 0.5) / 4)
    assert found["epe_moving"] == pytest.approx(1.0)
    assert flow_quality(flow, torch.zeros_like(flow))["epe_moving"] is None
