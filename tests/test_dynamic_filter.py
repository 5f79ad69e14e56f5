"""Filters made for each cell: against a slow version, and what the head on top of them starts as."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.dynamic_filter import NextLatentHead, mix_neighbours, offsets


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_mix(source: Tensor, weights: Tensor, kernel: int) -> Tensor:
    b, _, h, w = source.shape
    out, r = source.clone(), kernel // 2
    for i in range(b):
        for y in range(h):
            for x in range(w):
                tap = 0
                for dy in range(-r, r + 1):
                    for dx in range(-r, r + 1):
                        if dy or dx:
                            near = source[i, :, min(max(y + dy, 0), h - 1), min(max(x + dx, 0), w - 1)]
                            out[i, :, y, x] += weights[i, tap, y, x] * (near - source[i, :, y, x])
                            tap += 1
    return out


def test_mixing_is_the_slow_one() -> None:
    source, weights = noise(2, 3, 5, 6), noise(2, 24, 5, 6, seed=1)
    torch.testing.assert_close(mix_neighbours(source, weights, 5), slow_mix(source, weights, 5), atol=1e-5, rtol=1e-5)


def test_gradients_of_mixing_are_those_of_the_slow_one() -> None:
    results = []
    for mix in (mix_neighbours, slow_mix):
        source, weights = noise(1, 2, 4, 5).requires_grad_(), noise(1, 8, 4, 5, seed=1).requires_grad_()
        (mix(source, weights, 3) * noise(1, 2, 4, 5, seed=2)).sum().backward()
        results.append((source.grad, weights.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_one_tap_is_a_displacement() -> None:
    source, weights = noise(1, 2, 6, 8), torch.zeros(1, 24, 6, 8)
    weights[:, offsets(5).index((1, -2))] = 1
    moved = mix_neighbours(source, weights, 5)
    torch.testing.assert_close(moved[:, :, :5, 2:], source[:, :, 1:, :6])


def test_a_missing_tap_is_an_error() -> None:
    with pytest.raises(ValueError, match="9 weights per cell; a kernel of 3 takes 8"):
        mix_neighbours(noise(1, 1, 4, 4), noise(1, 9, 4, 4), 3)


@pytest.mark.parametrize("kernel", [0, 3])
def test_the_head_starts_at_the_present(kernel: int) -> None:
    present = noise(1, 4, 6, 6)
    assert torch.equal(NextLatentHead(8, 4, kernel=kernel)(noise(1, 8, 6, 6, seed=1), present), present)


def test_a_closed_gate_keeps_a_cell_as_it_is() -> None:
    head, present = NextLatentHead(8, 4, kernel=3), noise(1, 4, 6, 6)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3)
        moved = head(noise(1, 8, 6, 6, seed=1), present)
        head.gate.weight.zero_()
        torch.nn.init.constant_(head.gate.bias, -200.0)  # pyright: ignore[reportArgumentType]
        kept = head(noise(1, 8, 6, 6, seed=1), present)
    assert not torch.allclose(moved, present, atol=0.1)
    assert torch.equal(kept, present)


def test_filters_cannot_amplify_much() -> None:
    head, present = NextLatentHead(8, 4, kernel=3), noise(1, 4, 6, 6)
    with torch.no_grad():
        head.filters.weight.copy_(100 * noise(8, 8, 1, 1, seed=2))  # pyright: ignore[reportOptionalMemberAccess]
        out = head(noise(1, 8, 6, 6, seed=1), present)
    # Weights of at most 1 in sum, half of it through the open gate, of differences of at most twice the largest.
    assert (out - present).abs().max() <= present.abs().max()


def test_an_even_kernel_has_no_centre() -> None:
    with pytest.raises(ValueError, match="kernel is 4; it must be odd"):
        NextLatentHead(8, 4, kernel=4)
