"""What autoencoders encode: single images of many videos, by key: ``frame`` of `decode`, ``flow`` of `flow`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.catalog import Catalog
from data.errors import EmptyError
from data.resize import resize_flow
from data.store import Store
from pipeline.stage import ARTIFACTS, Job

SOURCES = {"frame": ("decode", "frames"), "flow": ("flow", "flow_bwd")}
"""Key of a VAE -> the stage and the array that hold its images."""


class Images:
    """Images of ``videos`` on the grid (height, width): frames in [0, 1], or backward flow in pixels of that grid.

    Videos are held in memory, compactly, while they fit into ``cache_bytes``; past that images are read one by one.
    """

    def __init__(
        self, store: Store, array: str, videos: Sequence[int], *, height: int, width: int, cache_bytes: int = 8 << 30
    ) -> None:
        self.store, self.array, self.height, self.width = store, array, height, width
        self.videos = [v for v in videos if v in set(store.ids)]
        self.length = int(store.specs[array]["item"][0])
        self.cache_bytes = cache_bytes
        self._held: dict[int, Tensor] = {}
        self._held_bytes = 0

    def batches(self, batch: int, seed: int) -> Iterator[Float[Tensor, "b c h w"]]:
        """Endless; every image of a batch comes from a video drawn at random. Raises EmptyError without videos."""
        if not self.videos:
            raise EmptyError(f"{self.store.path} holds no video to train on", remedy="look at acquire.videos")
        rng = np.random.default_rng(seed)
        while True:
            videos = rng.choice(self.videos, batch, replace=len(self.videos) < batch)
            times = rng.integers(self.length, size=batch)
            yield torch.cat([self._one(int(v), int(t)) for v, t in zip(videos, times, strict=True)])

    def spread(self, count: int, batch: int) -> Iterator[Float[Tensor, "b c h w"]]:
        """``count`` images at even distances over all videos, in batches that mix videos."""
        every = [(v, t) for t in range(self.length) for v in self.videos]
        chosen = [every[i] for i in np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)]
        for start in range(0, len(chosen), batch):
            yield torch.cat([self._one(*place) for place in chosen[start : start + batch]])

    def of(self, video: int) -> Float[Tensor, "t c h w"]:
        """All images of one video."""
        return _in_units(self._load(video, 0, None))

    def digests(self) -> tuple[str, ...]:
        """Digests of the stored shards that hold the videos."""
        return tuple(sorted({self.store.shard_digest(v) for v in self.videos}))

    def _one(self, video: int, t: int) -> Float[Tensor, "1 c h w"]:
        if video not in self._held:
            if self._held_bytes >= self.cache_bytes:
                return _in_units(self._load(video, t, t + 1))
            self._held[video] = self._load(video, 0, None)
            self._held_bytes += self._held[video].nbytes
        return _in_units(self._held[video][t : t + 1])

    def _load(self, video: int, start: int, stop: int | None) -> Tensor:
        if self.array == "frames":
            return torch.from_numpy(self.store.read(self.array, video, start, stop)).permute(0, 3, 1, 2)
        flow = torch.from_numpy(self.store.read_flow(self.array, video, start, stop))
        return resize_flow(flow, self.height, self.width).half()  # as `data.clips` holds it


def _in_units(held: Tensor) -> Tensor:
    return held.float() / 255 if held.dtype == torch.uint8 else held.float()


def open_images(job: Job, split: str | None = None) -> Images:
    """What the stage's VAE encodes, of all videos or those of one split."""
    stage, array = SOURCES[job.key]
    store = Store(ARTIFACTS / stage)
    videos = store.ids if split is None else Catalog.load(ARTIFACTS / "acquire").split(split)
    height, width = job.params.decode.resolution
    return Images(store, array, videos, height=height, width=width)
