"""Objects as points: boxes survive the grid, losses agree with slow obvious ones, slots keep their object."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.detection import (
    BESIDE,
    CONTACT_HALF_AT,
    CentreMaps,
    CollisionHead,
    DetectionHead,
    centres,
    collision_error,
    contacts,
    decode,
    detection_error,
    heat_error,
    heat_map,
    link,
)

STRIDE, GRID = 8, (16, 24)


def some_boxes(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three objects that do not share a neighbourhood in each of two pictures, five empty slots."""
    generator = torch.Generator().manual_seed(seed)
    boxes, presence = torch.zeros(2, 8, 4), torch.zeros(2, 8)
    for i in range(2):
        for n, (x, y) in enumerate([(40.0, 30.0), (120.0, 40.0), (80.0, 90.0)]):
            x, y = (
                x + 8 * float(torch.rand((), generator=generator)),
                y + 8 * float(torch.rand((), generator=generator)),
            )
            w, h = (12 + 20 * torch.rand(2, generator=generator)).tolist()
            boxes[i, n], presence[i, n] = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2]), 1
    return boxes, presence


def exact_maps(boxes: Tensor, presence: Tensor) -> CentreMaps:
    """What a perfect head would say."""
    points = centres(boxes, presence, GRID, stride=STRIDE)
    heat = heat_map(points, GRID).clamp(1e-4, 1 - 1e-4)
    offset, log_size = torch.zeros(len(boxes), 2, *GRID), torch.zeros(len(boxes), 2, *GRID)
    for i in range(len(boxes)):
        for n in range(boxes.shape[1]):
            if points.present[i, n]:
                row, column = divmod(int(points.cell[i, n]), GRID[1])
                offset[i, :, row, column], log_size[i, :, row, column] = points.offset[i, n], points.log_size[i, n]
    return CentreMaps(heat.logit(), offset, log_size)


def iou(a: Tensor, b: Tensor) -> float:
    width, height = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(0).tolist()
    areas = [float((c[2] - c[0]) * (c[3] - c[1])) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def test_boxes_come_back_from_the_grid() -> None:
    boxes, presence = some_boxes()
    found, sure = decode(exact_maps(boxes, presence), 8, stride=STRIDE)
    for i in range(2):
        assert (sure[i] > 0.9).sum() == 3
        for n in range(3):
            assert max(iou(boxes[i, n], box) for box in found[i, :3]) > 0.99


def test_the_heat_map_is_one_at_centres_and_as_wide_as_its_box() -> None:
    boxes, presence = torch.zeros(1, 2, 4), torch.tensor([[1.0, 0.0]])
    boxes[0, 0] = torch.tensor([100 - 24, 60 - 12, 100 + 24, 60 + 12]).float()  # 6 by 3 cells around (12.5, 7.5)
    heat = heat_map(centres(boxes, presence, GRID, stride=STRIDE), GRID)[0, 0]
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            expected = math.exp(-(((column - 12) / 1.0) ** 2 + ((row - 7) / 0.5) ** 2) / 2)
            assert float(heat[row, column]) == pytest.approx(expected, abs=1e-6)


def test_heat_error_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes, presence = some_boxes()
    heat = heat_map(centres(boxes, presence, GRID, stride=STRIDE), GRID)
    logits = torch.randn(2, 1, *GRID, generator=generator)
    labelled = torch.tensor([1.0, 0.0])
    total = 0.0
    for p, y in zip(logits[0].sigmoid().flatten().tolist(), heat[0].flatten().tolist(), strict=True):
        total += (1 - p) ** 2 * math.log(p) if y == 1 else (1 - y) ** 4 * p**2 * math.log(1 - p)
    assert float(heat_error(logits, heat, labelled)) == pytest.approx(-total / 3, rel=1e-4)


@pytest.mark.parametrize("half_at", [0.5, 0.1])
def test_one_half_is_said_at_the_probability_asked_for(half_at: float) -> None:
    """A cell that holds a centre so often: its expected loss is least at a logit of zero."""
    logits = torch.zeros(1, 1, 1, 2, requires_grad=True)
    sure = torch.tensor([[[[0.0, 1.0]]]])  # the other cell is a centre in any case, so that there is one to count
    expected = half_at * heat_error(logits, torch.ones(1, 1, 1, 2), torch.ones(1), half_at=half_at) * 2
    expected = expected + (1 - half_at) * heat_error(logits, sure, torch.ones(1), half_at=half_at)
    (grad,) = torch.autograd.grad(expected, logits)
    assert float(grad[..., 0]) == pytest.approx(0, abs=1e-6)


def test_a_collision_is_midway_between_two_that_are_visible() -> None:
    boxes, presence = some_boxes()
    pairs = torch.zeros(2, 8, 8)
    for i, j in ((0, 2), (1, 5)):  # the sixth slot is empty
        pairs[0, i, j] = pairs[0, j, i] = 1
    places, there = contacts(boxes, presence, pairs)
    assert there.sum() == 1
    found = places[0, there[0].bool()][0]
    torch.testing.assert_close(
        (found[:2] + found[2:]) / 2, (boxes[0, 0].reshape(2, 2) + boxes[0, 2].reshape(2, 2)).mean(0) / 2
    )
    torch.testing.assert_close(found[2:] - found[:2], (boxes[0, [0, 2], 2:] - boxes[0, [0, 2], :2]).mean(0))


def test_the_error_of_collisions_forgives_the_frames_beside_it() -> None:
    boxes, presence = (part[:1, None].expand(1, 5, *part.shape[1:]) for part in some_boxes())
    pairs = torch.zeros(1, 5, 8, 8)
    pairs[0, 2, 0, 1] = pairs[0, 2, 1, 0] = 1
    places, there = contacts(boxes[0], presence[0], pairs[0])
    cell = int(centres(places, there, GRID, stride=STRIDE).cell[2, there[2].argmax()])

    def error(frame: int) -> float:
        """Of saying it in that frame on top of the right one."""
        logits = torch.full((1, 5, 1, *GRID), -8.0)
        for k in (2, frame):
            logits[0, k].view(-1)[cell] = 2.0
        return float(collision_error(logits, boxes, presence, pairs, torch.ones(1), stride=STRIDE))

    right, beside, off = error(2), error(3), error(4)
    p = torch.tensor(2.0).sigmoid()
    assert right == pytest.approx(float(-((1 - p) ** 2) * p.log()), abs=1e-3)
    false = CONTACT_HALF_AT / (1 - CONTACT_HALF_AT) * float(-(p**2) * (1 - p).log())
    assert beside - right == pytest.approx((1 - BESIDE) ** 4 * false, rel=1e-3)
    assert off - right == pytest.approx(false, rel=1e-3)


def test_unlabelled_windows_do_not_matter() -> None:
    boxes, presence = some_boxes()
    torch.manual_seed(0)
    head, features = DetectionHead(4, 8), torch.randn(2, 4, *GRID, requires_grad=True)
    labelled = torch.tensor([1.0, 0.0])
    error = detection_error(head(features), boxes, presence, labelled, stride=STRIDE)
    other, absent = boxes.clone(), presence.clone()
    other[1], absent[1] = 0, 0
    assert torch.equal(error, detection_error(head(features), other, absent, labelled, stride=STRIDE))
    alone = detection_error(head(features[:1]), boxes[:1], presence[:1], labelled[:1], stride=STRIDE)
    torch.testing.assert_close(error, alone)
    error.backward()
    assert features.grad is not None
    assert features.grad[0].abs().sum() > 0
    assert features.grad[1].abs().sum() == 0


def test_without_labels_the_terms_are_zero_and_so_are_their_gradients() -> None:
    boxes, presence = some_boxes()
    features, none = torch.randn(2, 4, *GRID, requires_grad=True), torch.zeros(2)
    error = detection_error(DetectionHead(4, 8)(features), boxes, presence, none, stride=STRIDE)
    contact = CollisionHead(4, 8)(features)[:, None]
    error = error + collision_error(
        contact, boxes[:, None], presence[:, None], torch.ones(2, 1, 8, 8), none, stride=STRIDE
    )
    error.backward()
    assert error == 0
    assert features.grad is not None
    assert features.grad.abs().sum() == 0


def test_a_perfect_head_costs_almost_nothing_and_a_silent_one_much() -> None:
    boxes, presence = some_boxes()
    perfect = exact_maps(boxes, presence)
    silent = CentreMaps(torch.full_like(perfect.heat_logits, -6.0), perfect.offset, perfect.log_size)
    errors = [float(detection_error(m, boxes, presence, torch.ones(2), stride=STRIDE)) for m in (perfect, silent)]
    assert errors[0] < 0.3
    assert errors[1] > 5


def test_decode_pads_and_stays_in_the_picture() -> None:
    maps = CentreMaps(torch.zeros(1, 1, 1, 2), torch.full((1, 2, 1, 2), -9.0), torch.full((1, 2, 1, 2), 99.0))
    boxes, presence = decode(maps, 5, stride=STRIDE)
    assert boxes.shape == (1, 5, 4)
    assert (presence[0, 2:] == 0).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([16.0, 8.0, 16.0, 8.0])).all()
    assert (boxes[..., 2:] >= boxes[..., :2]).all()


def test_slots_follow_their_objects_past_each_other_and_through_hiding() -> None:
    steps, generator = 10, torch.Generator().manual_seed(0)
    boxes, presence = torch.zeros(1, steps, 8, 4), torch.rand(1, steps, 8, generator=generator) * 0.05
    owner = torch.full((steps, 8), -1)
    for k in range(steps):
        order = torch.randperm(8, generator=generator)
        # Two objects cross on parallel lanes; the second is hidden in steps 4 and 5.
        for name, (x, y) in enumerate([(30 + 10 * k, 40), (120 - 10 * k, 80)]):
            if name == 1 and k in (4, 5):
                continue
            slot = int(order[name])
            boxes[0, k, slot] = torch.tensor([x - 10, y - 10, x + 10, y + 10]).float()
            presence[0, k, slot], owner[k, slot] = 0.9, name
    linked, sure = link(boxes, presence)
    assert torch.equal(sure.sort(-1).values, presence.sort(-1).values)
    for name, y in enumerate([40, 80]):
        slot = int((owner[0] == name).nonzero())
        for k in range(steps):
            if name == 1 and k in (4, 5):
                continue
            assert sure[0, k, slot] > 0.8
            assert float(linked[0, k, slot, 1]) + 10 == y
