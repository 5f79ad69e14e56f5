"""Training clips and evaluation windows: the typed records that models see, and the loader that fills them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, Int16, UInt8
from torch import Tensor

from data.ahead import ahead
from data.errors import EmptyError, StoreError
from data.resize import resize_field, resize_flow
from data.store import Store, unpack_flow


@dataclass(frozen=True)
class Clip:
    """A batch of training windows on the model's grid (h, w). Fields that a predictor does not name in
    ``Predictor.needs`` are not loaded and raise on access through `require`.

    - ``frames`` in [0, 1], RGB.
    - ``latents`` normalised per channel (mean 0, standard deviation 1 over the training split).
    - ``flow_bwd[:, k]`` lives on frame k+1 and points to frame k, in pixels of (h, w): the teacher's.
    - ``visible[:, k]`` in [0, 1] on the grid of frame k+1: 1 where warping frame k can be trusted.
    - ``flow_latents[:, k]``: the flow VAE's normalised latents of ``flow_bwd[:, k]``.
    - ``boxes``: (x0, y0, x1, y1) of the visible part of each annotated object in pixels of (h, w), zeros where
      ``presence`` is 0; ``collision[:, k]`` is 1 when something collides between frame k-1 and frame k, and
      ``collision_pairs[:, k]`` (symmetric) says which objects.
    - ``labelled`` is 1 for windows of annotated videos. Elsewhere boxes, presence and collisions are zeros that mean
      nothing and must not count.
    """

    video: Int[Tensor, " b"]
    start: Int[Tensor, " b"]
    frames: Float[Tensor, "b t 3 h w"] | None = None
    latents: Float[Tensor, "b t z hz wz"] | None = None
    flow_bwd: Float[Tensor, "b t-1 2 h w"] | None = None
    visible: Float[Tensor, "b t-1 1 h w"] | None = None
    flow_latents: Float[Tensor, "b t-1 zf hf wf"] | None = None
    boxes: Float[Tensor, "b t n 4"] | None = None
    presence: Float[Tensor, "b t n"] | None = None
    collision: Float[Tensor, "b t"] | None = None
    collision_pairs: Float[Tensor, "b t n n"] | None = None
    labelled: Float[Tensor, " b"] | None = None

    def require(self, name: str) -> Tensor:
        """The field, or an error naming it: absent data never drops a loss term silently."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this clip was loaded without {name!r}; name it in the predictor's `needs`")
        return value

    def to(self, device: torch.device | str) -> Clip:
        moved = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class Context:
    """What a rollout may see: observed frames in [0, 1], and the teacher's flow and visibility *between* them."""

    frames: Float[Tensor, "b x 3 h w"]
    flow_bwd: Float[Tensor, "b x-1 2 h w"]
    visible: Float[Tensor, "b x-1 1 h w"]


LABELS = frozenset({"boxes", "presence", "collision", "collision_pairs"})
"""Fields of a `Clip` that only annotated videos have; with any of them comes ``labelled``."""
FIELDS = ("frames", "latents", "flow_bwd", "visible", "flow_latents", *sorted(LABELS))
"""Loadable fields of a `Clip`."""
PAIRS = frozenset({"flow_bwd", "visible", "flow_latents"})
"""Those of pairs of consecutive frames, one fewer than there are frames."""


class ClipSource:
    """Windows of consecutive frames over a set of videos, on one pixel grid, from finished stores.

    Nothing is decoded here. Fields are brought to the grid (h, w) once per video and kept, compactly, while they fit
    into ``cache_bytes``; past that every window is read from its chunks.
    """

    def __init__(
        self, stores: dict[str, Store], *, height: int, width: int, videos: Sequence[int], cache_bytes: int = 4 << 30
    ) -> None:
        """``stores`` maps each field in use to the store that holds it (see `FIELDS`).

        Raises:
            EmptyError: no video is left that every store holds.
        """
        self.stores, self.height, self.width, self.cache_bytes = stores, height, width, cache_bytes
        held = [set(store.ids) for name, store in stores.items() if name not in LABELS]
        self.videos = tuple(v for v in sorted(videos) if all(v in ids for ids in held))
        if not self.videos:
            raise EmptyError(
                f"none of the {len(videos)} videos asked for is in every store "
                f"({', '.join(f'{name}: {len(store.ids)} videos' for name, store in stores.items())})",
                remedy="look at the quarantine in their manifests, and at acquire.videos",
            )
        lengths = {
            int(store.specs[_ARRAYS[name][0]]["item"][0]) for name, store in stores.items() if name in _FRAMED | LABELS
        }
        if len(lengths) > 1:
            raise StoreError(
                f"the stores disagree on the number of frames: {sorted(lengths)}",
                remedy="run `dvc repro`: one of them was built with another decode.stride",
            )
        if not lengths:
            raise ValueError(f"at least one of {sorted(_FRAMED)} must be among the fields, found {sorted(stores)}")
        self.length = lengths.pop()
        self._cache: dict[tuple[str, int], Tensor] = {}
        self._cached = 0

    def digests(self) -> tuple[str, ...]:
        """Digests of the stored shards that the windows are made of; a video without labels has none of theirs."""
        stores = self.stores.values()
        return tuple(sorted({s.shard_digest(v) for s in stores for v in self.videos if v in s.ids}))

    def windows(self, length: int, every: int = 1) -> list[tuple[int, int]]:
        """(video, first frame) of every window of ``length`` frames that starts at a multiple of ``every``.

        Raises:
            EmptyError: the videos are shorter than one window.
        """
        starts = range(0, self.length - length + 1, every)
        if not starts:
            raise EmptyError(
                f"a window of {length} frames does not fit into videos of {self.length}",
                remedy="shorten the context, the horizon or the training clip, or lower decode.stride",
            )
        return [(video, start) for video in self.videos for start in starts]

    def clip(self, windows: Sequence[tuple[int, int]], length: int) -> Clip:
        """The windows as one batch; pairs (``flow_bwd``, ``visible``) number one less than frames."""
        loaded = {
            name: torch.stack([self._window(name, video, start, length) for video, start in windows])
            for name in self.stores
        }
        video, start = (torch.tensor(column) for column in zip(*windows, strict=True))
        if labels := LABELS & set(self.stores):
            known = set(self.stores[min(labels)].ids)
            loaded["labelled"] = torch.tensor([float(v in known) for v, _ in windows])
        return Clip(video=video, start=start, **loaded)

    def batches(
        self, length: int, batch: int, *, seed: int, first: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Clip]:
        """Endless shuffled batches; batch ``first`` onwards, so that training resumes where it stopped. A thread loads
        the next batch meanwhile; the source is its alone until the iterator is closed or forgotten.

        The order is a function of ``seed`` alone: epoch e is permuted by the generator of (seed, e), and an
        incomplete batch is filled from the next epoch. ``part`` (i, n) loads the i-th of n equal shares of every
        batch, for processes that train together; ``batch`` is of all of them and must be divisible by n.
        """
        windows = self.windows(length)
        index, count = part
        if batch % count:
            raise ValueError(f"a batch of {batch} cannot be cut into {count} equal shares")
        share = slice(index * batch // count, (index + 1) * batch // count)
        yield from ahead(self.clip(chosen[share], length) for chosen in _shuffled(windows, batch, seed, first))

    def _window(self, name: str, video: int, start: int, length: int) -> Tensor:
        stop = start + length - (name in PAIRS)
        if (name, video) not in self._cache and self._cached < self.cache_bytes:
            whole = self._load(name, video, 0, None)
            self._cache[name, video] = whole
            self._cached += whole.nbytes
        held = self._cache.get((name, video))
        part = held[start:stop] if held is not None else self._load(name, video, start, stop)
        return part.float() / 255 if name == "frames" else part.float()

    def _load(self, name: str, video: int, start: int, stop: int | None) -> Tensor:
        array, prepare = _ARRAYS[name]
        store = self.stores[name]
        if name in LABELS and video not in store.ids:
            return torch.zeros(len(range(self.length)[start:stop]), *store.specs[array]["item"][1:])
        ready = prepare(store.read(array, video, start, stop), self.height, self.width)
        if name == "boxes":
            h, w = store.specs["instances"]["item"][1:3]
            ready = ready * torch.tensor([self.width / w, self.height / h] * 2)
        return ready


def _shuffled(windows: Sequence[tuple[int, int]], batch: int, seed: int, first: int) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of windows, from number ``first`` on; see `ClipSource.batches`."""
    orders: dict[int, np.ndarray] = {}
    for position in itertools.count(first * batch, batch):
        chosen = []
        for epoch, offset in (divmod(k, len(windows)) for k in range(position, position + batch)):
            if epoch not in orders:
                orders = {epoch: np.random.default_rng((seed, epoch)).permutation(len(windows))}
            chosen.append(windows[orders[epoch][offset]])
        yield chosen


def frames_on_grid(
    stored: UInt8[np.ndarray, "t h w 3"], height: int, width: int
) -> UInt8[Tensor, "t 3 {height} {width}"]:
    """Stored frames, channels first. Raises StoreError if they are not on this grid."""
    if stored.shape[1:3] != (height, width):
        raise StoreError(
            f"frames are stored at {list(stored.shape[1:3])}, the model works at {[height, width]}",
            remedy="use decode.resolution for the model",
        )
    return torch.from_numpy(stored).permute(0, 3, 1, 2).contiguous()


def flow_on_grid(
    stored: Int16[np.ndarray, "p 2 h w"], height: int, width: int
) -> Float16[Tensor, "p 2 {height} {width}"]:
    """Stored flow on the grid, in its pixels."""
    # float16 resolves 1/64 px at 16 px, the rounding that the store itself makes.
    return resize_flow(torch.from_numpy(unpack_flow(stored)), height, width).half()


def visible_on_grid(
    stored: UInt8[np.ndarray, "p h w"], height: int, width: int
) -> Float16[Tensor, "p 1 {height} {width}"]:
    """Stored visibility on the grid, in [0, 1]."""
    return resize_field(torch.from_numpy(stored.astype(np.float32) / 255)[:, None], height, width).half()


def _as_stored(stored: np.ndarray, height: int, width: int) -> Tensor:
    return torch.from_numpy(stored)


_ARRAYS: dict[str, tuple[str, Callable[[np.ndarray, int, int], Tensor]]] = {
    "frames": ("frames", frames_on_grid),
    "latents": ("latents", _as_stored),
    "flow_bwd": ("flow_bwd", flow_on_grid),
    "visible": ("visible", visible_on_grid),
    "flow_latents": ("latents", _as_stored),
    "boxes": ("boxes", _as_stored),
    "presence": ("presence", _as_stored),
    "collision": ("collision", _as_stored),
    "collision_pairs": ("collision_pairs", _as_stored),
}
_FRAMED = frozenset({"frames", "latents"})
