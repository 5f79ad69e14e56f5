"""The loop: budgets, schedule, determinism, resuming, and stopping before an update that is not finite."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.clips import Clip, Context
from data.errors import CompilerError, EmptyError, NonFiniteError, WeightsError
from models.predictor import Predictor, Rollout
from models.training import TrainingOptions, crop, horizon_at, learning_rate_at, train
from models.training_state import Keeping, TrainingState, load_state, save_state


class Line(Predictor):
    """Predicts the next frame as a multiple of the last: one weight, whose best value is known."""

    needs = frozenset({"frames"})

    def __init__(self) -> None:
        super().__init__(height=4, width=4, context=2)
        self.factor = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.factor.weight)
        self.poison_at: int | None = None
        self.calls: list[int] = []

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        frames = batch.require("frames")
        self.calls.append(frames.shape[1] - self.context)
        error = (self.factor(frames[:, 1, ..., None])[..., 0] - frames[:, 2]).square().mean()
        if self.poison_at == len(self.calls):
            error = error * float("nan")
        return error, {"error": error.detach()}

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        raise NotImplementedError


def clip(length: int = 6) -> Clip:
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(3, length, 3, 4, 4, generator=generator)
    frames[:, 2] = 0.5 * frames[:, 1]
    return Clip(video=torch.zeros(3, dtype=torch.int64), start=torch.zeros(3, dtype=torch.int64), frames=frames)


def options(**changes: Any) -> TrainingOptions:
    plain = {"steps": 60, "learning_rate": 0.05, "warmup": 5, "weight_decay": 0.0, "ema": 0.5, "precision": "float32"}
    return TrainingOptions.model_validate({**plain, **changes})


def test_it_finds_the_known_answer() -> None:
    model = Line()
    seen: list[int] = []
    result = train(model, repeat(clip()), options(), progress=lambda step, terms: seen.append(step))
    torch.testing.assert_close(model.factor.weight.detach().squeeze(), torch.tensor(0.5), atol=0.02, rtol=0)
    assert seen == list(range(1, 61))
    assert result.steps == 60
    assert {len(curve) for curve in result.curves.values()} == {60}
    assert set(result.curves) == {"loss", "error", "grad_norm", "learning_rate", "horizon"}
    assert not model.training


def test_the_model_is_called_not_its_forward() -> None:
    model, hooked = Line(), []
    model.register_forward_hook(lambda *_: hooked.append(1))
    train(model, repeat(clip()), options(steps=3))
    assert len(hooked) == 3


def test_it_stops_before_an_update_that_is_not_finite() -> None:
    model = Line()
    model.poison_at = 4
    kept: dict[int, Tensor] = {}

    def remember(step: int, terms: dict[str, float]) -> None:
        kept[step] = model.factor.weight.detach().clone()

    with pytest.raises(NonFiniteError, match="before the update of step 4: loss is nan, error is nan"):
        train(model, repeat(clip()), options(), progress=remember)
    assert torch.equal(model.factor.weight, kept[3])


def test_a_gradient_that_is_not_finite_stops_it_too() -> None:
    model = Line()
    model.factor.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = model.factor.weight.detach().clone()
    with pytest.raises(NonFiniteError, match="the gradient's norm"):
        train(model, repeat(clip()), options())
    assert torch.equal(model.factor.weight, before)


def test_same_seed_same_weights_and_resuming_changes_nothing() -> None:
    states: list[TrainingState] = []
    whole, again, resumed = Line(), Line(), Line()
    train(whole, repeat(clip()), options(), keeping=Keeping(save=states.append, every_steps=25))
    train(again, repeat(clip()), options())
    assert torch.equal(whole.factor.weight, again.factor.weight)
    result = train(resumed, repeat(clip()), options(), keeping=Keeping(state=states[0]))
    assert len(resumed.calls) == 35
    assert torch.equal(whole.factor.weight, resumed.factor.weight)
    assert len(result.curves["loss"]) == 60


class Noisy(Line):
    """A `Line` with all that a run changes besides its weights: a buffer, and draws from PyTorch's own generator and
    one of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        loss, logs = super().forward(batch)
        noise = torch.stack([torch.randn(()), torch.randn((), generator=self.generator)])
        self.seen += noise
        return loss + (self.factor.weight * noise).sum() + 0.01 * self.seen.sum() * self.factor.weight.sum(), logs


@pytest.mark.parametrize("at", [1, 7, 19])
def test_a_state_from_a_file_ends_in_the_same_bits(at: int, tmp_path: Path) -> None:
    def start() -> tuple[Noisy, torch.Generator]:
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(4)
        return Noisy(generator), generator

    def keep(state: TrainingState) -> None:
        if state.step == at:
            save_state(tmp_path / "state.safetensors", state)

    whole, generator = start()
    keeping = Keeping(save=keep, every_steps=1, generators={"noise": generator})
    expected = train(whole, repeat(clip()), options(steps=20), keeping=keeping)
    resumed, generator = start()
    torch.manual_seed(99)
    state = load_state(tmp_path / "state.safetensors")
    assert state is not None
    assert state.step == at
    result = train(resumed, repeat(clip()), options(steps=20), keeping=Keeping(state, generators={"noise": generator}))
    assert len(resumed.calls) == 20 - at
    assert all(torch.equal(a, b) for a, b in zip(whole.own_state().values(), resumed.own_state().values(), strict=True))
    assert json.dumps(result.curves) == json.dumps(expected.curves)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert load_state(path) is None
    train(Line(), repeat(clip()), options(steps=1), keeping=Keeping(save=partial(save_state, path), every_seconds=0.0))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="has the digest"):
        load_state(path)
    path.write_bytes(content[:50])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_state(path)


def test_no_steps_draw_no_batch_and_change_nothing() -> None:
    model = Line()
    before = model.factor.weight.detach().clone()
    result = train(model, iter([]), options(steps=0))
    assert (result.steps, result.curves) == (0, {})
    assert torch.equal(model.factor.weight, before)


def test_a_budget_of_seconds_ends_the_run_and_carries_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(float(k) for k in range(10_000))
    monkeypatch.setattr("models.training.time.perf_counter", lambda: next(ticks))
    plan = options(steps=1000, warmup=2, seconds=20.0, horizon_start=1, horizon_ramp=0.5)
    model, states = Line(), list[TrainingState]()
    result = train(model, repeat(clip(8)), plan, keeping=Keeping(save=states.append, every_steps=5))
    assert 5 < result.steps < 20  # several looks at the clock a step
    assert model.calls[0] == 1
    assert model.calls[-1] == 6
    assert model.calls == sorted(model.calls)
    rates = result.curves["learning_rate"]
    assert rates[:2] == pytest.approx([0.025, 0.05], rel=0.1)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.005
    # A resumed run has what is left, not the whole budget again.
    resumed = train(Line(), repeat(clip(8)), plan, keeping=Keeping(state=states[0]))
    assert states[0].seconds > 5
    assert resumed.seconds <= 24


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.slow
def test_compiled_training_learns_the_same() -> None:
    plain, compiled = Line(), Line()
    train(plain, repeat(clip()), options(steps=4))
    train(compiled, repeat(clip()), options(steps=4, compile=True))
    torch.testing.assert_close(plain.factor.weight, compiled.factor.weight)


def test_compiling_without_a_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerError, match="no-such-compiler is not there") as caught:
        train(Line(), repeat(clip()), options(compile=True))
    assert "compile: false" in caught.value.remedy


def test_the_horizon_grows_to_what_the_clip_holds() -> None:
    model = Line()
    train(model, repeat(clip(8)), options(steps=10, horizon_start=2, horizon_ramp=0.5))
    assert model.calls == [2, 2, 3, 4, 5, 6, 6, 6, 6, 6]
    assert horizon_at(0, 1, options()) == 1
    with pytest.raises(EmptyError, match="no frame after the context"):
        horizon_at(0, 0, options())


def test_schedule() -> None:
    plan = options(steps=100, warmup=10)
    rates = [learning_rate_at(step, plan) for step in range(100)]
    assert rates[0] == pytest.approx(0.005)
    assert rates[9] == rates[10] == pytest.approx(0.05)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_running_out_of_clips_is_an_error() -> None:
    with pytest.raises(EmptyError, match="ended at step 2 of 60"):
        train(Line(), iter([clip(), clip()]), options())


def test_cropping_keeps_flow_between_the_frames() -> None:
    full = Clip(
        video=torch.zeros(1, dtype=torch.int64),
        start=torch.zeros(1, dtype=torch.int64),
        frames=torch.zeros(1, 6, 3, 4, 4),
        flow_bwd=torch.zeros(1, 5, 2, 4, 4),
    )
    short = crop(full, 4)
    assert short.require("frames").shape[1] == 4
    assert short.require("flow_bwd").shape[1] == 3
    assert short.latents is None
