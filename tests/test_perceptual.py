"""LPIPS: the lpips package's own numbers, gradients of the pictures only, weights that do not fit."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from data.errors import WeightsError
from models.perceptual import Perceptual, load_lpips


def noise(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def perceptual(shared: Path) -> Perceptual:
    return load_lpips(shared / "weights/lpips_squeeze.pt")


@pytest.mark.real
def test_it_is_the_distance_of_the_lpips_package(perceptual: Perceptual, shared: Path) -> None:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="squeeze", pnet_rand=True, pretrained=False, verbose=False)
    theirs.load_state_dict(torch.load(shared / "weights/lpips_squeeze.pt", weights_only=True))
    a, b = noise(0), (noise(0) + 0.3 * noise(1)).clamp(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(perceptual(a, b), theirs(a, b, normalize=True).flatten())


@pytest.mark.real
def test_a_worse_picture_is_further_away(perceptual: Perceptual) -> None:
    # A ramp with a square: blur and noise are seen, and more of either is seen more.
    picture = torch.linspace(0.3, 0.6, 64)[:, None].expand(1, 3, 64, 96).clone()
    picture[:, 0, 20:40, 30:50] = 0.9
    found = [float(perceptual(picture, (picture + s * (noise(2)[:1] - 0.5)).clamp(0, 1))) for s in (0.0, 0.1, 0.4)]
    assert found[0] == 0
    assert 0 < found[1] < found[2]


@pytest.mark.real
def test_gradients_reach_the_pictures_and_are_finite_where_no_feature_is_active(perceptual: Perceptual) -> None:
    black = torch.zeros(1, 3, 64, 96, requires_grad=True)
    (perceptual(black, noise(3)[:1]) + perceptual(black, black)).sum().backward()
    assert black.grad is not None
    assert torch.isfinite(black.grad).all()
    assert black.grad.abs().sum() > 0
    assert all(p.grad is None for p in perceptual.parameters())


@pytest.mark.real
def test_dropout_stays_off_inside_a_module_that_trains(perceptual: Perceptual) -> None:
    around = torch.nn.Sequential(perceptual).train()
    assert not any(module.training for module in around[0].modules())


def test_no_random_number_is_used_up() -> None:
    torch.manual_seed(3)
    Perceptual()
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)


def test_weights_that_are_absent_or_of_another_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"there is no file .*absent\.pt"):
        load_lpips(tmp_path / "absent.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(
        WeightsError, match=r"other\.pt .*does not fit: lin0\.model\.1\.weight is missing.* and \d+ more"
    ):
        load_lpips(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(WeightsError, match=r"text\.pt cannot be read"):
        load_lpips(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match=r"list\.pt holds a list"):
        load_lpips(tmp_path / "list.pt")
