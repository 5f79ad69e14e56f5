"""Probes of leakage on data of which the answer is known."""

from __future__ import annotations

import torch

from models.leakage import Cells, Leakage, neighbourhoods, probe, ridge


def leak(told_of: str) -> Leakage:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(3000, 6, generator=generator)
    noise = torch.randn(3000, 2, generator=generator)
    told = {
        "linear": torch.stack([2 * seen[:, 0] - seen[:, 3] + 5, seen[:, 1]], 1),
        "product": torch.stack([seen[:, 0] * seen[:, 1], seen[:, 2].square()], 1),
        "nothing": noise,
        "half": seen[:, :2] + noise,
    }[told_of]
    return probe(Cells(seen[:2000], told[:2000]), Cells(seen[2000:], told[2000:]), generator)


def test_what_depends_linearly_is_told_by_both() -> None:
    found = leak("linear")
    assert found.linear > 0.999
    assert found.network > 0.98


def test_what_depends_by_products_is_told_by_the_network_alone() -> None:
    found = leak("product")
    assert abs(found.linear) < 0.05
    assert found.network > 0.8


def test_what_is_independent_is_told_by_neither() -> None:
    found = leak("nothing")
    assert -0.2 < found.network < 0.05
    assert -0.05 < found.linear < 0.05


def test_half_of_the_variance_is_an_r_squared_of_one_half() -> None:
    assert abs(leak("half").linear - 0.5) < 0.05


def test_ridge_is_the_least_squares_solution() -> None:
    seen, told = torch.randn(50, 4), torch.randn(50, 3)
    expected = torch.linalg.lstsq(seen, told).solution
    torch.testing.assert_close(ridge(seen, told, penalty=0.0), expected, atol=1e-4, rtol=1e-4)


def test_a_neighbourhood_is_the_cells_around_it() -> None:
    code = torch.randn(2, 3, 5, 6)
    near = neighbourhoods(code)
    assert near.shape == (2, 5, 6, 27)
    torch.testing.assert_close(near[1, 2, 3].reshape(3, 3, 3), code[1, :, 1:4, 2:5])
    torch.testing.assert_close(near[0, 0, 0].reshape(3, 3, 3)[:, 0, 0], code[0, :, 0, 0])
