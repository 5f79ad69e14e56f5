"""Test-time training: it helps where the observed frames show what is wrong, and leaves no trace."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from data.clips import Context
from data.errors import NonFiniteError
from models.adaptation import Adaptable, AdaptationOptions, Adapted, adapted, adapted_rollout
from models.autoencoder import Vaes
from models.evaluation import Window, evaluate
from models.predictor import Predictor, Rollout
from tests.test_predictors import CONTEXT, HORIZON, made, observed, scene, shaken, vaes

__all__ = ["vaes"]  # a fixture of the contract's tests

OPTIONS = AdaptationOptions(steps=3, learning_rate=1e-2)
every_prior = pytest.mark.parametrize("prior", ["none", "matching", "teacher"])


def everything(predictor: Predictor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in predictor.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Rollout)]
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def window() -> Window:
    clip = scene()
    return Window(clip.video, clip.start, observed(clip), clip.require("frames")[:, CONTEXT:])


@every_prior
def test_only_the_flow_head_moves_and_only_inside(prior: str, vaes: Vaes) -> None:
    predictor, context = shaken(made("latent_warp", vaes, motion_prior=prior)), observed(scene())
    assert isinstance(predictor, Adaptable)
    before, allowed = everything(predictor), set(predictor.flow_parameters())
    assert allowed
    with adapted(predictor, context, OPTIONS):
        moved = {name for name, value in predictor.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == allowed
    assert all(torch.equal(value, before[name]) for name, value in predictor.state_dict().items())
    assert all(parameter.grad is None for parameter in predictor.parameters())


def test_weights_come_back_after_an_error_too(vaes: Vaes, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, context = shaken(made("latent_warp", vaes)), observed(scene())
    before = everything(predictor)

    def fail(*_: object) -> Rollout:
        raise RuntimeError("no memory")

    monkeypatch.setattr(predictor, "rollout", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        adapted_rollout(predictor, context, HORIZON, torch.Generator(), OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in predictor.state_dict().items())
    broken = replace(context, frames=context.frames * float("nan"))
    with pytest.raises(NonFiniteError, match="step 1: the observed loss is nan"):
        adapted_rollout(predictor, broken, HORIZON, torch.Generator(), OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in predictor.state_dict().items())


def test_no_steps_are_no_adaptation(vaes: Vaes) -> None:
    predictor, context = shaken(made("latent_warp", vaes)), observed(scene())
    with torch.no_grad():
        plain = predictor.rollout(context, HORIZON, torch.Generator())
        none = adapted_rollout(predictor, context, HORIZON, torch.Generator(), AdaptationOptions(steps=0))
        some = adapted_rollout(predictor, context, HORIZON, torch.Generator(), OPTIONS)
    assert same(plain, none)
    assert not same(plain, some)
    assert plain.frames.shape == some.frames.shape


def test_windows_of_a_batch_do_not_see_each_other(vaes: Vaes) -> None:
    predictor, context = shaken(made("latent_warp", vaes)), observed(scene())
    other = Context(**{f.name: getattr(context, f.name).clone() for f in fields(Context)})
    other.frames[1] = other.frames[1].flip(-1)
    with torch.no_grad():
        a, b = (adapted_rollout(predictor, c, HORIZON, torch.Generator(), OPTIONS) for c in (context, other))
    assert torch.equal(a.frames[0], b.frames[0])
    assert not torch.equal(a.frames[1], b.frames[1])


@every_prior
def test_it_mends_a_flow_that_the_observed_frames_contradict(prior: str, vaes: Vaes) -> None:
    """A flow head that shifts everything by a third of a cell: the observed pair shows it, the future profits."""
    predictor, clip = made("latent_warp", vaes, motion_prior=prior).eval(), scene()
    bias: Any = predictor.get_submodule("flow_head").get_parameter("out.bias")
    with torch.no_grad():
        bias[1:] += 0.3
    future, context = clip.require("frames")[:, CONTEXT:], observed(clip)
    options = AdaptationOptions(steps=10, learning_rate=0.03)
    with torch.no_grad():
        before = predictor.rollout(context, HORIZON, torch.Generator()).frames
        after = adapted_rollout(predictor, context, HORIZON, torch.Generator(), options).frames
    assert (after - future).square().mean() < 0.7 * (before - future).square().mean()


def test_it_works_under_evaluation_and_never_sees_the_future(vaes: Vaes) -> None:
    predictor = shaken(made("latent_warp", vaes))
    before = everything(predictor)
    wrapped, seen = Adapted(predictor, OPTIONS), list[Rollout]()
    rollout = wrapped.rollout

    def remember(*arguments: Any) -> Rollout:
        seen.append(rollout(*arguments))
        return seen[-1]

    wrapped.rollout = remember  # pyright: ignore[reportAttributeAccessIssue]
    first = window()
    second = replace(first, frames=torch.rand(first.frames.shape, generator=torch.Generator().manual_seed(5)))
    scores = [evaluate(wrapped, [w], name="adapted", seed=0) for w in (first, second)]
    assert same(*seen)
    assert all(score.windows == 2 for score in scores)
    assert all(torch.equal(value, before[name]) for name, value in predictor.state_dict().items())


def test_a_context_without_a_spare_frame_is_an_error(vaes: Vaes) -> None:
    predictor: Any = made("latent_warp", vaes, past=CONTEXT)
    with pytest.raises(ValueError, match="past=4"):
        predictor.observed_loss(observed(scene()))


def test_without_a_flow_head_there_is_nothing_to_adapt(vaes: Vaes) -> None:
    with pytest.raises(TypeError, match="CopyLast has no flow head"):
        Adapted(made("copy_last", vaes), OPTIONS)
