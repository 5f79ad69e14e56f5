"""Loss terms: known answers, and that the lazy answer does not win."""

from __future__ import annotations

import pytest
import torch

from models.losses import (
    COPYING_FLOOR,
    Norm,
    charbonnier,
    copying_error,
    flow_error,
    foreground_weight,
    latent_error,
    relative_latent_error,
    visibility_error,
    weighted_mean,
)


def test_charbonnier_is_nearly_the_absolute_value() -> None:
    d = torch.tensor([-2.0, -0.5, 0.0, 1.0])
    torch.testing.assert_close(charbonnier(d), d.abs(), atol=1.1e-3, rtol=0)
    zero = torch.zeros(3, requires_grad=True)
    charbonnier(zero).sum().backward()
    assert zero.grad is not None
    assert torch.equal(zero.grad, torch.zeros(3))


def test_weighted_mean_by_hand() -> None:
    value = torch.tensor([1.0, 3.0, 5.0, 7.0]).reshape(1, 1, 2, 2)
    weight = torch.tensor([1.0, 0.0, 0.0, 3.0]).reshape(1, 1, 2, 2)
    assert weighted_mean(value, weight) == (1 + 21) / 4
    assert weighted_mean(value, torch.zeros_like(weight)) == 0


def test_latent_error_counts_what_shows() -> None:
    gain = torch.tensor([3.0, 0.1])
    loud, faint = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    loud[:, 0], faint[:, 1] = 1, 1
    nothing = torch.zeros(1, 2, 1, 1)
    ratio = latent_error(loud, nothing, gain) / latent_error(faint, nothing, gain)
    torch.testing.assert_close(ratio.squeeze(), torch.tensor(900.0))
    noise = torch.randn(2, 64, 40, 40, generator=torch.Generator().manual_seed(0))
    other = torch.randn(2, 64, 40, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(latent_error(noise, other, torch.ones(64)).mean(), torch.tensor(2.0), rtol=0.02, atol=0)


def test_the_absolute_latent_error_by_hand() -> None:
    predicted, target = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    error = latent_error(
        predicted[None, :, None, None], target[None, :, None, None], torch.tensor([3.0, 1.0]), norm="l1"
    )
    torch.testing.assert_close(error.squeeze(), torch.tensor((1 * 1.5 + 3 * 0.5) / 2))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_relative_error_is_one_for_copying_and_zero_for_the_truth(norm: Norm) -> None:
    last, target = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2))
    gain = torch.tensor([1.0, 2.0, 3.0])
    assert relative_latent_error(target, target, last, gain, norm=norm) == 0
    copying = copying_error(last, target, gain, norm=norm)
    expected = (copying - COPYING_FLOOR) / copying
    torch.testing.assert_close(relative_latent_error(last, target, last, gain, norm=norm), expected)
    assert relative_latent_error(target, target, target, gain, norm=norm) == 0


def test_predicting_no_motion_costs_as_much_as_the_objects_move() -> None:
    teacher = torch.zeros(1, 2, 20, 20)
    teacher[:, 0, 5:8, 5:8] = 2.0
    still = flow_error(torch.zeros_like(teacher), teacher, background=0.0)
    torch.testing.assert_close(still, torch.tensor(2.0), atol=0.02, rtol=0)
    assert flow_error(teacher, teacher) < 1e-6


def test_all_visible_does_not_win() -> None:
    visible = torch.full((1, 1, 50, 50), 0.98)  # as a teacher's is where nothing happens
    visible[..., 10:13, 10:13] = 0.02
    constants = [float(visibility_error(torch.full_like(visible, logit), visible)) for logit in (-3.0, 0.0, 3.0, 6.0)]
    half_found = torch.full_like(visible, 9.0)
    half_found[..., 10:13, 10:12] = -9.0
    truth = torch.where(visible > 0.5, 9.0, -9.0)
    assert visibility_error(truth, visible) < 0.2
    assert visibility_error(truth, visible) < visibility_error(half_found, visible) < 0.5 < 0.8 < min(constants)


def test_without_hidden_cells_all_visible_is_right() -> None:
    logits, visible = torch.full((1, 1, 8, 8), 6.0), torch.ones(1, 1, 8, 8)
    assert 0 <= visibility_error(logits, visible) < 0.2
    assert visibility_error(logits, visible) < visibility_error(-logits, visible)


def test_undecided_cells_do_not_count() -> None:
    visible = torch.full((1, 1, 8, 8), 0.5)
    logits = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(visibility_error(logits, visible), torch.tensor(0.0))


def test_foreground_is_what_differs_from_the_median_picture() -> None:
    pictures = torch.full((5, 3, 16, 16), 0.5)
    for k in range(5):
        pictures[k, :, 3 * k : 3 * k + 2, 4:6] = 0.9
    weight = foreground_weight(pictures, 10.0)
    assert weight.shape == (5, 1, 16, 16)
    assert weight[0, 0, 0, 4] > 9
    assert weight[0, 0, 10, 10] == 1
    assert weight[0, 0, 3, 4] == 1  # an object in another video
