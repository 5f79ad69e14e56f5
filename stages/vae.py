"""vae@KEY: train an autoencoder on the training split and store its per-channel latent statistics with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.catalog import Catalog
from data.manifest import write_json
from data.store import Store
from models.autoencoder import BlockVAE
from models.vae_training import VaeOptions, train_vae
from pipeline.journal import BadItem, Unit
from pipeline.params import check_options
from pipeline.progress import Tick
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.folder import build_folder

CALIBRATION_FRAMES = 512
"""Frames of the training split, evenly spread, over which the latent statistics are measured."""


def run(job: Job) -> None:
    block = job.params.vae["frame"]
    options = check_options(VaeOptions, block.training, f"vae.{job.key}.training")
    frames = Store(ARTIFACTS / "decode")
    train_ids = [v for v in Catalog.load(ARTIFACTS / "acquire").split("train") if v in frames.ids]

    def make(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        torch.manual_seed(block.seed)
        vae = BlockVAE(**block.options)
        pictures = Pictures(frames, train_ids)
        generator = torch.Generator().manual_seed(block.seed)
        result = train_vae(
            vae,
            pictures.batches(block.batch, block.seed),
            options,
            device=job.device,
            generator=generator,
            progress=lambda step, logs: tick(1, f"loss {logs['loss']:.4f}"),
        )
        vae.calibrate(pictures.spread(CALIBRATION_FRAMES, block.batch))
        vae.save_pretrained(folder)
        write_json(folder / "curves.json", result.curves)
        return []

    digests = tuple(sorted({frames.shard_digest(v) for v in train_ids}))
    unit = Unit(tuple(train_ids), digests, f"vae@{job.key}", steps=options.steps)
    build_folder(job, unit, make, fingerprint=job.fingerprint(block))


class Pictures:
    """Single frames of many videos as batches; videos are held in memory as uint8."""

    def __init__(self, frames: Store, videos: list[int]) -> None:
        self.frames, self.videos = frames, videos
        self.length = int(frames.specs["frames"]["item"][0])
        self._held: dict[int, np.ndarray] = {}

    def batches(self, batch: int, seed: int) -> Iterator[Float[Tensor, "b 3 h w"]]:
        """Endless; every picture of a batch comes from a video drawn at random."""
        rng = np.random.default_rng(seed)
        while True:
            videos = rng.choice(self.videos, batch, replace=len(self.videos) < batch)
            yield self._stack(
                [(int(v), int(t)) for v, t in zip(videos, rng.integers(self.length, size=batch), strict=True)]
            )

    def spread(self, count: int, batch: int) -> Iterator[Float[Tensor, "b 3 h w"]]:
        """``count`` frames at even distances over all videos, in batches that mix videos."""
        every = [(v, t) for t in range(self.length) for v in self.videos]
        chosen = [every[i] for i in np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)]
        for start in range(0, len(chosen), batch):
            yield self._stack(chosen[start : start + batch])

    def _stack(self, places: list[tuple[int, int]]) -> Float[Tensor, "b 3 h w"]:
        for video, _ in places:
            if video not in self._held:
                self._held[video] = self.frames.read("frames", video)
        pictures = np.stack([self._held[v][t] for v, t in places])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


if __name__ == "__main__":
    run_stage("vae", run, keyed=True)
