"""What `latent_flow_aux` promises on its own: the flow head shapes training and has no part in a rollout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.resize import resize_flow
from models.autoencoder import Vaes
from models.losses import flow_error
from models.predictors.latent_flow_aux import LatentFlowAux, Options
from tests import test_predictors as contract
from tests.test_predictors import CONTEXT, HEIGHT, HORIZON, WIDTH, observed, scene, shaken, with_latents

vaes = contract.vaes


class Forbidden(nn.Module):
    def forward(self, *_: Tensor) -> Tensor:
        raise AssertionError("the flow head was called")


def predictor_with(vaes: Vaes, **options: Any) -> LatentFlowAux:
    torch.manual_seed(0)
    small = {"width": 16, "features": 8, "blocks": 2, "kernel": 3, "flip": False}
    return LatentFlowAux(Options(**{**small, **options}), vaes=vaes, height=HEIGHT, width=WIDTH, context=CONTEXT)


def frames(predictor: LatentFlowAux) -> Tensor:
    with torch.no_grad():
        return predictor.rollout(observed(scene()), HORIZON, torch.Generator().manual_seed(0)).frames


def test_it_starts_as_copy_last(vaes: Vaes) -> None:
    with torch.no_grad():
        last = vaes["frame"].to_frames(vaes["frame"].to_latents(scene().require("frames")[:, CONTEXT - 1]))
    for predicted in frames(predictor_with(vaes)).unbind(1):
        torch.testing.assert_close(predicted, last)


def test_a_rollout_never_calls_the_flow_head(vaes: Vaes) -> None:
    predictor = predictor_with(vaes)
    shaken(predictor)
    before = frames(predictor)
    predictor.flow_head = Forbidden()  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(frames(predictor), before)
    with pytest.raises(AssertionError, match="the flow head was called"):
        predictor(with_latents(scene(), vaes))
    del predictor.flow_head
    assert torch.equal(frames(predictor), before)


def test_the_flow_loss_teaches_the_prediction(vaes: Vaes) -> None:
    """Its gradient alone reaches the next-latent head, through the predicted latents."""
    predictor, clip = predictor_with(vaes, flow=1.0), with_latents(scene(), vaes)
    shaken(predictor)

    def gradients(teacher: Tensor) -> dict[str, Tensor]:
        predictor.zero_grad()
        predictor(replace(clip, flow_bwd=teacher))[0].backward()
        return {name: p.grad.clone() for name, p in predictor.own_parameters().items() if p.grad is not None}

    teacher = clip.require("flow_bwd")
    one, other = gradients(teacher), gradients(-teacher)
    assert any(name.startswith("head.") for name in one)
    assert all((one[name] - other[name]).abs().max() > 0 for name in one if name.startswith(("head.", "trunk.")))


def test_the_teachers_flow_of_the_predicted_pairs_counts_and_no_other(vaes: Vaes) -> None:
    predictor, clip = predictor_with(vaes), with_latents(scene(), vaes)
    flow_bwd = clip.require("flow_bwd")
    early, late = flow_bwd.clone(), flow_bwd.clone()
    early[:, : CONTEXT - 1] += 5
    late[:, CONTEXT - 1] += 5
    plain, early, late = (predictor(replace(clip, flow_bwd=flow))[1]["flow"] for flow in (flow_bwd, early, late))
    assert early == plain
    assert late > plain
    # Before training the flow head says 0.
    on_grid = resize_flow(flow_bwd[:, CONTEXT - 1 :].flatten(0, 1), HEIGHT // 4, WIDTH // 4)
    torch.testing.assert_close(plain, flow_error(torch.zeros_like(on_grid), on_grid))


def test_without_flow_there_is_no_flow_head(vaes: Vaes) -> None:
    predictor = predictor_with(vaes, flow=0.0)
    assert predictor.needs == {"latents"}
    assert not any("flow" in name for name in predictor.own_state())
    loss, logs = predictor(replace(with_latents(scene(), vaes), flow_bwd=None))
    assert set(logs) == {"latent"}
    torch.testing.assert_close(loss.detach(), logs["latent"])
    with_flow = predictor_with(vaes)
    shared = {name: value for name, value in with_flow.own_state().items() if not name.startswith("flow_head")}
    assert all(torch.equal(value, predictor.own_state()[name]) for name, value in shared.items())


def test_it_names_the_sides_that_do_not_fit(vaes: Vaes) -> None:
    with pytest.raises(ValueError, match="width 40 must be divisible by the VAE's stride 4 times coarsen=4"):
        LatentFlowAux(Options(), vaes=vaes, height=32, width=40, context=CONTEXT)
