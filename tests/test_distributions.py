"""FVD and JEDi: distances from moments against slow definitions, and their networks' files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from data.errors import EmptyError, WeightsError
from models.distributions import frechet_distance, polynomial_discrepancy
from models.metrics import paired_difference, score
from models.statistics import Moments, Statistic, from_json, merge, moments_of, state_of
from models.video_features import VJepa, load_i3d, load_vjepa


def features(n: int, d: int = 6, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(9))
    return torch.randn(n, d, generator=generator) @ mixing + shift


def test_frechet_distance_is_that_of_cd_fvd() -> None:
    a, b = features(200), 1.3 * features(150, seed=1, shift=0.4)
    found = frechet_distance(moments_of(a), moments_of(b))
    x, y = a.double().numpy(), b.double().numpy()
    cov = [np.cov(z, rowvar=False, bias=True) for z in (x, y)]
    root = scipy.linalg.sqrtm(cov[0] @ cov[1])
    slow = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov[0] + cov[1] - 2 * np.real(root))
    assert found == pytest.approx(slow, rel=1e-8)
    stats = pytest.importorskip("cdfvd.utils.metric_utils", reason="needs cd-fvd: pip install 'clevrcast[fvd]'")
    theirs = [stats.FeatureStats(capture_mean_cov=True) for _ in range(2)]
    for held, values in zip(theirs, (a, b), strict=True):
        held.append_torch(values, num_gpus=1, rank=0)
    (mean_a, cov_a), (mean_b, cov_b) = (held.get_mean_cov() for held in theirs)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    assert found == pytest.approx(
        ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(root)), rel=1e-6
    )


def test_known_distances() -> None:
    a = moments_of(features(50))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    shifted = moments_of(features(50, shift=2.0))
    assert frechet_distance(a, shifted) == pytest.approx(6 * 4, rel=1e-5), "only the means differ, by 2 in each of 6"
    assert polynomial_discrepancy(a, a) == 0
    with pytest.raises(EmptyError, match="found 1 and 50"):
        frechet_distance(moments_of(features(1)), a)


def test_polynomial_discrepancy_is_the_mean_over_all_pairs() -> None:
    x, y = features(7).double().numpy(), features(9, seed=1).double().numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([(np.dot(p, q) / len(p)) ** 2 for p in a for q in b]))

    found = polynomial_discrepancy(moments_of(torch.tensor(x)), moments_of(torch.tensor(y)))
    assert found == pytest.approx(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y), rel=1e-9)


def test_moments_merge_and_survive_the_file() -> None:
    whole, table = features(30), Statistic(np.ones((1, 2)), np.ones((1, 2)))
    true = moments_of(features(30, seed=4))

    def state(video: int, part: Moments, truth: Moments):
        return state_of(np.array([video]), {"ssim": table}, moments={"fvd_said": part, "fvd_true": truth})

    parts = [state(i, moments_of(chunk), moments_of(features(30, seed=4)[10 * i : 10 * i + 10]))
             for i, chunk in enumerate(whole.split(10))]  # fmt: skip
    merged = from_json(merge(*parts).to_json())
    found = score(merged, np.random.default_rng(0))["fvd"]
    assert found.overall.value == pytest.approx(frechet_distance(moments_of(whole), true), rel=1e-6)
    assert np.isnan(found.overall.low)
    assert found.steps == ()
    assert paired_difference(merged, merged, "fvd", np.random.default_rng(0)).overall.value == 0


class Toy(nn.Module):
    """Stands in for an encoder of films: the mean over pixels, per frame and colour."""

    def forward(self, films: Tensor) -> Tensor:
        return films.mean(dim=(3, 4)).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1, keepdim=True)


def test_films_of_another_length_are_refused() -> None:
    network = VJepa(Toy(), Mean(), frames=4)
    films = torch.full((2, 4, 3, 30, 40), 0.485)
    assert network(films).shape == (2, 3)
    assert float(network(films)[0, 0]) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="films of 4 frames, context included, got 3"):
        network(films[:, :3])


def test_i3d_reads_its_file_and_sees_what_cd_fvd_sees(tmp_path: Path) -> None:
    module = pytest.importorskip(
        "cdfvd.third_party.i3d.pytorch_i3d", reason="needs cd-fvd: pip install 'clevrcast[fvd]'"
    )
    utils = pytest.importorskip("cdfvd.third_party.i3d.utils")
    torch.manual_seed(0)
    torch.save(module.InceptionI3d(400, in_channels=3).state_dict(), tmp_path / "i3d.pt")
    network = load_i3d(tmp_path / "i3d.pt")
    films = torch.rand(1, 9, 3, 24, 32)
    shown = films.mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    with torch.inference_mode():
        theirs = network.network(utils.preprocess_i3d(shown))
    assert torch.allclose(network(films), theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at least 9 frames, context included, got 8"):
        network(films[:, :8])
    (tmp_path / "broken.pt").write_bytes(b"half of it")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_i3d(tmp_path / "broken.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="does not fit"):
        load_i3d(tmp_path / "other.pt")


def test_weights_that_are_absent_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"(?s)vjepa.*--no-deps|no file .*vith16\.pth\.tar"):
        load_vjepa(tmp_path, "vit_tiny")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_vjepa_reads_its_files(tmp_path: Path) -> None:
    models = pytest.importorskip(
        "vjepa.models.vision_transformer", reason="needs vjepa: pip install --no-deps vjepa==0.1.2"
    )
    pooling = pytest.importorskip("vjepa.models.attentive_pooler")
    torch.manual_seed(0)
    encoder = models.vit_tiny(
        img_size=224, patch_size=16, num_frames=16, tubelet_size=2, uniform_power=True, use_sdpa=True
    )
    probe = pooling.AttentiveClassifier(
        embed_dim=encoder.embed_dim, num_heads=encoder.num_heads, depth=1, num_classes=174
    )
    weights = {f"module.backbone.{k}": v for k, v in encoder.state_dict().items()}
    torch.save({"target_encoder": weights, "epoch": 1}, tmp_path / "vith16.pth.tar")
    torch.save(
        {"classifier": {f"module.{k}": v for k, v in probe.state_dict().items()}}, tmp_path / "ssv2-probe.pth.tar"
    )
    network = load_vjepa(tmp_path, "vit_tiny")
    films = torch.rand(1, 16, 3, 32, 48)
    assert network(films).shape == (1, encoder.embed_dim)
    torch.save({"target_encoder": {}}, tmp_path / "vith16.pth.tar")
    with pytest.raises(WeightsError, match="is missing"):
        load_vjepa(tmp_path, "vit_tiny")
