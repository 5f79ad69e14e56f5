"""Attention against a slow, obvious version; memory, window and causality."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from models.attention import LONGEST, CausalAttention, SpaceTimeBlock, SpatialAttention, causal_window, rotate

Module = TypeVar("Module", bound=torch.nn.Module)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: Module) -> Module:
    """Away from the zeros at which branches start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def slow_attention(layer: SpatialAttention | CausalAttention, x: Tensor, window: int | None) -> Tensor:
    """One sequence (length, channels), one query, one head, one key at a time."""
    length, channels = x.shape
    each = channels // layer.heads
    projected = layer.enter(x)
    mixed = torch.zeros(length, channels)
    for head in range(layer.heads):
        queries, keys, values = (
            projected[:, part * channels + head * each : part * channels + (head + 1) * each] for part in range(3)
        )
        for i in range(length):
            seen = [j for j in range(length) if window is None or 0 <= i - j < window]
            scores = []
            for j in seen:
                query, key = queries[i], keys[j]
                if window is not None:
                    query, key = slow_rotation(query, i), slow_rotation(key, j)
                scores.append((query @ key) / math.sqrt(each))
            shares = torch.softmax(torch.stack(scores), 0)
            mixed[i, head * each : (head + 1) * each] = sum(
                (share * values[j] for share, j in zip(shares, seen, strict=True)), start=torch.zeros(each)
            )
    return layer.leave(mixed)


def slow_rotation(vector: Tensor, position: int) -> Tensor:
    out, half = vector.clone(), len(vector) // 2
    for i in range(half):
        turn = complex(math.cos(angle := position / LONGEST ** (i / half)), math.sin(angle))
        turned = complex(float(vector[i]), float(vector[i + half])) * turn
        out[i], out[i + half] = turned.real, turned.imag
    return out


@torch.no_grad()
def test_spatial_attention_is_the_slow_one() -> None:
    layer, x = shaken(SpatialAttention(8, 2)), noise(3, 5, 8)
    expected = torch.stack([slow_attention(layer, sequence, None) for sequence in x])
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_causal_attention_is_the_slow_one() -> None:
    layer, x = shaken(CausalAttention(8, 2, window=3)), noise(2, 6, 8)
    expected = torch.stack([slow_attention(layer, sequence, 3) for sequence in x])
    torch.testing.assert_close(layer(x, None)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_frames_one_by_one_are_as_all_at_once() -> None:
    block, tokens = shaken(SpaceTimeBlock(8, 2, window=3)), noise(2, 7, 4, 8)
    at_once, _ = block(tokens, None)
    pieces, past = [], None
    for part in tokens.split([3, 1, 1, 2], dim=1):
        out, past = block(part, past)
        pieces.append(out)
        assert past.keys.shape[2] <= 2  # window - 1: all that the next frame may see
    torch.testing.assert_close(torch.cat(pieces, dim=1), at_once, atol=1e-5, rtol=1e-5)
    assert past is not None
    assert past.frames == 7


@torch.no_grad()
def test_a_frame_reaches_itself_and_later_ones_within_the_window() -> None:
    layer, x = shaken(CausalAttention(8, 2, window=3)), noise(2, 7, 8)
    other = x.clone()
    other[:, 2] += 1
    changed = (layer(x, None)[0] != layer(other, None)[0]).any(2).any(0).tolist()
    assert changed == [False, False, True, True, True, False, False]


def test_rotation_leaves_relative_time_alone() -> None:
    query, key = noise(1, 1, 1, 8), noise(1, 1, 1, 8, seed=1)

    def product(i: int, j: int) -> Tensor:
        return (rotate(query, torch.tensor([i])) * rotate(key, torch.tensor([j]))).sum()

    torch.testing.assert_close(product(5, 3), product(12, 10), atol=1e-5, rtol=1e-5)
    assert not torch.isclose(product(5, 3), product(5, 4))
    torch.testing.assert_close(rotate(query, torch.tensor([7])).norm(), query.norm())


def test_the_window_by_hand() -> None:
    allowed = causal_window(torch.tensor([3, 4]), torch.tensor([1, 2, 3, 4]), 2)
    assert allowed.tolist() == [[False, True, True, False], [False, False, True, True]]


def test_a_block_starts_as_the_identity() -> None:
    tokens = noise(1, 2, 3, 8)
    assert torch.equal(SpaceTimeBlock(8, 2, window=4)(tokens, None)[0], tokens)
