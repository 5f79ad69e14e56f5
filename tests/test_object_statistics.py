"""Boxes and collisions against slow references and known answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from models.metrics import Score, measured, paired_difference, score
from models.object_statistics import (
    BINS,
    BINS_PER_LOGIT,
    box_iou,
    box_statistics,
    collision_histograms,
    collision_statistics,
    match_events,
)
from models.statistics import State, Statistic, from_json, merge, state_of


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    corner, size = 20 * random(*shape, 2, seed=seed), 1 + 20 * random(*shape, 2, seed=seed + 1)
    return torch.cat([corner, corner + size], dim=-1)


def scores_of(statistics: dict[str, Statistic], videos: list[int] | None = None) -> dict[str, Score]:
    rows = len(next(iter(statistics.values())).total)
    return score(state_of(np.array(videos or range(rows)), statistics), np.random.default_rng(0))


# --- boxes -------------------------------------------------------------------------------------------------------


def slow_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, x1 - x0) * max(0.0, y1 - y0) for x0, y0, x1, y1 in (a, b)]
    union = areas[0] + areas[1] - width * height
    return width * height / union if union else 0.0


def test_iou_equals_the_definition() -> None:
    a, b = random_boxes(2, 3, 4, seed=0), random_boxes(2, 3, 5, seed=2)
    a[0, 0, 0], b[0, 0, 0] = torch.zeros(4), torch.zeros(4)  # no area at all
    a[1, 1, 1] = a[1, 1, 1, [2, 3, 0, 1]]  # its ends are swapped
    found = box_iou(a, b)
    for i, k, s, n in itertools.product(range(2), range(3), range(4), range(5)):
        assert float(found[i, k, s, n]) == pytest.approx(slow_iou(a[i, k, s].tolist(), b[i, k, n].tolist()), abs=1e-6)
    assert float(found[0, 0, 0, 0]) == 0
    assert float(found[1, 1, 1].max()) == 0


@pytest.mark.parametrize(("slots", "objects"), [(3, 3), (4, 2), (2, 4)])
def test_boxes_equal_the_best_of_all_assignments(slots: int, objects: int) -> None:
    boxes, true = random_boxes(2, 5, slots, seed=3), random_boxes(2, 5, objects, seed=7)
    boxes[..., : min(slots, objects), :] = 0.3 * boxes[..., : min(slots, objects), :] + 0.7 * true[..., :slots, :]
    presence, there = random(2, 5, slots, seed=5), (random(2, 5, objects, seed=6) > 0.3).float()
    found = box_statistics(boxes, presence, true, there)
    few = min(slots, objects)
    for i in range(2):

        def overlap(k: int, s: int, n: int, i: int = i) -> float:
            counts = presence[i, k, s] >= 0.5 and there[i, k, n] == 1
            return slow_iou(boxes[i, k, s].double().tolist(), true[i, k, n].double().tolist()) if counts else 0.0

        pairings = [
            list(zip(chosen, some, strict=True))
            for some in itertools.combinations(range(objects), few)
            for chosen in itertools.permutations(range(slots), few)
        ]
        per_step = [[sum(overlap(k, s, n) for s, n in pairs) for k in range(5)] for pairs in pairings]
        assert found["box_iou"].total[i].tolist() == pytest.approx(max(per_step, key=sum), abs=1e-6)
        assert found["box_iou"].count[i].tolist() == there[i].sum(dim=1).tolist()
        for k in range(5):
            hits = max(sum(overlap(k, s, n) >= 0.5 for s, n in pairs) for pairs in pairings)
            assert found["box_hit"].total[i, k] == hits
            assert found["box_false"].total[i, k] == int((presence[i, k] >= 0.5).sum()) - hits
            assert found["box_miss"].total[i, k] == int(there[i, k].sum()) - hits


def test_a_perfect_tracker_scores_one_in_any_order_of_slots() -> None:
    true, there = random_boxes(1, 4, 3), torch.ones(1, 4, 3)
    there[0, 2:, 1] = 0
    order = [2, 0, 1]
    found = scores_of(box_statistics(true[:, :, order], there[:, :, order], true, there))
    for name in ("box_iou", "box_recall", "box_precision"):
        assert [e.value for e in found[name].steps] == pytest.approx([1] * 4), name
    assert scores_of(box_statistics(true, None, true, torch.ones(1, 4, 3)))["box_iou"].overall.value == 1


def test_slots_that_swap_lose_identity_but_not_recall() -> None:
    apart = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    true = apart.repeat(1, 4, 1, 1)
    said = true.clone()
    said[0, 3] = said[0, 3, [1, 0]]
    sure = torch.ones(1, 4, 2)
    found = scores_of(box_statistics(said, sure, true, sure))
    assert [e.value for e in found["box_iou"].steps] == [1, 1, 1, 0]
    assert found["box_recall"].overall.value == found["box_precision"].overall.value == 1


def test_absent_objects_and_slots() -> None:
    true = torch.tensor([0.0, 0, 10, 10]).repeat(1, 3, 2, 1)
    there = torch.tensor([[[1.0, 0], [1, 0], [0, 0]]])
    said = torch.tensor([0.0, 0, 10, 5]).repeat(1, 3, 1, 1)  # half of it
    presence = torch.tensor([[[0.9], [0.4], [0.9]]])
    found = scores_of(box_statistics(said, presence, true, there))
    assert [e.value for e in found["box_iou"].steps[:2]] == [0.5, 0], "a slot that is not there finds nothing"
    assert math.isnan(found["box_iou"].steps[2].value), "nothing to find: absent, not zero"
    assert [e.value for e in found["box_recall"].steps[:2]] == [1, 0]
    assert found["box_precision"].steps[2].value == 0, "a slot where nothing is"
    assert math.isnan(found["box_precision"].steps[1].value)


# --- collisions --------------------------------------------------------------------------------------------------


def slow_average_precision(probability: np.ndarray, true: np.ndarray) -> float:
    """Every distinct score is a threshold once."""
    true, total, recall = true.astype(np.float64), 0.0, 0.0
    for threshold in sorted(set(probability.ravel().tolist()), reverse=True):
        said = probability >= threshold
        precision, now = true[said].mean(), true[said].sum() / true.sum()
        total, recall = total + precision * (now - recall), now
    return float(total)


def average_precision(probability: torch.Tensor, true: torch.Tensor) -> float:
    state = state_of(
        np.arange(len(true)),
        collision_statistics(probability, true, frame_stride=2),
        collision_histograms(probability, true),
    )
    found = score(state, np.random.default_rng(0))["collision_ap"]
    assert found.steps == ()
    return found.overall.value


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_the_slow_one(seed: int) -> None:
    true = (random(6, 8, seed=seed) < 0.2).float()
    logits = (random(6, 8, seed=seed + 9) * 40).round() / 5 - 6 + true  # in the middle of bins, many ties
    expected = slow_average_precision((10 * logits).round().numpy(), true.numpy())
    assert average_precision(logits.sigmoid(), true) == pytest.approx(expected, abs=1e-12)


def test_bins_cost_little_of_the_average_precision() -> None:
    true = (random(200, 12) < 0.08).float()
    probability = torch.sigmoid(3 * (random(200, 12, seed=1) - 0.5) + 1.5 * true - 3)
    expected = slow_average_precision(probability.numpy(), true.numpy())
    assert average_precision(probability, true) == pytest.approx(expected, abs=0.01)


def test_average_precision_known_answers() -> None:
    true = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0]])
    assert average_precision(true, true) == 1
    assert average_precision(1 - true, true) == pytest.approx(2 / 8), "all negatives first, then both at once"
    assert average_precision(torch.full_like(true, 0.3), true) == pytest.approx(2 / 8), "no ranking: the base rate"
    first_of_two = torch.tensor([[0.0, 0.9, 0.5, 0], [0, 0, 0.1, 0]])
    assert average_precision(first_of_two, true) == pytest.approx((1 + 2 / 3) / 2)
    probability = torch.tensor([[0.0, 1e-9, 1.0, 0.5]])
    counts = collision_histograms(probability, torch.zeros(1, 4))["collision_negatives"][0]
    assert {int(k): int(counts[k]) for k in counts.nonzero()[0]} == {0: 2, BINS // 2: 1, BINS - 1: 1}


def slow_matches(said: list[int], true: list[int], within: int) -> int:
    """The most pairs over every way to pair."""
    if not said:
        return 0
    first, rest = said[0], said[1:]
    taken = [true[:q] + true[q + 1 :] for q, step in enumerate(true) if abs(step - first) <= within]
    return max([slow_matches(rest, true, within), *(1 + slow_matches(rest, left, within) for left in taken)])


def test_events_are_matched_as_often_as_can_be() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        said, true = (np.flatnonzero(rng.random(9) < 0.4) for _ in range(2))
        within = int(rng.integers(0, 4))
        hit, false, miss = match_events(said, true, within=within)
        assert len(hit) == slow_matches(said.tolist(), true.tolist(), within)
        assert len(hit) + len(false) == len(said)
        assert sorted(hit + miss) == true.tolist()
        assert set(false) <= set(said.tolist())


def test_tolerance_is_in_source_frames() -> None:
    true = torch.zeros(1, 12)
    true[0, 6] = 1
    for stride, reach in ((1, (2, 5)), (2, (1, 2)), (3, (0, 1)), (6, (0, 0))):
        for distance in range(6):
            said = torch.zeros(1, 12)
            said[0, 6 + distance] = 0.8
            found = collision_statistics(said, true, frame_stride=stride)
            for tolerance, steps in zip((2, 5), reach, strict=True):
                assert found[f"collision_hit_{tolerance}"].total.sum() == (distance <= steps), (stride, distance)


def test_events_by_hand() -> None:
    true = torch.tensor([[0.0, 1, 0, 0, 0, 0, 1, 0]])
    said = torch.tensor([[0.1, 0.6, 0.9, 0.7, 0.2, 0.4, 0.3, 0.8]])  # peaks at 2 and 7; 0.4 is not sure enough
    found = collision_statistics(said, true, frame_stride=2)
    assert found["collision_hit_2"].total.tolist() == true.tolist(), "counted where the collision is"
    assert found["collision_false_2"].total.sum() == found["collision_miss_2"].total.sum() == 0
    exact = collision_statistics(said, true, frame_stride=3)
    assert exact["collision_miss_2"].total.tolist() == true.tolist()
    assert exact["collision_false_2"].total[0].nonzero()[0].tolist() == [2, 7]
    scores = scores_of(exact)
    assert scores["collision_f1_2"].overall.value == 0
    assert scores["collision_f1_5"].overall.value == 1
    assert scores["collision_base_rate"].overall.value == pytest.approx(2 / 8)


def test_f1_is_computed_from_the_sums_over_steps() -> None:
    true = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]])
    said = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    found = scores_of(collision_statistics(said, true, frame_stride=9))
    assert found["collision_f1_2"].overall.value == pytest.approx(4 / 5), "not the mean of 2/3 and 1"
    assert [e.value for e in found["collision_f1_2"].steps] == pytest.approx(
        [2 / 3, math.nan, 1, math.nan], nan_ok=True
    )


def test_certain_and_constant_predictions() -> None:
    true = (random(40, 12) < 0.15).float()
    rate = float(true.mean())
    perfect = scores_of(collision_statistics(true, true, frame_stride=2))
    assert perfect["collision_f1_2"].overall.value == perfect["collision_f1_5"].overall.value == 1
    always = scores_of(collision_statistics(torch.ones_like(true), true, frame_stride=2))
    for name in ("collision_f1_2", "collision_f1_5", "collision_f1_always"):
        assert always[name].overall.value == pytest.approx(2 * rate / (1 + rate)), name
    never = scores_of(collision_statistics(torch.zeros_like(true), true, frame_stride=2))
    assert never["collision_f1_2"].overall.value == 0


def test_without_a_collision_nothing_is_claimed() -> None:
    quiet = torch.zeros(2, 4)
    state = state_of(
        np.arange(2), collision_statistics(quiet, quiet, frame_stride=2), collision_histograms(quiet, quiet)
    )
    assert "collision_ap" not in measured(state)
    found = score(state, np.random.default_rng(0))
    assert found["collision_base_rate"].overall.value == 0
    assert math.isnan(found["collision_f1_2"].overall.value)


# --- states ------------------------------------------------------------------------------------------------------


def state_at(rows: np.ndarray, videos: np.ndarray, sharpness: float = 1.0) -> State:
    true_boxes, boxes = random_boxes(24, 3, 4), random_boxes(24, 3, 4, seed=1)
    presence, there = random(24, 3, 4, seed=3), (random(24, 3, 4, seed=4) > 0.4).float()
    true = (random(24, 3, seed=5) < 0.3).float()
    collision = torch.sigmoid(4 * (random(24, 3, seed=6) - 0.5) + sharpness * true)
    at = torch.from_numpy(rows)
    statistics = box_statistics(boxes[at], presence[at], true_boxes[at], there[at])
    statistics |= collision_statistics(collision[at], true[at], frame_stride=2)
    return state_of(videos[rows], statistics, collision_histograms(collision[at], true[at]))


def test_chunks_merged_in_any_order_are_bit_equal_to_the_whole() -> None:
    videos = np.random.default_rng(0).integers(100, 106, 24)
    whole = state_at(np.arange(24), videos)
    parts = [state_at(rows, videos) for rows in np.array_split(np.random.default_rng(1).permutation(24), 7)]
    left = merge(merge(*parts[:3]), merge(*parts[3:]))
    for merged in (left, merge(*reversed(parts)), from_json(left.to_json())):
        assert merged.to_json() == whole.to_json()
    assert whole.histograms["collision_positives"].sum() + whole.histograms["collision_negatives"].sum() == 24 * 3
    bare = State(np.array([7]), {"ssim": Statistic(np.ones((1, 3)), np.ones((1, 3)))})
    both = merge(bare, whole)
    assert both.histograms["collision_negatives"][0].sum() == 0
    assert from_json(both.to_json()).to_json() == both.to_json()


def test_intervals_of_a_ranking_equal_the_slow_bootstrap() -> None:
    state = state_at(np.arange(24), np.arange(24) // 4)
    found = score(state, np.random.default_rng(5), names=["collision_ap"], resamples=100)["collision_ap"].overall
    true = (random(24, 3, seed=5) < 0.3).numpy()
    logits = 4 * (random(24, 3, seed=6) - 0.5) + torch.from_numpy(true).float()
    binned = (BINS_PER_LOGIT * logits.double()).round().numpy()
    drawn = []
    for counts in np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=100):
        rows = np.concatenate([np.arange(4) + 4 * v for v in np.repeat(np.arange(6), counts)])
        drawn.append(slow_average_precision(binned[rows], true[rows]))
    assert found.value == pytest.approx(slow_average_precision(binned, true))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))))


def test_rankings_are_compared_in_pairs() -> None:
    videos = np.arange(24)
    good, poor = state_at(videos, videos, sharpness=4.0), state_at(videos, videos, sharpness=0.0)
    found = paired_difference(good, poor, "collision_ap", np.random.default_rng(0))
    assert found.steps == ()
    assert 0 < found.overall.low < found.overall.value < found.overall.high
    fewer = State(videos, good.statistics, {name: h * 2 for name, h in good.histograms.items()})
    with pytest.raises(ValueError, match="the same windows: 'collision_positives' counts"):
        paired_difference(good, fewer, "collision_ap", np.random.default_rng(0))
    with pytest.raises(KeyError, match="needs histogram 'collision_positives'"):
        score(State(videos, good.statistics), np.random.default_rng(0), names=["collision_ap"])
