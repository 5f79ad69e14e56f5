"""What approach 5 promises: where it starts, what its streams see, and that appearance follows any motion given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.clips import Context
from models.applications import drag_ground, measure, move_region
from models.autoencoder import Vaes, encode_windows
from models.predictor import Rollout, build
from models.predictors.two_stream import TwoStream
from models.warp import advect_flow, backward_warp, resize_flow
from tests.test_predictors import HEIGHT, HORIZON, WIDTH, made, observed, scene, shaken, vaes, with_latents

__all__ = ["vaes"]  # a fixture of the contract's tests


def two_stream(vaes: Vaes, **options: Any) -> TwoStream:
    predictor = made("two_stream", vaes, **options)
    assert isinstance(predictor, TwoStream)
    return predictor


@torch.no_grad()
def rolled(predictor: TwoStream, context: Context) -> Rollout:
    return predictor.rollout(context, HORIZON, torch.Generator())


def flow_of(out: Rollout) -> Tensor:
    assert out.flow_bwd is not None
    return out.flow_bwd


def recoloured(context: Context) -> Context:
    return replace(context, frames=context.frames.flip(2))


@pytest.mark.parametrize("disentangle", [True, False])
def test_it_starts_as_the_advection_of_latents_by_latents(disentangle: bool, vaes: Vaes) -> None:
    frame, flow = vaes["frame"], vaes["flow"]
    context = observed(scene())
    out = rolled(two_stream(vaes, disentangle=disentangle), context)
    appearance, motion = frame.to_latents(context.frames[:, -1]), flow.to_latents(context.flow_bwd[:, -1])
    for k in range(HORIZON):
        half = resize_flow(flow.from_latents(motion), HEIGHT // 2, WIDTH // 2)
        motion = flow.to_latents(resize_flow(advect_flow(half), HEIGHT, WIDTH))
        flow_bwd = flow.from_latents(motion)
        appearance = backward_warp(appearance, resize_flow(flow_bwd, HEIGHT // 4, WIDTH // 4))
        torch.testing.assert_close(out.frames[:, k], frame.to_frames(appearance), atol=1e-4, rtol=0)
        torch.testing.assert_close(flow_of(out)[:, k], flow_bwd, atol=1e-3, rtol=0)


def test_disentangled_motion_does_not_depend_on_colours(vaes: Vaes) -> None:
    predictor, context = shaken(two_stream(vaes)), observed(scene())
    assert isinstance(predictor, TwoStream)
    out, other = rolled(predictor, context), rolled(predictor, recoloured(context))
    assert torch.equal(flow_of(out), flow_of(other))
    assert not torch.allclose(out.frames, other.frames)


def test_joint_motion_does(vaes: Vaes) -> None:
    predictor, context = shaken(two_stream(vaes, disentangle=False)), observed(scene())
    assert isinstance(predictor, TwoStream)
    assert not torch.equal(flow_of(rolled(predictor, context)), flow_of(rolled(predictor, recoloured(context))))


def test_disentangled_appearance_sees_no_frame_before_the_present_one(vaes: Vaes) -> None:
    predictor, context = shaken(two_stream(vaes)), observed(scene())
    assert isinstance(predictor, TwoStream)
    frames = context.frames.clone()
    frames[:, :-1] = 0.5
    assert torch.equal(rolled(predictor, context).frames, rolled(predictor, replace(context, frames=frames)).frames)


def test_driven_by_its_own_motion_it_begins_as_its_own_rollout(vaes: Vaes) -> None:
    predictor, context = shaken(two_stream(vaes)), observed(scene())
    assert isinstance(predictor, TwoStream)
    with torch.no_grad():
        steps = predictor.unroll(*predictor.observe(context), HORIZON)
        driven = predictor.drive(context.frames[:, -1], torch.stack([s.motion for s in steps], 1))
    assert torch.equal(driven[:, 0], rolled(predictor, context).frames[:, 0])
    assert not torch.equal(driven[:, 1], rolled(predictor, context).frames[:, 1])


def test_a_driven_picture_is_interpolated_once(vaes: Vaes) -> None:
    """By less than a cell a step: whatever is sampled anew in every step is blurred by the end."""
    predictor = two_stream(vaes)
    first = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    asked = torch.zeros(1, 4, 2, HEIGHT, WIDTH)
    asked[:, :, 0] = -1.5
    with torch.no_grad():
        motions = encode_windows(vaes["flow"], asked)
        driven, latent = predictor.drive(first, motions), vaes["frame"].to_latents(first)
        chained = torch.zeros(1, 2, *latent.shape[-2:])
        for k in range(4):
            flow_bwd = resize_flow(vaes["flow"].from_latents(motions[:, k]), *latent.shape[-2:])
            chained = flow_bwd + backward_warp(chained, flow_bwd)
            torch.testing.assert_close(driven[:, k], vaes["frame"].to_frames(backward_warp(latent, chained)))


@pytest.mark.parametrize("disentangle", [True, False])
def test_a_picture_follows_a_uniform_motion_before_any_training(disentangle: bool, vaes: Vaes) -> None:
    """One cell of the latents a step, so that nothing is lost but by the autoencoders."""
    predictor = two_stream(vaes, disentangle=disentangle)
    coarse = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    first = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
    asked = torch.zeros(1, 4, 2, HEIGHT, WIDTH)
    asked[:, :, 0] = -4
    with torch.no_grad():
        driven = predictor.drive(first, encode_windows(vaes["flow"], asked))
        plain = vaes["frame"].to_frames(vaes["frame"].to_latents(first))
    for k in range(4):
        shifted = plain.roll(4 * (k + 1), dims=-1)
        torch.testing.assert_close(driven[:, k, ..., 24:], shifted[..., 24:], atol=0.03, rtol=0)
    figures = measure(driven[0], first[0], asked[0])
    assert figures["epe_still"] == 4
    assert figures["epe"] < 1.5  # a fifth of the width has left the picture by the end
    assert figures["psnr"] > figures["psnr_still"] + 5


def test_the_flow_term_belongs_to_disentangling(vaes: Vaes) -> None:
    clip = scene()
    assert set(two_stream(vaes)(clip)[1]) == {"latent", "motion", "flow", "residual"}
    assert set(two_stream(vaes, disentangle=False)(clip)[1]) == {"latent", "motion", "residual"}


@pytest.mark.parametrize("disentangle", [True, False])
def test_both_ways_reach_every_parameter_from_stored_latents(disentangle: bool, vaes: Vaes) -> None:
    predictor = shaken(two_stream(vaes, disentangle=disentangle, flip=False)).train()
    assert predictor.needs == {"latents", "flow_latents", "flow_bwd"}
    predictor(with_latents(scene(), vaes))[0].backward()
    silent = [n for n, p in predictor.own_parameters().items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_the_true_future_has_no_motion_error(vaes: Vaes) -> None:
    predictor, clip = two_stream(vaes), scene()
    teacher = clip.require("flow_bwd")
    target = encode_windows(vaes["flow"], teacher)
    weight = predictor._moving(teacher)
    assert float(predictor._motion_error(target[:, 0], target[:, 0], weight[:, 0])) == pytest.approx(0, abs=1e-6)
    fast = teacher.norm(dim=2) > 0.5
    cells = fast.unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2).any(-1)
    assert torch.equal(weight[:, :, 0] == 1, cells)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"past": 4}, (32, 48), "context is 4; past=4"),
        ({"flip": False, "recolour": True}, (32, 48), "recolour is on and flip is off"),
        ({"cell": 6}, (32, 48), "that must divide cell=6"),
        ({}, (32, 44), "width 44 must be divisible by cell=8"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], size: tuple[int, int], message: str, vaes: Vaes) -> None:
    with pytest.raises(ValueError, match=message):
        build("two_stream", options, vaes=vaes, height=size[0], width=size[1], context=4)


def test_the_ground_behind_a_moving_region_is_dragged_along() -> None:
    region = torch.zeros(20, 30, dtype=torch.bool)
    region[6:12, 4:10] = True
    flow_bwd = move_region(region, 3.0, 1.0, 3)
    picture = torch.where(region, 1.0, 0.2).expand(1, 3, 20, 30)
    plain = dragged = picture
    for asked, full in zip(flow_bwd[:, None], drag_ground(flow_bwd)[:, None], strict=True):
        plain, dragged = backward_warp(plain, asked), backward_warp(dragged, full)
    there = torch.zeros(20, 30, dtype=torch.bool)
    there[9:15, 13:19] = True
    expected = torch.where(there, 1.0, 0.2).expand(1, 3, 20, 30)
    torch.testing.assert_close(dragged, expected)
    assert (plain - expected).abs().max() > 0.5, "without it a copy stays behind"
    assert torch.equal(flow_bwd[2, 0] != 0, there)
