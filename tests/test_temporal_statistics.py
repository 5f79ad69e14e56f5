"""Metrics of how frames follow one another: known answers and slow definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.metrics import score
from models.statistics import Statistic, state_of
from models.temporal_statistics import consistency_statistics, perceptual_statistics, smoothness_statistics

H, W = 48, 64


def steps_of(statistics: dict[str, Statistic], name: str) -> list[float]:
    state = state_of(np.arange(len(next(iter(statistics.values())).total)), statistics)
    return [e.value for e in score(state, np.random.default_rng(0), names=[name])[name].steps]


def colours(frames: Tensor) -> Tensor:
    return frames.mean(dim=(2, 3))


def apart(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean(dim=(1, 2, 3))


def plain(*values: float) -> Tensor:
    """A film of one window whose frames have one brightness each."""
    return torch.tensor(values)[None, :, None, None, None].expand(1, -1, 3, H, W).contiguous()


def test_tlpips_is_the_difference_of_changes() -> None:
    truth, said, last = plain(0.1, 0.3), plain(0.1, 0.1), plain(0.0)[:, 0]
    found = perceptual_statistics(apart, said, truth, last)
    assert steps_of(found, "tlpips") == pytest.approx([0.0, 0.2], abs=1e-6)
    assert steps_of(found, "lpips") == pytest.approx([0.0, 0.2], abs=1e-6)
    late = perceptual_statistics(apart, plain(0.3, 0.5), plain(0.1, 0.3), last)
    assert steps_of(late, "tlpips") == pytest.approx([0.2, 0.0], abs=1e-6), "an offset that stays is no flicker"


def test_consistency_is_vbenchs() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, truth = torch.rand(2, 3, 3, 8, 8, generator=generator), torch.rand(2, 3, 3, 8, 8, generator=generator)
    last = torch.rand(2, 3, 8, 8, generator=generator)
    found = consistency_statistics(colours, "subject_consistency", prediction, truth, last)
    for suffix, film in (("", prediction), ("_true", truth)):
        slow = np.zeros((2, 3))
        for b in range(2):
            vectors = [v / np.linalg.norm(v) for v in [colours(last[b : b + 1])[0].numpy(), *colours(film[b]).numpy()]]
            for k in range(1, 4):
                slow[b, k - 1] = (vectors[0] @ vectors[k] + vectors[k - 1] @ vectors[k]) / 2
        assert steps_of(found, f"subject_consistency{suffix}") == pytest.approx(slow.mean(axis=0).tolist(), abs=1e-6)


def test_a_frozen_film_is_consistent_and_smooth() -> None:
    last = torch.rand(1, 3, H, W, generator=torch.Generator().manual_seed(1))
    frozen = last[:, None].repeat(1, 5, 1, 1, 1)
    assert steps_of(consistency_statistics(colours, "background_consistency", frozen, frozen, last),
                    "background_consistency") == pytest.approx([1.0] * 5, abs=1e-9)  # fmt: skip
    smooth = steps_of(smoothness_statistics(frozen, frozen, last), "motion_smoothness")
    assert smooth[:4] == pytest.approx([1.0] * 4, abs=1e-6)
    assert np.isnan(smooth[4]), "the last frame has no neighbour behind it"


def test_even_motion_is_smoother_than_uneven_motion() -> None:
    generator = torch.Generator().manual_seed(2)
    rough = torch.rand(1, 3, H // 4, W // 2, generator=generator)
    texture = torch.nn.functional.interpolate(rough, (H, 2 * W), mode="bilinear")[0]

    def film(*lefts: int) -> Tensor:
        return torch.stack([texture[:, :, left : left + W] for left in lefts])[None]

    last, even, uneven = film(0)[:, 0], film(2, 4, 6, 8), film(4, 4, 8, 8)
    found = smoothness_statistics(uneven, even, last)
    said, true = (steps_of(found, f"motion_smoothness{suffix}")[:3] for suffix in ("", "_true"))
    assert min(true) > 0.98
    assert max(said) < min(true) - 0.01
