"""What `latent_diffusion` and its samplers promise beyond the contract of `tests/test_predictors.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from data.clips import Clip, Context
from models.autoencoder import BlockVAE, encode_windows
from models.checkpoint import load_own_state
from models.denoising import Diffusion, FlowMatching, Process
from models.predictors.latent_diffusion import Condition, LatentDiffusion, Options

HEIGHT, WIDTH, CONTEXT, HORIZON = 32, 48, 4, 3
OBJECTIVES = ("flow_matching", "diffusion")


def square(count: int = 2) -> Clip:
    """A square that moves two pixels a frame over a slope."""
    frames = torch.linspace(0.3, 0.6, HEIGHT)[None, None, None, :, None]
    frames = frames.expand(count, CONTEXT + HORIZON, 3, HEIGHT, WIDTH).clone()
    for i in range(count):
        for k in range(CONTEXT + HORIZON):
            frames[i, k, i % 3, 8:16, 4 + 2 * k + 4 * i : 12 + 2 * k + 4 * i] = 0.9
    return Clip(video=torch.arange(count), start=torch.arange(count), frames=frames)


def observed(clip: Clip) -> Context:
    b = len(clip.video)
    between = torch.zeros(b, CONTEXT - 1, 2, HEIGHT, WIDTH)
    return Context(clip.require("frames")[:, :CONTEXT], between, torch.ones(b, CONTEXT - 1, 1, HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def vae() -> BlockVAE:
    torch.manual_seed(0)
    pictures = square(6).require("frames").flatten(0, 1)
    vae = BlockVAE(latent_channels=12, stride=4, width=8, blocks=1)
    vae.fit_basis(pictures)
    vae.calibrate([pictures])
    return vae.eval().requires_grad_(False)


def made(vae: BlockVAE, *, seed: int = 0, **options: Any) -> LatentDiffusion:
    torch.manual_seed(seed)
    small = Options(**{"width": 16, "levels": 2, "coarsen": 2, "flip": True, **options})
    return LatentDiffusion(small, vaes={"frame": vae}, height=HEIGHT, width=WIDTH, context=CONTEXT)


def shaken(predictor: LatentDiffusion) -> LatentDiffusion:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in predictor.own_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return predictor


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_before_training_every_sample_is_copy_last(objective: str, vae: BlockVAE) -> None:
    predictor, context = made(vae, objective=objective).eval(), observed(square())
    last = vae.to_frames(vae.to_latents(context.frames[:, -1]))
    with torch.no_grad():
        frames = predictor.sample(context, HORIZON, seeded(0), 3)
    torch.testing.assert_close(frames, last[:, None, None].expand_as(frames), atol=1e-5, rtol=0)


def test_where_the_gate_is_shut_nothing_ever_changes(vae: BlockVAE) -> None:
    predictor, context = shaken(made(vae)).eval(), observed(square())
    last = vae.to_frames(vae.to_latents(context.frames[:, -1]))
    with torch.no_grad():
        open_frames = predictor.rollout(context, HORIZON, seeded(0)).frames
        predictor.gate[-1].get_parameter("bias").fill_(-60.0)
        shut_frames = predictor.rollout(context, HORIZON, seeded(0)).frames
    assert (open_frames - last[:, None]).abs().max() > 1e-3
    torch.testing.assert_close(shut_frames, last[:, None].expand_as(shut_frames), atol=1e-5, rtol=0)


def test_randomness_comes_from_the_generator(vae: BlockVAE) -> None:
    predictor, context = shaken(made(vae)).eval(), observed(square())
    with torch.no_grad():
        a, again, b = (predictor.rollout(context, HORIZON, seeded(k)).frames for k in (0, 0, 1))
        several = predictor.sample(context, HORIZON, seeded(0), 3)
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    assert several.shape == (2, 3, HORIZON, 3, HEIGHT, WIDTH)
    assert not torch.equal(several[:, 0], several[:, 1])


@pytest.mark.parametrize("steps", [2, 5])
def test_one_sampling_step_ignores_the_noise_and_more_do_not(steps: int, vae: BlockVAE) -> None:
    context = observed(square())
    for count, same in ((1, True), (steps, False)):
        predictor = shaken(made(vae, sampling_steps=count)).eval()
        with torch.no_grad():
            frames = predictor.sample(context, 1, seeded(0), 2)
        assert torch.allclose(frames[:, 0], frames[:, 1], atol=1e-5) is same


def _any_denoiser(x: Float[Tensor, "b z hz wz"], time: Float[Tensor, " b"]) -> Float[Tensor, "b z hz wz"]:
    return torch.tanh(x + 0.3) * (0.2 + time[:, None, None, None] / 1000)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_eulers_method(steps: int, shift: float) -> None:
    e = torch.randn(2, 3, 4, 5, generator=seeded(0))
    levels = [shift * r / (1 + (shift - 1) * r) for r in (1 - k / steps for k in range(steps + 1))]
    x = e.double()
    for s, following in itertools.pairwise(levels):
        velocity = (x - _any_denoiser(x, torch.full((2,), 1000 * s))) / s
        x = x + (following - s) * velocity
    sampled = FlowMatching(shift).sample(_any_denoiser, e, steps)
    torch.testing.assert_close(sampled, x.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_diffusion_is_ddim(steps: int) -> None:
    process, e = Diffusion(), torch.randn(2, 3, 4, 5, generator=seeded(0))
    times = [1000 - k * 1000 // steps - 1 for k in range(steps)]
    x = e.double()
    for k, time in enumerate(times):
        kept = float(process.kept[time])
        following = float(process.kept[times[k + 1]]) if k + 1 < steps else 1.0
        clean = _any_denoiser(x, torch.full((2,), float(time)))
        noise = (x - kept**0.5 * clean) / (1 - kept) ** 0.5
        x = following**0.5 * clean + (1 - following) ** 0.5 * noise
    torch.testing.assert_close(process.sample(_any_denoiser, e, steps), x.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("process", [FlowMatching(), FlowMatching(3.0), Diffusion()])
def test_training_covers_pure_noise_to_nearly_clean(process: Process) -> None:
    mixture = process.at(process.times(torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9999])))
    assert (mixture.signal[0], mixture.noise[0]) == (0, 1)
    assert (mixture.noise.diff() < 0).all()
    assert mixture.noise[-1] < 0.05
    e = torch.randn(5, 2, 3, 3, generator=seeded(0))
    assert not mixture.estimate(e)[0].any()
    torch.testing.assert_close(
        mixture.estimate(mixture.of(torch.ones_like(e), 0 * e))[-1], torch.ones(2, 3, 3), atol=0.05, rtol=0
    )


@pytest.mark.parametrize("process", [FlowMatching(), Diffusion()])
def test_velocity_weight_turns_one_squared_error_into_the_other(process: Process) -> None:
    mixture = process.at(process.times(torch.tensor([0.1, 0.4, 0.7])))
    clean, guess, e = (torch.randn(3, 1, 2, 2, generator=seeded(k)) for k in range(3))
    a, s = (value[:, None, None, None] for value in (mixture.signal, mixture.noise))
    implied = (mixture.of(clean, e) - a * guess) / s
    if isinstance(process, FlowMatching):
        true, said = e - clean, implied - guess
    else:
        true, said = a * e - s * clean, a * implied - s * guess
    weighted = mixture.velocity_weight()[:, None, None, None] * (guess - clean).square()
    torch.testing.assert_close(weighted, (said - true).square(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_mean_of_samples_is_closer_than_a_sample_where_there_are_two_futures(objective: str, vae: BlockVAE) -> None:
    """Every value goes up or down by half a unit of noise: the exact denoiser stands in for a trained one."""
    predictor = made(vae, objective=objective, sampling_steps=8, samples=8, reduce="mean", noise=0.2).eval()
    half = 0.5

    def exact(noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        mixture = predictor.process.at(time)
        odds = half * mixture.signal / mixture.noise.square()
        return half * torch.tanh(odds[:, None, None, None] * noisy)

    predictor.denoise = exact
    context = observed(square())
    present = encode_windows(vae, context.frames)
    change = predictor.unroll(present, 1, seeded(0), 8)[:, -1] - present[:, -1]
    assert ((change.abs() - 0.2 * half).abs() < 0.02).float().mean() > 0.85  # eight steps leave some undecided
    assert 0.4 < (change > 0).float().mean() < 0.6
    truth = vae.to_frames(present[:, -1] + change)[:, None]
    single = predictor.sample(context, 1, seeded(1000), 8)
    mean = predictor.rollout(context, 1, seeded(1000)).frames
    torch.testing.assert_close(mean, single.mean(1))
    error = (single - truth[:, None]).square().mean()
    assert (mean - truth).square().mean() < 0.65 * error  # 9/16 in theory: 1 + 1/8 against 2


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "diffusion", "weighting": "v"},
        {"objective": "flow_matching", "weighting": "v", "matching": 0, "shift": 3.0},
        {"flip": False, "past": 2, "levels": 1},
    ],
)
def test_every_option_trains_every_parameter_in_bfloat16(options: dict[str, Any], vae: BlockVAE) -> None:
    """The unrolled part runs without gradient under the same autocast, whose kept weights must not lose theirs."""
    predictor, clip = shaken(made(vae, **options)).train(), square()
    if not predictor.options.flip:
        latents = encode_windows(vae, clip.require("frames"))
        clip = Clip(video=clip.video, start=clip.start, latents=latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logs = predictor(clip)
    loss.backward()
    assert loss.dtype == torch.float32
    assert set(logs) == {"forced", "unrolled", "gate"}
    silent = [n for n, p in predictor.own_parameters().items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_training_noise_goes_on_from_a_saved_state(vae: BlockVAE) -> None:
    predictor, clip = shaken(made(vae)), square()
    losses = [float(predictor(clip)[0].detach()) for _ in range(2)]
    saved = {name: value.clone() for name, value in predictor.own_state().items()}
    losses.append(float(predictor(clip)[0].detach()))
    assert len(set(losses)) == 3
    other = made(vae, seed=5)
    torch.manual_seed(6)
    load_own_state(other, saved)
    assert float(other(clip)[0].detach()) == losses[-1]


def test_a_clip_with_one_frame_to_predict_is_enough(vae: BlockVAE) -> None:
    clip = square()
    short = Clip(video=clip.video, start=clip.start, frames=clip.require("frames")[:, : CONTEXT + 1])
    assert made(vae)(short)[0].isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda vae: made(vae, levels=3), "height 32 must be divisible by 32|width 48 must be divisible by 32"),
        (lambda vae: made(vae, past=5), "context is 4; it must hold past=5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make: Callable[[BlockVAE], Any], message: str, vae: BlockVAE) -> None:
    with pytest.raises(ValueError, match=message):
        make(vae)
