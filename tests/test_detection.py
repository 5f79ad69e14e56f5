"""Objects as points: boxes survive the grid, losses agree with slow obvious ones, slots keep their object."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.detection import (
    CentreMaps,
    DetectionHead,
    centres,
    decode,
    detection_error,
    focal_error,
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


def test_focal_error_is_the_papers_formula() -> None:
    logits, target = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([1.0, 0.0, 1.0])
    total = 0.0
    for p, y in zip(logits.sigmoid().tolist(), target.tolist(), strict=True):
        p_true, weight = (p, 0.8) if y else (1 - p, 1 - 0.8)
        total -= weight * (1 - p_true) ** 2 * math.log(p_true)
    assert float(focal_error(logits, target, torch.ones(3), alpha=0.8)) == pytest.approx(total / 3, rel=1e-5)


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
    features, logits = torch.randn(2, 4, *GRID, requires_grad=True), torch.randn(2, requires_grad=True)
    none = torch.zeros(2)
    error = detection_error(DetectionHead(4, 8)(features), boxes, presence, none, stride=STRIDE)
    error = error + focal_error(logits, torch.ones(2), none)
    error.backward()
    assert error == 0
    for value in (features, logits):
        assert value.grad is not None
        assert value.grad.abs().sum() == 0


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
