"""Blocks start as the identity, and matching finds a shift without training."""

from __future__ import annotations

import torch

from models.blocks import Matching, ResidualBlock, Trunk, coordinates, motion_stack


def test_a_residual_block_starts_as_the_identity() -> None:
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ResidualBlock(4, dilation=2)(x), x)


def test_the_trunk_keeps_the_grid() -> None:
    assert Trunk(5, 8, 3, blocks=2, coarsen=4)(torch.zeros(2, 5, 16, 24)).shape == (2, 3, 16, 24)


def test_coordinates_run_from_left_to_right_and_down() -> None:
    grid = coordinates(torch.zeros(1, 7, 3, 5))
    assert grid[0, 0, 0].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert grid[0, 1, :, 0].tolist() == [-1.0, 0.0, 1.0]


def test_the_motion_stack_holds_the_present_and_the_changes_before_it() -> None:
    a, b, c = (torch.full((1, 1, 2, 2), value) for value in (1.0, 3.0, 7.0))
    assert motion_stack([a, b, c], 3)[0, :, 0, 0].tolist() == [7.0, 4.0, 2.0, -1.0, -1.0]
    assert motion_stack([a, b], 4)[0, :, 0, 0].tolist() == [3.0, 2.0, 0.0, 0.0, -1.0, -1.0]


def test_matching_points_from_the_present_back_to_the_previous_latent() -> None:
    previous = torch.zeros(1, 3, 24, 32)
    previous[:, :, 8:16, 8:16] = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    present = previous.roll((2, 4), dims=(2, 3))  # two cells down, four to the right
    found = Matching(3)(present, previous, torch.full((3,), 0.3))
    inside = found[0, :2, 12:16, 14:18].mean((1, 2))
    torch.testing.assert_close(inside, torch.tensor([-4.0, -2.0]), atol=0.3, rtol=0)
    assert found[0, :2, :4, :].abs().max() < 0.3
