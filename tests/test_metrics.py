"""Metrics against slow references, known answers, and the algebra of their states."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from data.errors import EmptyError, NonFiniteError
from models import statistics
from models.metrics import METRICS, measured, paired_difference, score
from models.statistics import (
    State,
    Statistic,
    check_finite,
    flow_statistics,
    from_json,
    merge,
    picture_statistics,
    state_of,
    visibility_statistics,
)
from models.temporal_statistics import perceptual_statistics


def frames(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def state_from(name: str, totals: list[list[float]], counts: list[list[float]] | None = None) -> State:
    total = np.array(totals, dtype=np.float64)
    count = np.ones_like(total) if counts is None else np.array(counts, dtype=np.float64)
    return State(np.arange(len(total)), {name: Statistic(total, count)})


def state_like(seed: int, videos: int = 40, steps: int = 3, factor: float = 0.5) -> State:
    """A model whose error is about ``factor`` times that of copy_last, with hard and easy videos."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(99).lognormal(0, 1, size=(videos, 1)) * np.ones((1, steps))
    count = np.full((videos, steps), 4.0)
    error = hard * factor * rng.uniform(0.9, 1.1, size=hard.shape)
    return State(
        np.arange(videos),
        {"squared_error": Statistic(error, count), "squared_error_copy": Statistic(hard, count)},
    )


# --- statistics against references ------------------------------------------------------------------------------


def brute_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Equation 13 of Wang et al. window by window."""
    ax = np.arange(11) - 5
    g = np.exp(-(ax[:, None] ** 2 + ax[None, :] ** 2) / (2 * 1.5**2))
    g /= g.sum()
    scores = []
    for c in range(a.shape[0]):
        for i in range(a.shape[1] - 10):
            for j in range(a.shape[2] - 10):
                x, y = a[c, i : i + 11, j : j + 11], b[c, i : i + 11, j : j + 11]
                mx, my = (g * x).sum(), (g * y).sum()
                vx, vy, cov = (g * (x - mx) ** 2).sum(), (g * (y - my) ** 2).sum(), (g * (x - mx) * (y - my)).sum()
                c1, c2 = 0.01**2, 0.03**2
                scores.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(scores))


def test_ssim_equals_the_definition_and_skimage() -> None:
    a = frames(2, 3, 17, 23)
    b = (a + 0.2 * frames(2, 3, 17, 23, seed=1)).clamp(0, 1)
    ours = statistics.ssim(a, b)
    for k in range(2):
        assert float(ours[k]) == pytest.approx(brute_ssim(a[k].double().numpy(), b[k].double().numpy()), abs=1e-10)
        theirs = structural_similarity(
            a[k].double().numpy(),
            b[k].double().numpy(),
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(ours[k]) == pytest.approx(theirs, abs=1e-6)


def test_ssim_known_answers() -> None:
    a = frames(1, 3, 16, 16)
    assert float(statistics.ssim(a, a)) == pytest.approx(1.0, abs=1e-12)
    black, white = torch.zeros(1, 3, 12, 12), torch.ones(1, 3, 12, 12)
    assert float(statistics.ssim(black, white)) == pytest.approx(1e-4 / (1 + 1e-4), abs=1e-9)
    with pytest.raises(ValueError, match="11x11 pixels, got 10x16"):
        statistics.ssim(a[..., :10, :], a[..., :10, :])


def test_picture_statistics_by_hand() -> None:
    truth, last = torch.zeros(1, 2, 3, 12, 12), torch.full((1, 3, 12, 12), 0.5)
    prediction = torch.full_like(truth, 0.1)
    prediction[:, 1] = 0.2
    mask = torch.zeros(1, 2, 12, 12, dtype=torch.bool)
    mask[0, 0, :3, :4] = True
    found = score(state_of(np.array([7]), picture_statistics(prediction, truth, last, mask)), np.random.default_rng(0))
    assert [e.value for e in found["mse"].steps] == pytest.approx([0.01, 0.04], rel=1e-6)
    assert [e.value for e in found["psnr"].steps] == pytest.approx([20.0, -10 * math.log10(0.04)], rel=1e-6)
    assert found["psnr"].overall.value == pytest.approx((20 - 10 * math.log10(0.04)) / 2, rel=1e-6)
    assert [e.value for e in found["skill"].steps] == pytest.approx([1 - 0.01 / 0.25, 1 - 0.04 / 0.25], rel=1e-6)
    assert found["fg_psnr"].steps[0].value == pytest.approx(20.0, rel=1e-6)
    assert math.isnan(found["fg_psnr"].steps[1].value), "no foreground at step 2: absent, not zero"
    assert found["fg_psnr"].overall.value == pytest.approx(20.0, rel=1e-6)


def test_foreground_means_pool_pixels_and_ignore_the_rest() -> None:
    truth, prediction = frames(3, 2, 3, 12, 14), frames(3, 2, 3, 12, 14, seed=1)
    mask = frames(3, 2, 12, 14, seed=2) > 0.7
    state = state_of(np.array([5, 5, 9]), picture_statistics(prediction, truth, truth[:, 0], mask))
    errors = [[], []]
    for i in range(3):
        for k in range(2):
            for r, col in mask[i, k].nonzero().tolist():
                errors[k] += [
                    (float(prediction[i, k, c, r, col]) - float(truth[i, k, c, r, col])) ** 2 for c in range(3)
                ]
    found = score(state, np.random.default_rng(0), names=["fg_mse"])["fg_mse"]
    assert [e.value for e in found.steps] == pytest.approx([np.mean(e) for e in errors], rel=1e-6)


def test_without_foreground_the_metric_is_absent() -> None:
    truth = frames(1, 2, 3, 12, 12)
    state = state_of(np.array([0]), picture_statistics(truth, truth, truth[:, 0]))
    assert measured(state) == ("mse", "psnr", "psnr_frame", "ssim", "skill")
    with pytest.raises(KeyError, match="fg_squared_error"):
        score(state, np.random.default_rng(0), names=["fg_psnr"])


def test_two_psnrs_differ_as_documented() -> None:
    truth = torch.zeros(2, 1, 3, 12, 12)
    prediction = torch.stack([torch.full((1, 3, 12, 12), 0.1), torch.full((1, 3, 12, 12), 0.01)])
    found = score(
        state_of(np.array([0, 1]), picture_statistics(prediction, truth, truth[:, 0])), np.random.default_rng(0)
    )
    assert found["psnr_frame"].overall.value == pytest.approx((20 + 40) / 2, rel=1e-6)
    assert found["psnr"].overall.value == pytest.approx(-10 * math.log10((0.01 + 0.0001) / 2), rel=1e-6)


def test_perfect_prediction_of_a_moving_and_of_a_static_window() -> None:
    truth = frames(1, 1, 3, 12, 12)
    moving = picture_statistics(truth, truth, truth[:, 0] / 2)
    found = score(state_of(np.array([0]), moving), np.random.default_rng(0))
    assert (found["skill"].overall.value, found["psnr"].overall.value, found["psnr_frame"].overall.value) == (
        1,
        100,
        100,
    )
    static = score(state_of(np.array([0]), picture_statistics(truth, truth, truth[:, 0])), np.random.default_rng(0))
    assert math.isnan(static["skill"].overall.value)


def test_flow_errors_by_region() -> None:
    truth = torch.zeros(1, 1, 2, 4, 4)
    truth[0, 0, 0, 0] = 3.0  # the first row moves right
    said = truth.clone()
    said[0, 0, :, 0, 0] += torch.tensor([3.0, 4.0])  # 5 px off on one of 4 moving pixels
    said[0, 0, 1, 3, 3] = 0.25  # and 0.25 px off on one of 12 static ones
    visible = torch.ones(1, 1, 1, 4, 4)
    visible[0, 0, 0, 0, 0] = 0
    found = score(
        state_of(np.array([0]), flow_statistics(said, truth, visible, moving_px=1.0)), np.random.default_rng(0)
    )
    assert found["epe"].overall.value == pytest.approx(5.25 / 16, rel=1e-6)
    assert found["epe_moving"].overall.value == pytest.approx(5 / 4, rel=1e-6)
    assert found["epe_background"].overall.value == pytest.approx(0.25 / 12, rel=1e-6)
    assert found["epe_visible"].overall.value == pytest.approx(0.25 / 15, rel=1e-6)
    nothing_moves = state_of(np.array([0]), flow_statistics(said, truth, moving_px=9.0))
    assert "epe_moving" not in measured(nothing_moves)
    assert "epe_visible" not in measured(nothing_moves)


def test_visibility_counts_the_nonvisible_class() -> None:
    true, said = torch.ones(1, 1, 1, 2, 5), torch.ones(1, 1, 1, 2, 5)
    true[0, 0, 0, 0, :4] = 0.1  # four hidden pixels
    said[0, 0, 0, 0, 1:4] = 0.4  # three found
    said[0, 0, 0, 1, :2] = 0.0  # two false alarms
    found = score(state_of(np.array([0]), visibility_statistics(said, true)), np.random.default_rng(0))
    assert found["nonvisible_precision"].overall.value == pytest.approx(3 / 5)
    assert found["nonvisible_recall"].overall.value == pytest.approx(3 / 4)
    assert found["nonvisible_f1"].overall.value == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    blind = score(state_of(np.array([0]), visibility_statistics(torch.ones_like(true), true)), np.random.default_rng(0))
    assert blind["nonvisible_f1"].overall.value == 0
    assert math.isnan(blind["nonvisible_precision"].overall.value)


def test_lpips_is_a_mean_over_frames_whatever_the_chunks() -> None:
    prediction, truth = frames(7, 3, 3, 12, 12), frames(7, 3, 3, 12, 12, seed=1)
    sizes = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sizes.append(len(a))
        return (a - b).abs().mean(dim=(1, 2, 3))

    last = frames(7, 3, 12, 12, seed=2)
    state = state_of(np.array([4, 4, 4, 5, 5, 5, 5]), perceptual_statistics(distance, prediction, truth, last))
    assert sizes == [16, 5] * 3
    found = score(state, np.random.default_rng(0))
    assert list(found) == ["lpips", "tlpips"]
    expected = (prediction - truth).abs().mean(dim=(0, 2, 3, 4))
    assert [e.value for e in found["lpips"].steps] == pytest.approx(expected.tolist(), rel=1e-6)


# --- states ------------------------------------------------------------------------------------------------------


def test_chunks_merged_in_any_order_are_bit_equal_to_the_whole() -> None:
    n = 24
    prediction, truth = frames(n, 3, 3, 12, 16), frames(n, 3, 3, 12, 16, seed=1)
    mask = frames(n, 3, 12, 16, seed=2) > 0.5
    videos = np.random.default_rng(0).integers(100, 106, n)
    flow, true_flow = 9 * frames(n, 3, 2, 12, 16), 9 * frames(n, 3, 2, 12, 16, seed=3)

    def state(rows: np.ndarray) -> State:
        picked = torch.from_numpy(rows)
        stats = picture_statistics(prediction[picked], truth[picked], truth[picked, 0], mask[picked])
        return state_of(videos[rows], stats | flow_statistics(flow[picked], true_flow[picked]))

    whole = state(np.arange(n))
    shuffled = np.random.default_rng(1).permutation(n)
    parts = [state(rows) for rows in np.array_split(shuffled, 7)]
    left = merge(merge(*parts[:3]), merge(*parts[3:]))
    for merged in (left, merge(*reversed(parts)), from_json(left.to_json())):
        assert merged.to_json() == whole.to_json()


def test_merge_keeps_absent_statistics_absent() -> None:
    truth = frames(2, 2, 3, 12, 12)
    bare = state_of(np.array([0, 1]), picture_statistics(truth, truth, truth[:, 1]))
    masked = state_of(np.array([1, 2]), picture_statistics(truth, truth, truth[:, 1], torch.ones(2, 2, 12, 12)))
    both = merge(bare, masked)
    assert both.videos.tolist() == [0, 1, 2]
    assert both.statistics["fg_squared_error"].count[:, 0].tolist() == [0, 3 * 144, 3 * 144]
    assert both.statistics["ssim"].count[:, 0].tolist() == [1, 2, 1]


def test_states_refuse_nonsense() -> None:
    with pytest.raises(EmptyError):
        merge()
    with pytest.raises(EmptyError):
        state_of(np.array([], dtype=np.int64), {"ssim": Statistic(np.zeros((0, 2)), np.zeros((0, 2)))})
    with pytest.raises(EmptyError):
        score(State(np.array([], dtype=np.int64), {"ssim": Statistic(*np.zeros((2, 0, 2)))}), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"\[1, 2\] steps"):
        merge(state_from("ssim", [[1.0]]), state_from("ssim", [[1.0, 1.0]]))


def test_not_finite_names_video_window_and_step() -> None:
    bad = torch.zeros(2, 4, 3, 5, 5)
    check_finite(bad, torch.tensor([3, 4]), torch.tensor([0, 16]), "prediction")
    bad[1, 2, 0, 1, 1] = math.nan
    bad[1, 3] = math.inf
    with pytest.raises(NonFiniteError, match=r"prediction of video 4, window starting at frame 16, .* step 3: 1 NaN"):
        check_finite(bad, torch.tensor([3, 4]), torch.tensor([0, 16]), "prediction")


# --- scores and intervals ----------------------------------------------------------------------------------------


def test_every_metric_says_what_it_is() -> None:
    for metric in METRICS.values():
        assert "Range" in metric.definition
        assert [word for word in ("higher", "lower", "neither") if word in metric.definition] == [metric.better]


def test_bootstrap_equals_the_slow_one() -> None:
    state = state_like(1, videos=6, steps=2)
    found = score(state, np.random.default_rng(5), names=["skill"], resamples=200)["skill"]
    error, copy = state.statistics["squared_error"].total, state.statistics["squared_error_copy"].total
    drawn = []
    for counts in np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=200):
        chosen = np.repeat(np.arange(6), counts)
        drawn.append(1 - error[chosen].mean(axis=0) / copy[chosen].mean(axis=0))
    expected = np.quantile(np.array(drawn), (0.025, 0.975), axis=0)
    assert [e.low for e in found.steps] == pytest.approx(expected[0].tolist())
    assert [e.high for e in found.steps] == pytest.approx(expected[1].tolist())
    overall = np.quantile(np.array(drawn).mean(axis=1), (0.025, 0.975))
    assert (found.overall.low, found.overall.high) == pytest.approx(tuple(overall))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).normal(3.0, 1.0, size=(50, 1))
        found = score(state_from("ssim", values.tolist()), np.random.default_rng(seed), resamples=300)["ssim"].overall
        covered += found.low <= 3.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.985


def test_one_video_has_a_value_and_no_interval() -> None:
    found = score(state_from("ssim", [[0.5, 0.7]]), np.random.default_rng(0))["ssim"].overall
    assert found.value == pytest.approx(0.6)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_paired_interval_is_narrower_and_changes_sign_with_its_arguments() -> None:
    a, b = state_like(1, factor=0.5), state_like(2, factor=0.52)
    paired = paired_difference(a, b, "mse", np.random.default_rng(0)).overall
    apart = score(a, np.random.default_rng(0), names=["mse"])["mse"].overall
    assert paired.high - paired.low < 0.2 * (apart.high - apart.low)
    assert paired.high < 0, "hard videos are hard for both, so the small advantage shows"
    swapped = paired_difference(b, a, "mse", np.random.default_rng(0)).overall
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-paired.value, -paired.high, -paired.low))
    same = paired_difference(a, a, "skill", np.random.default_rng(0)).overall
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_paired_difference_needs_the_same_windows() -> None:
    a = state_like(1)
    with pytest.raises(ValueError, match="1 only in the first"):
        paired_difference(a, state_like(1, videos=39), "mse", np.random.default_rng(0))
    fewer = State(a.videos, {n: Statistic(s.total, s.count - 1) for n, s in a.statistics.items()})
    with pytest.raises(ValueError, match="the same windows"):
        paired_difference(a, fewer, "mse", np.random.default_rng(0))
