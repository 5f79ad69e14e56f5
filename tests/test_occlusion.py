"""Visibility against a per-pixel reference, known answers and hard limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.occlusion import visibility


def slow_visibility(flow_fwd: Tensor, flow_bwd: Tensor, a1: float, a2: float, softness: float) -> Tensor:
    """One pixel at a time, as the docstring of `visibility` says it."""
    p, _, h, w = flow_bwd.shape
    out = torch.zeros(p, h, w)
    for k in range(p):
        for y in range(h):
            for x in range(w):
                bx, by = flow_bwd[k, :, y, x].tolist()
                if not (-0.5 <= x + bx <= w - 0.5 and -0.5 <= y + by <= h - 0.5):
                    continue
                fx, fy = bilinear(flow_fwd[k], x + bx, y + by)
                mismatch = (bx + fx) ** 2 + (by + fy) ** 2
                tolerance = a1 * (bx**2 + by**2 + fx**2 + fy**2) + a2
                out[k, y, x] = 1 / (1 + math.exp((mismatch - tolerance) / (softness * tolerance)))
    return out


def bilinear(field: Tensor, x: float, y: float) -> tuple[float, float]:
    _, h, w = field.shape
    x, y = min(max(x, 0.0), w - 1.0), min(max(y, 0.0), h - 1.0)
    x0, y0 = math.floor(x), math.floor(y)
    value = torch.zeros(2)
    for column, weight_x in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
        for row, weight_y in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
            value += weight_x * weight_y * field[:, min(row, h - 1), min(column, w - 1)]
    return float(value[0]), float(value[1])


def moving_square(size: int, step: int, grid: int = 40) -> tuple[Tensor, Tensor]:
    """A square that moves ``step`` pixels right over a still background, starting at row 10, column 10."""
    flow_fwd, flow_bwd = torch.zeros(1, 2, grid, grid), torch.zeros(1, 2, grid, grid)
    flow_fwd[:, 0, 10 : 10 + size, 10 : 10 + size] = step
    flow_bwd[:, 0, 10 : 10 + size, 10 + step : 10 + step + size] = -step
    return flow_fwd, flow_bwd


def test_agrees_with_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    flow_fwd = 2 * torch.randn(2, 2, 11, 14, generator=generator)
    flow_bwd = -flow_fwd + 0.5 * torch.randn(2, 2, 11, 14, generator=generator)
    for a1, a2, softness in ((0.01, 0.5, 0.25), (0.05, 0.1, 1.0)):
        fast = visibility(flow_fwd, flow_bwd, alpha1=a1, alpha2=a2, softness=softness)
        torch.testing.assert_close(fast, slow_visibility(flow_fwd, flow_bwd, a1, a2, softness), atol=1e-4, rtol=0)


@pytest.mark.parametrize("step", [2, 5, 9])
def test_exactly_the_uncovered_strip_is_not_visible(step: int) -> None:
    size = 12
    visible = visibility(*moving_square(size, step))[0]
    uncovered = torch.zeros(40, 40, dtype=torch.bool)
    uncovered[10 : 10 + size, 10 : 10 + step] = True  # where the square stood and no longer stands, in t+1
    assert visible[uncovered].max() < 0.05
    assert visible[~uncovered].min() > 0.98


def test_pixels_from_outside_the_frame_are_not_visible() -> None:
    """Everything moves 3 right: the left 3 columns of t+1 were outside in t."""
    flow_fwd = torch.zeros(1, 2, 16, 20)
    flow_fwd[:, 0] = 3.0
    visible = visibility(flow_fwd, -flow_fwd)[0]
    assert visible[:, :3].max() == 0
    assert visible[:, 3:].min() > 0.98


def test_half_at_the_threshold_at_any_speed() -> None:
    for speed in (0.0, 4.0, 12.0):
        # |bwd + fwd|^2 = a1 (|bwd|^2 + |fwd|^2) + a2, solved for the mismatch m along y with a1 = 0.02, a2 = 0.3
        a1, a2 = 0.02, 0.3
        mismatch = math.sqrt((2 * a1 * speed**2 + a2) / (1 - a1))
        flow_bwd, flow_fwd = torch.zeros(1, 2, 9, 41), torch.zeros(1, 2, 9, 41)
        flow_bwd[:, 0], flow_fwd[:, 0], flow_fwd[:, 1] = -speed, speed, mismatch
        value = visibility(flow_fwd, flow_bwd, alpha1=a1, alpha2=a2)[0, 4, 20]
        torch.testing.assert_close(value, torch.tensor(0.5), atol=1e-4, rtol=0)


def test_hard_rule_as_softness_vanishes() -> None:
    generator = torch.Generator().manual_seed(3)
    flow_fwd = torch.randn(1, 2, 20, 20, generator=generator)
    hard = visibility(flow_fwd, -flow_fwd, softness=1e-6)
    assert set(hard.unique().tolist()) <= {0.0, 1.0}
    assert 0 < hard.mean() < 1


@pytest.mark.parametrize(("a1", "a2", "softness"), [(-0.1, 0.5, 0.2), (0.01, 0.0, 0.2), (0.01, 0.5, 0.0)])
def test_parameters_without_meaning_are_refused(a1: float, a2: float, softness: float) -> None:
    flow = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="softness > 0"):
        visibility(flow, flow, alpha1=a1, alpha2=a2, softness=softness)
