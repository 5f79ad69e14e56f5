"""Statistics of predictions: sums and counts per (video, step) that add up exactly.

A *statistic* is a quantity whose mean over pixels, frames and windows is meaningful (squared error, SSIM, end-point
error, counts of a confusion matrix). A *metric* (`models.metrics`) is computed from mean statistics and never
averaged itself. The split is that of Rasp et al., WeatherBench 2 / WeatherBench-X.

Totals are kept in float64 as multiples of 2**-32, so that adding them is exact as long as the total of one video and
step stays below 2**21: batches, shards, workers and restarts then combine to the same bits in any order. Larger
totals are merely accurate to float64. What was not measured has a count of zero or no entry, never a value of zero.

What has to be ranked over the whole set (average precision) is no mean of anything: such scores are counted in
*histograms*, which add up as exactly. Distances between distributions (FVD, JEDi) come from the *moments* of features,
which add up to float64. Boxes and collisions are in `models.object_statistics`, what follows frames through time in
`models.temporal_statistics`.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from data.errors import EmptyError, NonFiniteError, StoreError

VERSION = 2
"""Of what the names below stand for; raise it with a definition. States of two versions are never put together."""
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
FRAME_PSNR_CAP_DB = 100.0
PERCEPTUAL_CHUNK = 16
_GRID = 2.0**32


@dataclass(frozen=True)
class Statistic:
    """``total / count`` is the mean. Rows ``n`` are windows of a batch or videos of a `State`; ``y`` are steps."""

    total: Float64[np.ndarray, "n y"]
    count: Float64[np.ndarray, "n y"]


@dataclass(frozen=True)
class Moments:
    """Sums over ``count`` feature vectors: the vectors, and their outer products."""

    count: int
    total: Float64[np.ndarray, " d"]
    outer: Float64[np.ndarray, "d d"]

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)


def moments_of(features: Float[Tensor, "n d"]) -> Moments:
    """The moments of n feature vectors."""
    values = features.detach().double().cpu().numpy()
    return Moments(len(values), values.sum(axis=0), values.T @ values)


@dataclass(frozen=True)
class State:
    """What an evaluation remembers: one `Statistic` per name with one row per video (ids ascending, unique).

    ``histograms`` count scores in bins, of all steps together, with the same rows. ``moments`` are of features of whole
    windows of all videos together: they do not say which video gave what.
    """

    videos: Int64[np.ndarray, " v"]
    statistics: dict[str, Statistic]
    histograms: dict[str, Float64[np.ndarray, "v _"]] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)

    @property
    def horizon(self) -> int:
        return next(iter(self.statistics.values())).total.shape[1]

    def to_json(self) -> str:
        """Text from which `from_json` restores the same bits."""
        tables = {
            name: {"total": s.total.tolist(), "count": s.count.tolist()} for name, s in sorted(self.statistics.items())
        }
        histograms = {name: counts.astype(np.int64).tolist() for name, counts in sorted(self.histograms.items())}
        whole = {
            "version": VERSION,
            "videos": self.videos.tolist(),
            "statistics": tables,
            "histograms": histograms,
            "moments": {name: _packed(moments) for name, moments in sorted(self.moments.items())},
        }
        return json.dumps(whole, separators=(",", ":")) + "\n"


def from_json(text: str) -> State:
    """The inverse of `State.to_json`. Raises StoreError for statistics of another `VERSION`."""
    raw = json.loads(text)
    if (found := raw.get("version")) != VERSION:
        raise StoreError(
            f"these are statistics of version {found}, this code computes version {VERSION}: they cannot be compared",
            remedy="evaluate again: `dvc repro`",
        )
    tables = {
        name: Statistic(np.array(t["total"], dtype=np.float64), np.array(t["count"], dtype=np.float64))
        for name, t in raw["statistics"].items()
    }
    histograms = {name: np.array(counts, dtype=np.float64) for name, counts in raw["histograms"].items()}
    moments = {name: _unpacked(packed) for name, packed in raw["moments"].items()}
    return State(np.array(raw["videos"], dtype=np.int64), tables, histograms, moments)


def _packed(moments: Moments) -> dict[str, Any]:
    # Thousands of features make millions of products: as text they would take twenty bytes each.
    numbers = np.concatenate([moments.total[None], moments.outer]).astype("<f8")
    return {"count": moments.count, "numbers": base64.b64encode(zlib.compress(numbers.tobytes())).decode()}


def _unpacked(packed: Mapping[str, Any]) -> Moments:
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(packed["numbers"])), "<f8")
    side = round((numbers.size + 0.25) ** 0.5 - 0.5)  # numbers are side * (side + 1)
    table = numbers.reshape(side + 1, side).astype(np.float64)
    return Moments(packed["count"], table[0], table[1:])


def state_of(
    videos: Int[np.ndarray, " n"],
    statistics: Mapping[str, Statistic],
    histograms: Mapping[str, Float64[np.ndarray, "n _"]] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> State:
    """Sums the rows that belong to one video. ``videos[i]`` is the id behind row ``i``; at least one row."""
    if len(videos) == 0 or not statistics:
        raise EmptyError("no window was measured", remedy="check the split, the window stride and the horizon")
    ids, row = np.unique(videos.astype(np.int64), return_inverse=True)

    def grouped(values: Float64[np.ndarray, "n y"]) -> Float64[np.ndarray, "v y"]:
        out = np.zeros((len(ids), values.shape[1]))
        np.add.at(out, row, values)
        return out

    return State(
        ids,
        {name: Statistic(grouped(s.total), grouped(s.count)) for name, s in statistics.items()},
        {name: grouped(counts) for name, counts in (histograms or {}).items()},
        dict(moments or {}),
    )


def merge(*states: State) -> State:
    """The state of all windows behind ``states``. What one of them lacks counts zero there.

    Raises `EmptyError` without states and `ValueError` where horizons differ.
    """
    if not states:
        raise EmptyError("there is no evaluation state to merge", remedy="evaluate at least one window")
    horizons = sorted({s.horizon for s in states})
    if len(horizons) > 1:
        raise ValueError(f"states of different horizons cannot be merged: {horizons} steps")
    names = sorted({name for s in states for name in s.statistics})
    absent = [Statistic(*np.zeros((2, len(s.videos), horizons[0]))) for s in states]
    rows = {name: [s.statistics.get(name, a) for s, a in zip(states, absent, strict=True)] for name in names}
    joined = {
        name: Statistic(np.concatenate([s.total for s in parts]), np.concatenate([s.count for s in parts]))
        for name, parts in rows.items()
    }
    bins = {name: counts.shape[1] for s in states for name, counts in s.histograms.items()}
    histograms = {
        name: np.concatenate([s.histograms.get(name, np.zeros((len(s.videos), width))) for s in states])
        for name, width in bins.items()
    }
    moments: dict[str, Moments] = {}
    for s in states:
        for name, part in s.moments.items():
            moments[name] = moments[name] + part if name in moments else part
    return state_of(np.concatenate([s.videos for s in states]), joined, histograms, moments)


def check_finite(
    values: Float[Tensor, "b y ..."],
    videos: Int[Tensor, " b"] | Int[np.ndarray, " b"],
    starts: Int[Tensor, " b"] | Int[np.ndarray, " b"],
    what: str,
) -> None:
    """Raises `NonFiniteError` naming the first video, window and step (from 1) at which ``values`` is NaN or inf."""
    bad = (~torch.isfinite(values)).unsqueeze(-1).flatten(2).any(dim=2)
    if bool(bad.any()):
        row, step = (int(i) for i in bad.nonzero()[0])
        found = values[row, step]
        kinds = f"{int(found.isnan().sum())} NaN and {int(found.isinf().sum())} infinite of {found.numel()} values"
        raise NonFiniteError(
            f"{what} of video {int(videos[row])}, window starting at frame {int(starts[row])}, "
            f"is not finite at step {step + 1}: {kinds}",
            remedy="look at the training log of this predictor for the step at which its loss left the finite range",
        )


def picture_statistics(
    prediction: Float[Tensor, "b y 3 h w"],
    truth: Float[Tensor, "b y 3 h w"],
    last: Float[Tensor, "b 3 h w"],
    foreground: Float[Tensor, "b y h w"] | Bool[Tensor, "b y h w"] | None = None,
) -> dict[str, Statistic]:
    """Frames in [0, 1] against the truth; ``last`` is the last observed frame, ``foreground`` belongs to the truth.

    ``squared_error`` and ``squared_error_copy`` (copy_last on the same window) average over pixels and channels;
    the ``fg_`` versions over pixels whose foreground exceeds 0.5; ``psnr_frame`` and ``ssim`` over frames.
    """
    b, y, c, h, w = truth.shape
    error = (prediction.double() - truth.double()).square()
    error_copy = (last.double()[:, None] - truth.double()).square()
    pixels = torch.full((b, y), float(c * h * w), dtype=torch.float64)
    frames = torch.ones((b, y), dtype=torch.float64)
    mse = error.mean(dim=(2, 3, 4))
    psnr = -10 * torch.log10(mse.clamp(min=10 ** (-FRAME_PSNR_CAP_DB / 10)))
    similarity = ssim(prediction.flatten(0, 1), truth.flatten(0, 1)).reshape(b, y)
    out = {
        "squared_error": statistic_of(error.sum(dim=(2, 3, 4)), pixels),
        "squared_error_copy": statistic_of(error_copy.sum(dim=(2, 3, 4)), pixels),
        "psnr_frame": statistic_of(psnr, frames),
        "ssim": statistic_of(similarity, frames),
    }
    if foreground is not None:
        inside = (foreground > 0.5).double()[:, :, None]
        count = c * inside.sum(dim=(2, 3, 4))
        out["fg_squared_error"] = statistic_of((error * inside).sum(dim=(2, 3, 4)), count)
        out["fg_squared_error_copy"] = statistic_of((error_copy * inside).sum(dim=(2, 3, 4)), count)
    return out


def frames_before(last: Float[Tensor, "b 3 h w"], frames: Float[Tensor, "b y 3 h w"]) -> Float[Tensor, "b y 3 h w"]:
    """The frame before each of ``frames``: the last observed one before the first."""
    return torch.cat([last[:, None], frames[:, :-1]], dim=1)


def in_chunks(network: Callable[..., Tensor], *pictures: Float[Tensor, "n 3 h w"]) -> Tensor:
    """What ``network`` says of ``pictures``, `PERCEPTUAL_CHUNK` at a time: features are far larger than pictures."""
    parts = zip(*(p.split(PERCEPTUAL_CHUNK) for p in pictures), strict=True)
    return torch.cat([network(*part) for part in parts])


def flow_statistics(
    flow_bwd: Float[Tensor, "b y 2 h w"],
    true_flow_bwd: Float[Tensor, "b y 2 h w"],
    true_visible: Float[Tensor, "b y 1 h w"] | None = None,
    *,
    moving_px: float = 0.5,
) -> dict[str, Statistic]:
    """End-point error ``|flow - truth|`` in pixels of (h, w): ``epe`` over all pixels, ``epe_moving`` where the
    truth moves by more than ``moving_px``, ``epe_background`` elsewhere, ``epe_visible`` where ``true_visible`` > 0.5.
    """
    truth = true_flow_bwd.double()
    error = (flow_bwd.double() - truth).square().sum(dim=2).sqrt()
    moving = truth.square().sum(dim=2).sqrt() > moving_px
    regions = {"epe": torch.ones_like(moving), "epe_moving": moving, "epe_background": ~moving}
    if true_visible is not None:
        regions["epe_visible"] = true_visible[:, :, 0] > 0.5
    return {
        name: statistic_of((error * region).sum(dim=(2, 3)), region.double().sum(dim=(2, 3)))
        for name, region in regions.items()
    }


def visibility_statistics(
    visible: Float[Tensor, "b y 1 h w"], true_visible: Float[Tensor, "b y 1 h w"]
) -> dict[str, Statistic]:
    """Confusion of the *non-visible* class (visibility of 0.5 or less), as fractions of all pixels.

    ``nonvisible_hit`` true positives, ``nonvisible_false`` false positives, ``nonvisible_miss`` false negatives.
    """
    said, true = visible[:, :, 0] <= 0.5, true_visible[:, :, 0] <= 0.5
    pixels = torch.full(said.shape[:2], float(said.shape[2] * said.shape[3]), dtype=torch.float64)
    cells = {"nonvisible_hit": said & true, "nonvisible_false": said & ~true, "nonvisible_miss": ~said & true}
    return {name: statistic_of(cell.double().sum(dim=(2, 3)), pixels) for name, cell in cells.items()}


def ssim(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float64[Tensor, " n"]:
    """Structural similarity of images in [0, 1], in [-1, 1], averaged over channels and pixels; 1 is identical.

    Wang et al. 2004, equation 13: Gaussian window 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, population
    covariance, only windows that lie inside the image. Computed in float64: float32 loses the variance of flat
    regions to cancellation. Raises `ValueError` for images smaller than the window.
    """
    h, w = a.shape[-2:]
    if min(h, w) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {h}x{w}")
    x, y = a.double(), b.double()
    rows, cols = _gaussian_band(h, x.device), _gaussian_band(w, x.device).T

    def blur(image: Tensor) -> Tensor:
        return rows @ image @ cols

    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x.square()
    var_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_band(size: int, device: torch.device) -> Float64[Tensor, "valid size"]:
    """The Gaussian window as a banded matrix: two dense products beat a float64 convolution on CPU and GPU."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=device) - SSIM_WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    kernel = kernel / kernel.sum()
    valid = size - SSIM_WINDOW + 1
    columns = torch.arange(valid, device=device)[:, None] + torch.arange(SSIM_WINDOW, device=device)
    return torch.zeros(valid, size, dtype=torch.float64, device=device).scatter_(
        1, columns, kernel.expand(valid, SSIM_WINDOW).contiguous()
    )


def statistic_of(total: Float64[Tensor, "b y"], count: Float64[Tensor, "b y"]) -> Statistic:
    """The totals of a batch on the grid of 2**-32, see the module's docstring."""
    on_grid = np.round(total.detach().cpu().numpy() * _GRID) / _GRID
    return Statistic(on_grid, count.detach().cpu().numpy())
