"""Metrics against the packages that others use: scikit-image, torchmetrics, torchvision, mir_eval, lpips."""

from __future__ import annotations

import warnings
from pathlib import Path

import lpips
import mir_eval
import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as classification
import torchmetrics.functional.image as image
import torchvision
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.pairwise import pairwise_euclidean_distance

from models.metrics import score
from models.object_statistics import BINS_PER_LOGIT, box_iou, collision_histograms, collision_statistics
from models.perceptual import load_lpips
from models.statistics import flow_statistics, picture_statistics, ssim, state_of, visibility_statistics
from models.temporal_statistics import perceptual_statistics


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def overall(statistics: dict, name: str, videos: int, histograms: dict | None = None) -> float:
    state = state_of(np.arange(videos), statistics, histograms)
    return score(state, np.random.default_rng(0), names=[name])[name].overall.value


def test_pictures() -> None:
    truth = random(4, 3, 3, 20, 24)
    said = (truth + 0.2 * random(4, 3, 3, 20, 24, seed=1)).clamp(0, 1)
    found = picture_statistics(said, truth, truth[:, 0])
    theirs = [[peak_signal_noise_ratio(truth[i, k].numpy(), said[i, k].numpy(), data_range=1) for k in range(3)]
              for i in range(4)]  # fmt: skip
    assert overall(found, "psnr_frame", 4) == pytest.approx(np.mean(theirs), rel=1e-6)
    pooled = [float(image.peak_signal_noise_ratio(said[:, k], truth[:, k], data_range=1.0)) for k in range(3)]
    assert overall(found, "psnr", 4) == pytest.approx(np.mean(pooled), rel=1e-5)
    # torchmetrics also averages windows over reflected pixels at the border; without these it is the same.
    _, full = image.structural_similarity_index_measure(
        said[:, 0].double(), truth[:, 0].double(), data_range=1.0, return_full_image=True
    )
    assert float(ssim(said[:, 0], truth[:, 0]).mean()) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-9)


def test_flow_and_visibility() -> None:
    said, truth = 4 * random(2, 3, 2, 8, 9) - 2, 4 * random(2, 3, 2, 8, 9, seed=1) - 2
    theirs = pairwise_euclidean_distance(
        said.movedim(2, -1).reshape(-1, 2), truth.movedim(2, -1).reshape(-1, 2)
    ).diagonal().mean()  # fmt: skip
    assert overall(flow_statistics(said, truth), "epe", 2) == pytest.approx(float(theirs), rel=1e-5)
    seen, true_seen = random(2, 1, 1, 8, 9, seed=2), random(2, 1, 1, 8, 9, seed=3)
    hidden = (seen <= 0.5).flatten(), (true_seen <= 0.5).flatten()
    found = visibility_statistics(seen, true_seen)
    for name, function in (
        ("nonvisible_f1", classification.binary_f1_score),
        ("nonvisible_precision", classification.binary_precision),
        ("nonvisible_recall", classification.binary_recall),
    ):
        assert overall(found, name, 2) == pytest.approx(float(function(*hidden)), rel=1e-6)


def test_boxes() -> None:
    corners = 30 * random(2, 1, 4, 2, 2)
    boxes = torch.cat([corners.amin(3), corners.amax(3)], dim=-1)
    theirs = torchvision.ops.box_iou(boxes[0, 0], boxes[1, 0])
    assert torch.allclose(box_iou(boxes[:1], boxes[1:])[0, 0], theirs, atol=1e-6)


def test_collisions_ranked() -> None:
    true = (random(20, 12) < 0.2).float()
    logits = ((random(20, 12, seed=1) * 8 - 5 + 2 * true) * BINS_PER_LOGIT).round() / BINS_PER_LOGIT
    probability = logits.double().sigmoid()
    # In torchmetrics a tie is one threshold, as here: equal probabilities must be equal bits.
    theirs = classification.binary_average_precision(probability.flatten(), true.flatten().long())
    found = overall(
        collision_statistics(probability.float(), true, frame_stride=2),
        "collision_ap",
        20,
        collision_histograms(probability.float(), true),
    )
    assert found == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("tolerance", [2, 5])
def test_collisions_in_time(tolerance: int) -> None:
    rng, stride = np.random.default_rng(0), 2
    for _ in range(20):
        true, said = (torch.from_numpy(rng.random((1, 24)) < 0.15).float() for _ in range(2))
        apart = said * (torch.arange(24) % 2)  # alone at their steps: each is a peak
        if not true.any() or not apart.any():
            continue
        statistics = collision_statistics(apart, true, frame_stride=stride)
        events = [np.flatnonzero(x[0].numpy()) * float(stride) for x in (true, apart)]
        theirs, _, _ = mir_eval.onset.f_measure(*events, window=float(tolerance))
        assert overall(statistics, f"collision_f1_{tolerance}", 1) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.real
def test_lpips_through_time(shared: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network = lpips.LPIPS(net="squeeze", pnet_rand=True, pretrained=False, verbose=False).eval()
    weights = shared / "weights/lpips_squeeze.pt"
    network.load_state_dict(torch.load(weights, weights_only=True))
    said, true, last = random(1, 2, 3, 64, 64), random(1, 2, 3, 64, 64, seed=1), random(1, 3, 64, 64, seed=2)
    found = perceptual_statistics(load_lpips(weights), said, true, last)

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        with torch.no_grad():
            return float(network(a, b, normalize=True))

    theirs = [
        abs(apart(last, said[:, 0]) - apart(last, true[:, 0])),
        abs(apart(said[:, 0], said[:, 1]) - apart(true[:, 0], true[:, 1])),
    ]
    assert overall(found, "tlpips", 1) == pytest.approx(np.mean(theirs), rel=1e-4)
