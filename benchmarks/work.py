"""How much work all of CLEVRER is under ``profiles/clevrer.yaml``: videos, steps, bytes; nothing of speed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.store import ArraySpec
from models.predictor import find
from pipeline import profiles
from pipeline.params import parse_params, read_yaml
from pipeline.sections import Vae
from pipeline.size_estimate import estimate
from stages.fields import flow_specs, visible_spec
from stages.label import specs as label_specs

VIDEOS, TRAINED_ON, ANNOTATED, FRAMES = 20_000, 10_000, 15_000, 128
RAW = 25e9
"""Bytes of the official archives, which hold videos that are compressed already: unpacked they are as large."""
PARAMETERS = {
    "pixel_warp_lstm": 839_068,
    "latent_transformer": 1_243_681,
    "latent_diffusion": 2_564_171,
    "latent_flow_aux": 741_339,
    "latent_warp": 773_276,
    "two_stream": 1_102_849,
}
"""Of the default sizes (docs/predictors.md)."""
NEEDS = {
    "pixel_warp_lstm": ("frames", "flow", "visible", "labels"),
    "latent_transformer": ("frames",),
    "latent_diffusion": ("frames",),
    "latent_flow_aux": ("frames", "flow"),
    "latent_warp": ("frames", "flow", "visible"),
    "two_stream": ("frames", "flow"),
}
"""What a training clip of each holds: frames rather than latents, as windows are mirrored before that."""


@dataclass(frozen=True)
class Amounts:
    """Counts, and stored bytes."""

    videos: int
    annotated: int
    shards: int
    kept: int
    """Frames of a video."""
    pairs: int
    """Of all videos, each of which is estimated both ways."""
    pixels: float
    """Of a frame, in those of the size at which networks were measured (128x192)."""
    raw: float
    stored: dict[str, float]
    vae_steps: dict[str, int]
    vae_batch: dict[str, int]
    vae_growth: dict[str, float]
    """Work of the autoencoder per pixel, in that of the default one."""
    bytes_of_image: dict[str, float]
    predictors: tuple[str, ...]
    trained: tuple[str, ...]
    steps: int
    batch: int
    growth: dict[str, float]
    """Work and parameters of a predictor, in those of the default one."""
    parameters: dict[str, float]
    bytes_of_window: dict[str, float]
    """Read for one training clip: it touches two chunks of each array."""
    predicted: int
    """Frames that each predictor is evaluated on."""
    bytes_of_truth: float
    """Read for each of them."""


def amounts_of(root: Path) -> Amounts:
    """Of the checkout's ``params.yaml`` with the profile `clevrer`."""
    raw = read_yaml(root / "params.yaml")
    profiles.merge(raw, read_yaml(root / "profiles/clevrer.yaml"), [])
    params = parse_params(raw, "params.yaml with profile clevrer")
    (h, w), clip = params.decode.resolution, params.shards.clip
    kept = len(range(0, params.decode.frames, params.decode.stride))
    grid = params.flow.resolution
    specs = {
        "decode": [ArraySpec("frames", (kept, h, w, 3), "uint8", (), clip, "picture")],
        "label": label_specs(kept, *params.label.resolution, clip),
        "flow": flow_specs(kept - 1, *grid, clip),
        "occlusion": [visible_spec(kept - 1, *grid, clip)],
        **{f"encode@{key}": [_latents(params.vae[key], h, w, kept, clip)] for key in params.vae},
    }
    stored = {
        name: float(
            estimate(s, ANNOTATED if name == "label" else VIDEOS, motion="true" if name == "label" else "gated").bytes
        )
        for name, s in specs.items()
    }
    of_frame = {
        "frames": stored["decode"] / VIDEOS / kept,
        "flow": stored["flow"] / VIDEOS / kept / 2,  # the way back alone
        "visible": stored["occlusion"] / VIDEOS / kept,
        "labels": 0.0,  # tables: kilobytes a video
    }
    trained = tuple(name for name in params.predictors if name in NEEDS)
    steps = {params.predictors[name].training["steps"] for name in trained}
    batches = {params.predictors[name].batch for name in trained}
    if len(steps) != 1 or len(batches) != 1:
        raise SystemExit(f"the profile trains for {sorted(steps)} steps of {sorted(batches)}: one of each is expected")
    growth = {name: _growth(params.predictors[name].model, params.predictors[name].options) for name in trained}
    of_truth = stored["label"] / ANNOTATED / kept
    starts = range(0, kept - params.evaluate.context - params.evaluate.horizon + 1, params.evaluate.window_stride)
    evaluated = {"validation": 5_000, "test": 5_000, "train": TRAINED_ON}[params.evaluate.split]
    return Amounts(
        videos=VIDEOS,
        annotated=ANNOTATED,
        shards=math.ceil(VIDEOS / params.shards.videos),
        kept=kept,
        pairs=kept - 1,
        pixels=h * w / (128 * 192),
        raw=RAW,
        stored=stored,
        vae_steps={key: block.training["steps"] for key, block in params.vae.items()},
        vae_batch={key: block.batch for key, block in params.vae.items()},
        vae_growth={key: _vae_growth(block, {"frame": 32, "flow": 16}[key]) for key, block in params.vae.items()},
        bytes_of_image={"frame": clip * of_frame["frames"], "flow": clip * of_frame["flow"]},
        predictors=tuple(params.predictors),
        trained=trained,
        steps=steps.pop(),
        batch=batches.pop(),
        growth=growth,
        parameters={name: PARAMETERS[name] * growth[name] for name in trained},
        bytes_of_window={name: 2 * clip * sum(of_frame[field] for field in NEEDS[name]) for name in trained},
        predicted=evaluated * len(starts) * params.evaluate.horizon,
        bytes_of_truth=2 * clip * (sum(of_frame.values()) + of_truth) / params.evaluate.horizon,
    )


def _latents(block: Vae, h: int, w: int, kept: int, clip: int) -> ArraySpec:
    stride, channels = (int(block.options[name]) for name in ("stride", "latent_channels"))
    return ArraySpec("latents", (kept, channels, h // stride, w // stride), "float16", (), clip, "picture")


def _growth(model: str, options: dict[str, Any]) -> float:
    """Convolutions and attention cost the square of their width, times the number of blocks."""
    default = find(model)[0]()
    growth = 1.0
    for name, power in (("width", 2), ("blocks", 1)):
        if name in options:
            growth *= (options[name] / getattr(default, name)) ** power
    return growth


def _vae_growth(block: Vae, measured_width: int) -> float:
    return (block.options["width"] / measured_width) ** 2 * block.options["blocks"]
