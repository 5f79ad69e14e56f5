"""The contract, tested on every file of ``models/predictors``, and what `latent_warp` promises on its own.

A predictor is tested here by existing: put its file there and these tests run on it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import repeat
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data.clips import FIELDS, Clip, Context
from models.augmentation import GuiseOptions, latent_targets, roll_colours
from models.autoencoder import BlockVAE, Vaes, encode_windows
from models.losses import latent_error
from models.predictor import Predictor, available, build, find
from models.training import TrainingOptions, train
from models.warp import advect_flow, backward_warp, resize_flow

HEIGHT, WIDTH, CONTEXT, HORIZON = 32, 48, 4, 3

# Smaller than the defaults, so that the whole folder is tested in seconds. A predictor may be absent.
SMALL: dict[str, dict[str, Any]] = {
    "latent_diffusion": {"width": 16, "levels": 2, "coarsen": 2},
    "latent_flow_aux": {"width": 16, "features": 16, "blocks": 2, "kernel": 3},
    "latent_transformer": {"patch": 4, "width": 32, "heads": 2, "blocks": 2, "features": 16, "kernel": 3},
    "latent_warp": {"width": 16, "features": 16, "blocks": 2},
    "pixel_warp_lstm": {"width": 16, "depth": 1, "hidden": 16, "middle": 16, "fine": 8},
    "two_stream": {"width": 16, "features": 16, "motion_blocks": 2, "appearance_blocks": 2},
}


def scene(count: int = 2, seed: int = 0, frames: int = CONTEXT + HORIZON) -> Clip:
    """Squares that move at constant velocity over a slope, with their true flow, visibility and boxes, and a collision
    with something at the right border. The last window has no annotation."""
    generator = torch.Generator().manual_seed(seed)
    pictures = (
        torch.linspace(0.3, 0.6, HEIGHT)[None, None, None, :, None].expand(count, frames, 3, HEIGHT, WIDTH).clone()
    )
    flow_bwd = torch.zeros(count, frames - 1, 2, HEIGHT, WIDTH)
    visible = torch.ones(count, frames - 1, 1, HEIGHT, WIDTH)
    boxes, presence, collision, collision_pairs = (
        torch.zeros(count, frames, 6, 4),
        torch.zeros(count, frames, 6),
        torch.zeros(count, frames),
        torch.zeros(count, frames, 6, 6),
    )
    labelled = (torch.arange(count) < max(count - 1, 1)).float()
    for i in range(count):
        y, x = (
            int(torch.randint(4, 16, (1,), generator=generator)),
            int(torch.randint(4, 16, (1,), generator=generator)),
        )
        colour = torch.rand(3, 1, 1, generator=generator)
        for k in range(frames):
            pictures[i, k, :, y : y + 8, x + 2 * k : x + 2 * k + 8] = colour
            if labelled[i]:
                boxes[i, k, 0] = torch.tensor([x + 2 * k, y, x + 2 * k + 8, y + 8]).float()
                boxes[i, k, 1] = torch.tensor([WIDTH - 12, y, WIDTH - 4, y + 8]).float()  # is not drawn
                presence[i, k, :2], collision[i, k] = 1, float(k == CONTEXT + 1)
                collision_pairs[i, k, 0, 1] = collision_pairs[i, k, 1, 0] = collision[i, k]
            if k:
                flow_bwd[i, k - 1, 0, y : y + 8, x + 2 * k : x + 2 * k + 8] = -2
                visible[i, k - 1, 0, y : y + 8, x + 2 * k - 2 : x + 2 * k] = 0
    numbers = torch.arange(count)
    return Clip(
        video=numbers,
        start=numbers,
        frames=pictures,
        flow_bwd=flow_bwd,
        visible=visible,
        boxes=boxes,
        presence=presence,
        collision=collision,
        collision_pairs=collision_pairs,
        labelled=labelled,
    )


@pytest.fixture(scope="module")
def vaes() -> Vaes:
    torch.manual_seed(0)
    clip = scene(8)
    pictures, flows = clip.require("frames").flatten(0, 1), clip.require("flow_bwd").flatten(0, 1)
    frame = BlockVAE(latent_channels=12, stride=4, width=8, blocks=1)
    flow = BlockVAE(in_channels=2, latent_channels=8, stride=4, width=8, blocks=1, shift=0.0, scale=8.0)
    for made, images in ((frame, pictures), (flow, flows)):
        made.fit_basis(images)
        made.calibrate([images])
    return {"frame": frame.eval().requires_grad_(False), "flow": flow.eval().requires_grad_(False)}


def with_latents(clip: Clip, vaes: Vaes) -> Clip:
    latents = encode_windows(vaes["frame"], clip.require("frames"))
    return replace(clip, latents=latents, flow_latents=encode_windows(vaes["flow"], clip.require("flow_bwd")))


def observed(clip: Clip) -> Context:
    frames, flow_bwd, visible = (clip.require(name) for name in ("frames", "flow_bwd", "visible"))
    return Context(frames[:, :CONTEXT], flow_bwd[:, : CONTEXT - 1], visible[:, : CONTEXT - 1])


def made(name: str, vaes: Vaes, **options: Any) -> Predictor:
    torch.manual_seed(0)
    return build(name, {**SMALL.get(name, {}), **options}, vaes=vaes, height=HEIGHT, width=WIDTH, context=CONTEXT)


def shaken(predictor: Predictor) -> Predictor:
    """Away from the identity, where a peek into the future could hide behind zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in predictor.own_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return predictor.eval()


@pytest.mark.parametrize("prior", ["none", "matching"])
def test_latent_warp_without_teacher_reaches_every_parameter_too(prior: str, vaes: Vaes) -> None:
    predictor = shaken(made("latent_warp", vaes, motion_prior=prior, flip=False)).train()
    assert predictor.needs == {"latents", "flow_bwd", "visible"}
    predictor(with_latents(scene(), vaes))[0].backward()
    silent = [n for n, p in predictor.own_parameters().items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


every_predictor = pytest.mark.parametrize("name", available())


@every_predictor
def test_rollout_keeps_the_contract(name: str, vaes: Vaes) -> None:
    with torch.no_grad():
        out = shaken(made(name, vaes)).rollout(observed(scene()), HORIZON, torch.Generator().manual_seed(0))
    assert out.frames.shape == (2, HORIZON, 3, HEIGHT, WIDTH)
    assert out.frames.min() >= 0
    assert out.frames.max() <= 1
    if out.flow_bwd is not None:
        assert out.flow_bwd.shape == (2, HORIZON, 2, HEIGHT, WIDTH)
    if out.visible is not None:
        assert out.visible.shape == (2, HORIZON, 1, HEIGHT, WIDTH)
        assert 0 <= out.visible.min() <= out.visible.max() <= 1
    if out.boxes is not None:
        assert out.presence is not None
        assert out.boxes.shape == (*out.presence.shape, 4)
        assert out.presence.shape[:2] == (2, HORIZON)
        assert 0 <= out.presence.min() <= out.presence.max() <= 1
        assert (out.boxes[..., 2:] >= out.boxes[..., :2]).all()
    if out.collision is not None:
        assert out.collision.shape == (2, HORIZON)
        assert 0 <= out.collision.min() <= out.collision.max() <= 1


@every_predictor
def test_nothing_of_the_future_reaches_a_rollout(name: str, vaes: Vaes) -> None:
    predictor, clip = shaken(made(name, vaes)), scene()
    other = replace(clip, **{key: clip.require(key).clone() for key in ("frames", "flow_bwd", "visible")})
    noise = torch.Generator().manual_seed(2)
    other.require("frames")[:, CONTEXT:].uniform_(generator=noise)
    other.require("flow_bwd")[:, CONTEXT - 1 :].uniform_(-3, 3, generator=noise)
    other.require("visible")[:, CONTEXT - 1 :].uniform_(generator=noise)
    with torch.no_grad():
        a, b = (predictor.rollout(observed(c), HORIZON, torch.Generator().manual_seed(0)) for c in (clip, other))
    for field in (f.name for f in fields(a)):
        left, right = getattr(a, field), getattr(b, field)
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


@every_predictor
def test_the_loss_reaches_every_parameter(name: str, vaes: Vaes) -> None:
    predictor = made(name, vaes)
    if not predictor.needs:
        with pytest.raises(TypeError, match="without training"):
            predictor(scene())
        return
    shaken(predictor).train()
    loss, logs = predictor(with_latents(scene(), vaes))
    loss.backward()
    assert loss.isfinite()
    assert logs
    assert all(value.isfinite() and not value.requires_grad for value in logs.values())
    silent = [n for n, p in predictor.own_parameters().items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    assert all(p.grad is None for n, p in predictor.named_parameters() if n not in predictor.own_parameters())


@every_predictor
def test_it_reads_only_what_it_needs(name: str, vaes: Vaes) -> None:
    predictor, clip = made(name, vaes), with_latents(scene(), vaes)
    if not predictor.needs:
        return
    unneeded = {*FIELDS} - predictor.needs
    predictor(replace(clip, **dict.fromkeys(unneeded)))
    for field in predictor.needs:
        with pytest.raises(ValueError, match=field):
            predictor(replace(clip, **{field: None}))


@every_predictor
def test_options_are_strict(name: str, vaes: Vaes) -> None:
    with pytest.raises(ValidationError, match="colour"):
        made(name, vaes, colour="red")
    for field in find(name)[0].model_fields.values():
        assert field.description


@every_predictor
@pytest.mark.slow
def test_it_learns_one_clip(name: str, vaes: Vaes) -> None:
    predictor, clip = made(name, vaes), with_latents(scene(), vaes)
    if not predictor.needs:
        return
    options = TrainingOptions(steps=15, learning_rate=5e-3, warmup=2, ema=0.0, precision="float32", horizon_ramp=0.0)
    curve = train(predictor, repeat(clip), options).curves["loss"]
    assert curve[-1] < 0.7 * curve[0]


@every_predictor
def test_same_seed_same_weights(name: str, vaes: Vaes) -> None:
    clip = with_latents(scene(), vaes)
    if not made(name, vaes).needs:
        return
    first, second = made(name, vaes), made(name, vaes)
    for predictor in (first, second):
        train(predictor, repeat(clip), TrainingOptions(steps=2, precision="float32"))
    assert all(torch.equal(a, b) for a, b in zip(first.own_state().values(), second.own_state().values(), strict=True))


def test_an_unknown_predictor_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="'oracle'; there are: advect, copy_last,"):
        find("oracle")


def test_latent_warp_without_a_vae_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs a frame VAE"):
        build("latent_warp", {}, vaes={}, height=HEIGHT, width=WIDTH, context=CONTEXT)


def test_latent_warp_without_prior_starts_as_copy_last(vaes: Vaes) -> None:
    predictor, context = made("latent_warp", vaes, motion_prior="none"), observed(scene())
    with torch.no_grad():
        out = predictor.rollout(context, HORIZON, torch.Generator())
    last = vaes["frame"](context.frames[:, -1]).sample.clamp(0, 1)
    for k in range(HORIZON):
        torch.testing.assert_close(out.frames[:, k], last, atol=0.005 * (k + 1), rtol=0)
    assert out.flow_bwd is not None
    assert torch.equal(out.flow_bwd, torch.zeros_like(out.flow_bwd))
    assert out.visible is not None
    assert out.visible.min() > 0.99


def test_latent_warp_with_prior_starts_as_advection_of_latents(vaes: Vaes) -> None:
    predictor, context = made("latent_warp", vaes, motion_prior="teacher"), observed(scene())
    with torch.no_grad():
        out = predictor.rollout(context, HORIZON, torch.Generator())
    latent = vaes["frame"].to_latents(context.frames[:, -1])
    flow_bwd = resize_flow(context.flow_bwd[:, -1], HEIGHT // 2, WIDTH // 2)
    for k in range(HORIZON):
        flow_bwd = advect_flow(flow_bwd)
        latent = backward_warp(latent, resize_flow(flow_bwd, HEIGHT // 4, WIDTH // 4))
        torch.testing.assert_close(out.frames[:, k], vaes["frame"].to_frames(latent), atol=0.005 * (k + 1), rtol=0)


def test_the_prior_follows_a_square_that_moves_on(vaes: Vaes) -> None:
    clip = with_latents(scene(), vaes)
    truth = clip.require("latents")

    def error(prior: str) -> float:
        with torch.no_grad():
            predictor: Any = made("latent_warp", vaes, motion_prior=prior)
            steps = predictor.unroll([truth[:, k] for k in range(CONTEXT)], clip.require("flow_bwd")[:, 2], HORIZON)
        errors = [
            latent_error(s.latent, truth[:, CONTEXT + k], vaes["frame"].latent_gain).mean() for k, s in enumerate(steps)
        ]
        return float(torch.stack(errors).mean())

    assert error("teacher") < 0.6 * error("none")
    assert error("matching") < error("none")  # little: a step of two pixels is a quarter of a cell of the matches


def test_latent_warp_never_trains_or_saves_the_vae(vaes: Vaes) -> None:
    predictor = made("latent_warp", vaes).train()
    assert not any(name.startswith("vae") for name in {**predictor.own_parameters(), **predictor.own_state()})
    assert not predictor.get_submodule("vae").training


@pytest.mark.parametrize(("masked", "mended"), [(False, True), (True, False), (False, False)])
def test_latent_warp_without_its_heads_has_none_of_their_terms(masked: bool, mended: bool, vaes: Vaes) -> None:
    predictor: Any = shaken(made("latent_warp", vaes, masked=masked, mended=mended)).train()
    loss, logs = predictor(with_latents(scene(), vaes))
    loss.backward()
    assert ("mask" in logs, "residual" in logs) == (masked, mended)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictor.own_parameters().values())
    clip = scene()
    out = predictor.eval().rollout(observed(clip), HORIZON, torch.Generator())
    assert (out.visible is not None) is masked
    steps = predictor.unroll(
        list(with_latents(clip, vaes).require("latents")[:, :CONTEXT].unbind(1)),
        clip.require("flow_bwd")[:, CONTEXT - 2],
        1,
    )
    if not masked and not mended:
        assert torch.equal(steps[0].latent, steps[0].warped)


def test_latent_warp_names_the_sides_that_do_not_fit(vaes: Vaes) -> None:
    with pytest.raises(ValueError, match="width 40 must be divisible by the VAE's stride 4 times coarsen=4"):
        build("latent_warp", {}, vaes=vaes, height=32, width=40, context=CONTEXT)


def test_recoloured_windows_keep_their_motion_and_their_grey() -> None:
    grey = torch.rand(6, 3, 1, 8, 8).expand(-1, -1, 3, -1, -1)
    assert torch.equal(roll_colours(grey), grey)
    colour = torch.rand(6, 3, 3, 8, 8)
    rolled = roll_colours(colour)
    assert torch.equal(rolled[[0, 1, 4, 5]], colour[[0, 1, 4, 5]])
    assert torch.equal(rolled[2:4], colour[2:4].roll(1, dims=2))


def test_targets_are_the_stores_latents_or_those_of_mirrored_frames(vaes: Vaes) -> None:
    clip = with_latents(scene(), vaes)
    stored = latent_targets(
        vaes["frame"], replace(clip, latents=clip.require("latents").half()), GuiseOptions(flip=False)
    )
    assert torch.equal(stored.require("latents"), clip.require("latents").half().float())
    made_anew = latent_targets(vaes["frame"], clip, GuiseOptions())
    mirrored = encode_windows(vaes["frame"], clip.require("frames")[1:].flip(-1))
    torch.testing.assert_close(made_anew.require("latents")[0], clip.require("latents")[0])
    torch.testing.assert_close(made_anew.require("latents")[1:], mirrored)
    assert torch.equal(made_anew.require("flow_bwd")[1, :, 0], -clip.require("flow_bwd")[1, :, 0].flip(-1))
