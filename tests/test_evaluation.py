"""Evaluation: what is measured, what is kept, what is refused, and that written bytes repeat."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from data.clips import Clip, Context
from data.errors import EmptyError, NonFiniteError, StoreError
from models.definitions import CONSISTENCIES
from models.evaluation import Evaluation, Networks, Window, evaluate, evaluate_reconstruction
from models.examples import Examples
from models.metrics import METRICS, paired_difference, score
from models.predictor import Predictor, Rollout
from models.results import read_results, write_results
from models.statistics import merge

X, Y, H, W = 2, 4, 16, 24


def window_batch(video: int, b: int = 2, *, truth: bool = True) -> Window:
    """A bright square that moves right by 2 px a frame over a dark texture; its speed tells videos apart."""
    speed = 1 + video % 3
    texture = 0.2 * torch.rand(3, H, W, generator=torch.Generator().manual_seed(video))
    frames = texture.repeat(b, X + Y, 1, 1, 1)
    foreground = torch.zeros(b, X + Y, H, W)
    for row in range(b):
        for k in range(X + Y):
            left = min(speed * k + row, W - 6)
            frames[row, k, :, 5:11, left : left + 6] = 0.9
            foreground[row, k, 5:11, left : left + 6] = 1
    flow = torch.zeros(b, X + Y - 1, 2, H, W)
    flow[:, :, 0] = -speed * foreground[:, 1:]
    visible = torch.ones(b, X + Y - 1, 1, H, W)
    visible[:, :, :, 5:11, :2] = 0
    boxes = torch.zeros(b, Y, 2, 4)  # the second slot holds no object
    for row in range(b):
        for k in range(Y):
            left = min(speed * (X + k) + row, W - 6)
            boxes[row, k, 0] = torch.tensor([left, 5, left + 6, 11])
    collision = torch.zeros(b, Y)
    collision[:, video % Y] = 1
    return Window(
        video=torch.full((b,), video),
        start=torch.arange(b) * 8,
        context=Context(frames[:, :X], flow[:, : X - 1], visible[:, : X - 1]),
        frames=frames[:, X:],
        foreground=foreground[:, X:] if truth else None,
        true_flow_bwd=flow[:, X - 1 :] if truth else None,
        true_visible=visible[:, X - 1 :] if truth else None,
        true_boxes=boxes if truth else None,
        true_presence=boxes.any(dim=-1).float() if truth else None,
        true_collision=collision if truth else None,
    )


def absolute(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean(dim=(1, 2, 3))


class Colours:
    """Stands in for an image encoder and, called, for a network of films: mean colours."""

    def summary(self, frames: Tensor) -> Tensor:
        return frames.mean(dim=(2, 3)) + 0.1

    def __call__(self, films: Tensor) -> Tensor:
        return films.mean(dim=(3, 4)).flatten(1)


def everything() -> Networks:
    """A stand-in for each network of metrics."""
    encoders = {name: Colours() for name in CONSISTENCIES}
    return Networks(absolute, encoders, {"fvd": Colours(), "jedi": Colours()}, smoothness=True)


def windows(videos: int = 6, **kwargs: bool) -> Iterator[Window]:
    return (window_batch(v, **kwargs) for v in range(videos))


class Untrained(Predictor):
    def __init__(self) -> None:
        super().__init__(height=H, width=W, context=X)
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, batch: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("an evaluation trains nothing")


class Copy(Untrained):
    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        return Rollout(context.frames[:, -1:].repeat(1, horizon, 1, 1, 1))


class Noisy(Untrained):
    """Copies with noise that grows, and claims that nothing moves and everything is visible.

    Its one box stays where the square began, and it expects a collision at the second step.
    """

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        last = context.frames[:, -1:].repeat(1, horizon, 1, 1, 1)
        noise = torch.randn(last.shape, generator=generator) * torch.linspace(0.01, 0.05, horizon)[:, None, None, None]
        still = torch.zeros(last.shape[0], horizon, 2, H, W)
        boxes = torch.tensor([0.0, 5.0, 6.0, 11.0]).repeat(len(last), horizon, 1, 1)
        return Rollout(
            (last + noise).clamp(0, 1),
            flow_bwd=still,
            visible=torch.ones_like(still[:, :, :1]),
            boxes=boxes,
            presence=torch.ones_like(boxes[..., 0]),
            collision=torch.tensor([0.1, 0.8, 0.2, 0.3]).repeat(len(last), 1),
        )


class Broken(Noisy):
    """Says ``value`` at the third step of the second window of ``video``, somewhere in ``head``."""

    def __init__(self, video: int, value: float, head: str = "frames") -> None:
        super().__init__()
        self.left, self.value, self.head = 2 * video, value, head

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        out = super().rollout(context, horizon, generator)
        if self.left == 0:
            getattr(out, self.head)[1, 2].view(-1)[:1] = self.value
        self.left -= 2
        return out


class Short(Copy):
    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        return super().rollout(context, horizon - 1, generator)


def test_copy_last_scores_zero_skill_on_every_region() -> None:
    found = score(evaluate(Copy(), windows(), name="copy_last", seed=0).state, np.random.default_rng(0))
    for name in ("skill", "fg_skill"):
        assert [e.value for e in found[name].steps] == [0] * Y
        assert (found[name].overall.low, found[name].overall.high) == (0, 0)
    assert "epe" not in found, "copy_last has no flow head"


def test_heads_are_measured_where_there_is_truth() -> None:
    measured = evaluate(Noisy(), windows(), name="noisy", seed=0, frame_stride=2, networks=everything())
    found = score(measured.state, np.random.default_rng(0))
    assert set(found) == set(METRICS)
    speeds = np.mean([1, 2, 3])
    assert found["epe_moving"].overall.value == pytest.approx(speeds)
    assert found["epe_background"].overall.value == 0
    assert found["nonvisible_recall"].overall.value == 0
    lefts = [[min(s * (X + k) + r, W - 6) for s in (1, 2, 3) for r in range(2)] for k in range(Y)]
    overlaps = [np.mean([max(0, 6 - left) / (6 + min(left, 6)) for left in step]) for step in lefts]
    assert [e.value for e in found["box_iou"].steps] == pytest.approx(overlaps)
    assert found["collision_base_rate"].overall.value == pytest.approx(1 / 4)
    # Videos 0 to 5 collide at steps 1 2 3 4 1 2, and step 2 is said: ranked 2 4 3 1, found within one step but for 4.
    assert found["collision_ap"].overall.value == pytest.approx((2 * 2 / 6 + 3 / 12 + 4 / 18 + 2 * 6 / 24) / 6)
    assert found["collision_f1_2"].overall.value == pytest.approx(2 * 5 / (2 * 5 + 1 + 1))
    assert found["collision_f1_5"].overall.value == 1


KNOWN = {
    "mse": (1, 0.0830408),
    "psnr": (1, 11.0974),
    "psnr_frame": (1, 11.3781),
    "ssim": (1, 0.257954),
    "skill": (1, -0.00762922),
    "fg_mse": (1, 0.442891),
    "fg_psnr": (1, 3.80971),
    "fg_skill": (1, 0.00142962),
    "epe": (1, 0.1875),
    "epe_moving": (1, 2),
    "epe_background": (1, 0),
    "epe_visible": (1, 0.193548),
    "nonvisible_precision": (1, math.nan),
    "nonvisible_recall": (1, 0),
    "nonvisible_f1": (1, 0),
    "lpips": (1, 0.121233),
    "tlpips": (1, 0.0286261),
    "motion_smoothness": (1, 0.976972),
    "motion_smoothness_true": (1, 0.953774),
    "subject_consistency": (1, 0.999989),
    "subject_consistency_true": (1, 0.999996),
    "background_consistency": (1, 0.999989),
    "background_consistency_true": (1, 0.999996),
    "fvd": (1, 5.19914e-05),
    "jedi": (1, 1.17598e-05),
    "box_iou": (1, 0.0849747),
    "box_recall": (1, 0.0416667),
    "box_precision": (1, 0.0416667),
    "collision_ap": (1, 0.273148),
    "collision_base_rate": (1, 0.25),
    "collision_f1_2": (1, 0.833333),
    "collision_f1_5": (1, 1),
    "collision_f1_always": (1, 0.4),
}
"""Metric -> (version, value) of these films. Where a value changes, the version in `models.definitions` must too."""


def test_a_metric_does_not_change_without_its_version() -> None:
    measured = evaluate(Noisy(), windows(), name="noisy", seed=0, frame_stride=2, networks=everything())
    found = score(measured.state, np.random.default_rng(0))
    assert {name: METRICS[name].version for name in found} == {name: version for name, (version, _) in KNOWN.items()}
    for name, (_, value) in KNOWN.items():
        assert found[name].overall.value == pytest.approx(value, rel=1e-3, abs=1e-6, nan_ok=True), name


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    write_results(tmp_path, evaluate(Copy(), windows(2), name="copy", seed=0), seed=0, fps=12.0)
    headline = json.loads((tmp_path / "metrics.json").read_text())
    assert headline["versions"]["psnr"] == METRICS["psnr"].version
    headline["versions"]["psnr"] = 0
    (tmp_path / "metrics.json").write_text(json.dumps(headline))
    with pytest.raises(StoreError, match=r"(?s)have the versions \{'mse': 1, 'psnr': 0.*evaluate again"):
        read_results(tmp_path)
    headline["versions"]["psnr"] = METRICS["psnr"].version
    (tmp_path / "metrics.json").write_text(json.dumps(headline))
    states = json.loads((tmp_path / "states.json").read_text())
    (tmp_path / "states.json").write_text(json.dumps(states | {"version": 1}))
    with pytest.raises(StoreError, match="statistics of version 1, this code computes version 2"):
        read_results(tmp_path)


def test_without_labels_heads_are_absent_and_not_zero() -> None:
    without = evaluate(Noisy(), windows(truth=False), name="noisy", seed=0).state
    assert set(without.statistics) == {"squared_error", "squared_error_copy", "psnr_frame", "ssim"}
    assert without.histograms == {}
    some = [window_batch(0), window_batch(1, truth=False)]
    partly = evaluate(Noisy(), some, name="noisy", seed=0).state
    alone = evaluate(Noisy(), some[:1], name="noisy", seed=0).state
    for name in ("box_iou", "box_recall", "collision_ap", "collision_f1_2", "collision_base_rate", "fg_psnr"):
        values = [score(state, np.random.default_rng(0))[name].overall.value for state in (partly, alone)]
        assert values[0] == values[1], name
    no_heads = score(evaluate(Copy(), windows(), name="copy", seed=0).state, np.random.default_rng(0))
    assert not [name for name in no_heads if name.startswith(("box", "collision", "lpips"))]


def test_parts_and_order_do_not_change_the_result() -> None:
    whole = evaluate(Noisy(), windows(), name="noisy", seed=3).state
    batches = list(windows())
    parts = [
        evaluate(Noisy(), [batches[i] for i in part], name="noisy", seed=3).state for part in ((4, 1), (5, 0, 2, 3))
    ]
    assert merge(*parts).to_json() == whole.to_json()
    other = evaluate(Noisy(), windows(), name="noisy", seed=4).state
    assert other.to_json() != whole.to_json()


def test_many_batches_are_compacted_to_the_same_sums() -> None:
    repeated = evaluate(Copy(), (window_batch(v % 3) for v in range(70)), name="copy", seed=0)
    assert repeated.state.videos.tolist() == [0, 1, 2]
    assert repeated.windows == 140
    once = evaluate(Copy(), windows(3), name="copy", seed=0).state.statistics["squared_error"]
    times = np.array([24, 23, 23])[:, None]
    assert np.array_equal(repeated.state.statistics["squared_error"].total, once.total * times)


def test_the_truth_reconstructed_exactly_is_the_ceiling() -> None:
    found = evaluate_reconstruction(
        lambda frames: frames, windows(), name="vae", seed=0, parameters=9, networks=Networks(absolute)
    )
    scores = score(found.state, np.random.default_rng(0))
    assert scores["lpips"].overall.value == 0
    assert scores["skill"].overall.value == 1
    assert scores["psnr"].overall.value == 100
    assert found.parameters == 9
    coarse = evaluate_reconstruction(lambda f: (f * 8).round() / 7.5, windows(), name="vae", seed=0)
    difference = paired_difference(coarse.state, found.state, "psnr", np.random.default_rng(0)).overall
    assert difference.high < -50


def test_training_mode_and_speed() -> None:
    predictor = Noisy().train()
    found = evaluate(predictor, windows(), name="noisy", seed=0)
    assert predictor.training
    assert found.parameters == 3
    assert found.speed is not None
    assert found.speed.frames == 5 * 2 * Y, "the first batch warms up"
    assert found.speed.frames_per_second > 0
    alone = evaluate(predictor, windows(1), name="noisy", seed=0).speed
    assert alone is not None
    assert alone.frames == 2 * Y


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(EmptyError, match="copy_last: there is no window"):
        evaluate(Copy(), [], name="copy_last", seed=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("head", ["frames", "flow_bwd", "visible", "boxes", "presence", "collision"])
def test_not_finite_names_predictor_video_window_and_step(value: float, head: str) -> None:
    with pytest.raises(NonFiniteError, match=rf"bad: {head} of video 4, window starting at frame 8, .* step 3"):
        evaluate(Broken(4, value, head), windows(), name="bad", seed=0)


@pytest.mark.parametrize("head", ["presence", "collision"])
def test_what_is_no_probability_is_refused(head: str) -> None:
    with pytest.raises(ValueError, match=rf"bad predicted {head} from .* to 1.5000; a probability"):
        evaluate(Broken(1, 1.5, head), windows(), name="bad", seed=0)


def test_wrong_shapes_and_colours_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bad predicted colours from .* to 7.0"):
        evaluate(Broken(1, 7.0), windows(), name="bad", seed=0)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3, 16, 24\), the window asks for \(2, 4, 3, 16, 24\)"):
        evaluate(Short(), windows(), name="short", seed=0)


# --- examples ----------------------------------------------------------------------------------------------------


def test_examples_follow_their_rules() -> None:
    found = evaluate(Noisy(), windows(), name="noisy", seed=0)
    gains, motions = {}, {}
    for batch in windows():
        one = evaluate(Noisy(), [batch], name="noisy", seed=0)
        for kept in one.examples:
            gains[kept.video, kept.start] = float((kept.mse_copy - kept.mse).mean())
            motions[kept.video, kept.start] = float(kept.mse_copy.mean())
    assert len(gains) == 12
    by_rule = {rule: (e.video, e.start) for e in found.examples for rule in e.rules}
    assert set(by_rule) == {"first", "best", "worst", "median", "most motion", "median motion", "most collisions"}
    assert by_rule["most collisions"] == (0, 0), "they all have one: the first"
    assert by_rule["first"] == (0, 0)
    assert gains[by_rule["best"]] == max(gains.values())
    assert gains[by_rule["worst"]] == min(gains.values())
    assert gains[by_rule["median"]] == sorted(gains.values())[6]
    assert motions[by_rule["most motion"]] == max(motions.values())
    assert motions[by_rule["median motion"]] == sorted(motions.values())[6]
    copy = evaluate(Copy(), windows(), name="copy", seed=0)
    same = {rule: (e.video, e.start) for e in copy.examples for rule in e.rules}
    assert (same["most motion"], same["median motion"]) == (by_rule["most motion"], by_rule["median motion"])
    example = found.examples[0]
    assert example.context.shape == (X, H, W, 3)
    assert example.truth.shape == example.prediction.shape == (Y, H, W, 3)
    assert example.true_flow_bwd is not None
    assert example.true_flow_bwd.shape == (Y, 2, H, W)
    batch = window_batch(example.video)
    assert np.array_equal(example.true_boxes, batch.true_boxes[example.start // 8])  # pyright: ignore
    assert np.array_equal(example.true_collision, batch.true_collision[example.start // 8])  # pyright: ignore
    assert example.collision is not None
    assert example.collision == pytest.approx([0.1, 0.8, 0.2, 0.3])
    bare = evaluate(Copy(), windows(1, truth=False), name="copy", seed=0).examples[0]
    assert (bare.boxes, bare.presence, bare.collision, bare.true_boxes, bare.true_collision) == (None,) * 5


def test_the_window_with_most_collisions_is_kept_and_none_without() -> None:
    kept = evaluate(Copy(), windows(1), name="copy", seed=0).examples[0]
    examples = Examples(seed=0)
    for place, collisions in enumerate((0, 1, 3, 3, 2)):
        examples.offer(0.0, 0.0, place, 0, partial(replace, kept, video=place), collisions=collisions)
    by_rule = {rule: e.video for e in examples.chosen() for rule in e.rules}
    assert by_rule["most collisions"] == 2
    quiet = Examples(seed=0)
    quiet.offer(0.0, 0.0, 0, 0, lambda: kept)
    assert "most collisions" not in {rule for e in quiet.chosen() for rule in e.rules}


def test_examples_kept_are_few_however_many_are_offered() -> None:
    kept = evaluate(Copy(), windows(1), name="copy", seed=0).examples[0]
    examples, made = Examples(seed=0), 0

    def make() -> object:
        nonlocal made
        made += 1
        return replace(kept, rules=())

    rng = np.random.default_rng(0)
    for k in range(3000):
        examples.offer(float(rng.normal()), float(rng.normal()), k, 0, make)  # pyright: ignore[reportArgumentType]
    assert len(examples._drawn) == 15
    assert made < 300, "clips are only made of windows that are kept for a while"


# --- the folder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(Noisy(), windows(), name="noisy", seed=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_folder_repeats_byte_for_byte(evaluation: Evaluation, tmp_path: Path) -> None:
    write_results(tmp_path / "a", evaluation, seed=1, fps=12.5)
    again = evaluate(Noisy(), windows(), name="noisy", seed=0)
    write_results(tmp_path / "b", again, seed=1, fps=12.5)
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first == second
    assert {"metrics.json", "by_horizon.csv", "states.json", "examples/first.npz", "clips/first.mp4"} <= set(first)


def test_metrics_are_numbers_that_dvc_can_compare(evaluation: Evaluation, tmp_path: Path) -> None:
    write_results(tmp_path, evaluation, seed=1, fps=12.5, headline_steps=(1, 4, 12))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["predictor"], found["videos"], found["windows"], found["horizon"]) == ("noisy", 6, 12, Y)
    skill = found["overall"]["skill"]
    assert skill["low"] < skill["value"] < skill["high"] < 0
    assert list(found["step"]) == ["1", "4"]
    assert "nonvisible_precision" not in found["overall"], "undefined is left out"
    assert 0 < found["overall"]["collision_ap"]["low"] < found["overall"]["collision_ap"]["high"] < 1
    assert "collision_ap" not in found["step"]["1"]
    assert "seconds" not in json.dumps(found)


def test_test_time_training_stands_beside_the_figures_without(evaluation: Evaluation, tmp_path: Path) -> None:
    copy = evaluate(Copy(), windows(), name="noisy", seed=0)
    write_results(tmp_path / "a", evaluation, seed=1, fps=12.5, adapted=copy)
    write_results(tmp_path / "b", evaluation, seed=1, fps=12.5)
    found, plain = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    adapted = found.pop("adapted")
    assert found == plain
    assert adapted["overall"]["skill"]["value"] == 0
    gained = adapted["skill_gained"]
    assert gained["overall"]["value"] == pytest.approx(-plain["overall"]["skill"]["value"], abs=1e-5)
    assert 0 < gained["overall"]["low"] < gained["overall"]["high"]
    assert len(gained["steps"]) == Y


def test_csv_has_one_row_per_step_and_constant_columns(evaluation: Evaluation, tmp_path: Path) -> None:
    write_results(tmp_path / "noisy", evaluation, seed=1, fps=12.5)
    write_results(tmp_path / "copy", evaluate(Copy(), windows(), name="copy", seed=0), seed=1, fps=12.5)
    tables = {}
    for name in ("noisy", "copy"):
        with (tmp_path / name / "by_horizon.csv").open() as file:
            tables[name] = list(csv.DictReader(file))
    assert [row["step"] for row in tables["noisy"]] == ["1", "2", "3", "4"]
    assert list(tables["noisy"][0]) == list(tables["copy"][0])
    assert list(tables["copy"][0])[:4] == ["predictor", "step", "mse", "psnr"]
    assert tables["copy"][0]["epe"] == tables["copy"][0]["box_iou"] == tables["copy"][0]["collision_f1_2"] == ""
    assert "collision_ap" not in tables["noisy"][0], "has no value per step"
    assert tables["noisy"][0]["lpips"] == "", "not measured"
    low, value, high = (float(tables["noisy"][0][f"box_iou{end}"]) for end in ("_low", "", "_high"))
    assert low < value < high
    assert {row["skill"] for row in tables["copy"]} == {"0.0"}
    mse = score(evaluation.state, np.random.default_rng(1))["mse"].steps[2].value
    assert float(tables["noisy"][2]["mse"]) == pytest.approx(mse, rel=1e-5)


def test_what_is_read_is_what_was_written(evaluation: Evaluation, tmp_path: Path) -> None:
    write_results(tmp_path, evaluation, seed=1, fps=12.5)
    back = read_results(tmp_path)
    assert back.state.to_json() == evaluation.state.to_json()
    assert (back.name, back.parameters, back.speed) == (evaluation.name, evaluation.parameters, None)
    written = {e.rules: e for e in evaluation.examples}
    assert {e.rules for e in back.examples} == set(written)
    for example in back.examples:
        for name, value in vars(written[example.rules]).items():
            assert np.array_equal(getattr(example, name), value), name
    (tmp_path / "states.json").unlink()
    with pytest.raises(StoreError, match=r"no states\.json"):
        read_results(tmp_path)


def test_films_show_context_then_every_step(evaluation: Evaluation, tmp_path: Path) -> None:
    write_results(tmp_path, evaluation, seed=1, fps=12.5)
    with av.open(str(tmp_path / "clips" / "first.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == X + Y
    assert frames[0].shape[1] >= 3 * 192
