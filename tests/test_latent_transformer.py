"""What `latent_transformer` promises on its own: memory changes nothing, the future reaches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.autoencoder import Vaes
from models.predictors.latent_transformer import LatentTransformer, Options
from tests import test_predictors as contract
from tests.test_predictors import CONTEXT, HEIGHT, HORIZON, WIDTH, observed, scene, shaken, with_latents

SMALL: dict[str, Any] = {"patch": 4, "width": 16, "heads": 2, "blocks": 2, "features": 8, "kernel": 3}


vaes = contract.vaes


def transformer(vaes: Vaes, **options: Any) -> LatentTransformer:
    torch.manual_seed(0)
    return LatentTransformer(Options(**{**SMALL, **options}), vaes=vaes, height=HEIGHT, width=WIDTH, context=CONTEXT)


def test_it_starts_as_copy_last(vaes: Vaes) -> None:
    context = observed(scene())
    with torch.no_grad():
        out = transformer(vaes).rollout(context, HORIZON, torch.Generator())
        last = vaes["frame"].to_frames(vaes["frame"].to_latents(context.frames[:, -1]))
    for k in range(HORIZON):
        torch.testing.assert_close(out.frames[:, k], last)


@pytest.mark.parametrize("window", [2, 8])
def test_a_rollout_with_memory_is_one_computed_anew(vaes: Vaes, window: int) -> None:
    predictor = transformer(vaes, window=window)
    shaken(predictor)
    known = list(with_latents(scene(), vaes).require("latents")[:, :CONTEXT].unbind(1))
    horizon = 6
    with torch.no_grad():
        remembered = predictor.unroll(known, horizon)
        for k in range(horizon):
            anew = predictor.one_step(torch.stack(known, 1))[:, -1]
            torch.testing.assert_close(remembered[k], anew, atol=1e-5, rtol=1e-5)
            known.append(anew)
    assert (remembered[0] - remembered[1]).abs().max() > 1e-3


def test_a_later_frame_changes_no_earlier_prediction(vaes: Vaes) -> None:
    predictor = transformer(vaes)
    shaken(predictor)
    latents = with_latents(scene(), vaes).require("latents")
    other = latents.clone()
    other[:, 4] += 1
    with torch.no_grad():
        a, b = predictor.one_step(latents), predictor.one_step(other)
    assert torch.equal(a[:, :4], b[:, :4])
    assert all((a[:, k] != b[:, k]).any() for k in range(4, latents.shape[1]))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_every_frame_can_be_predicted_from_the_truth_too(vaes: Vaes, norm: str) -> None:
    predictor = transformer(vaes, norm=norm, teacher_forced=0.5)
    shaken(predictor)
    loss, logs = predictor(with_latents(scene(), vaes))
    loss.backward()
    torch.testing.assert_close(loss.detach(), logs["latent"] + 0.5 * logs["teacher_forced"])
    silent = [n for n, p in predictor.own_parameters().items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_it_names_the_sides_that_do_not_fit(vaes: Vaes) -> None:
    with pytest.raises(ValueError, match="width 40 must be divisible by the VAE's stride 4 times patch=4"):
        LatentTransformer(Options(**SMALL), vaes=vaes, height=32, width=40, context=CONTEXT)
