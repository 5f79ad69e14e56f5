"""Chunked zarr stores of per-video arrays: one shard file of consecutive videos, one chunk per training clip.

A store is a folder with ``store.zarr``, which plain `zarr` and `xarray` read (a zarr v3 group with one array per
quantity, whose first axis is the row of a video), and ``manifest.json``, written last. The manifest is the truth about
which rows hold a video: zarr reads a missing shard and an all-zero shard alike as the fill value (measured, 3.1.6).

Rows are fixed by identity, not by count: a *bucket* holds the ids ``[k V, (k + 1) V)`` for V videos per shard, and
video i stands in the row ``ordinal(bucket) V + i mod V``. Adding videos anywhere therefore changes the shards of
their own buckets only. Rows without a video carry the id -1 in the coordinate array ``video``.

Shards are written by one writer each into a folder of their own (`write_shard`) and later hard-linked into place
(`assemble`), so a crash never leaves a half-written store and an unchanged shard is never written twice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from data.errors import StoreError
from data.manifest import file_entry, read_manifest, write_manifest

GROUP = "store.zarr"
FLOW_SCALE = 32.0
"""Flow is stored as int16 in 1/32 px: at most 1/64 px of rounding, a range of +-1024 px."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store, per video: ``item`` is the shape of one video's entry, its first axis time."""

    name: str
    item: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    clip: int
    codec: Literal["picture", "field", "table"]
    attributes: dict[str, Any] = field(default_factory=dict)

    def compressors(self) -> tuple[Any, ...]:
        """The smallest that is fast enough, as measured in docs/storage.md: latents, whose floats shrink little at any
        level, are not to hold up the GPU that makes them.

        The checksum is outside: damage is found before zstd reads a length from it.
        """
        return (ZstdCodec(level=3 if self.dtype == "float16" else 9), Crc32cCodec())

    def create(self, group: Path | MemoryStore, rows: int, videos_per_shard: int) -> zarr.Array:
        clip = min(self.clip, self.item[0])
        length = -(-self.item[0] // clip) * clip
        return zarr.create_array(
            store=str(group) if isinstance(group, Path) else group,
            name=self.name,
            shape=(rows, *self.item),
            chunks=(1, clip, *self.item[1:]),
            shards=(videos_per_shard, length, *self.item[1:]),
            dtype=self.dtype,
            compressors=self.compressors(),
            fill_value=0,
            dimension_names=("video", *self.dims),
            attributes=self.attributes,
            # Flat names: with the default, "/", each shard file has five folders to itself, and DVC walks every folder
            # of every dependency (measured: 13 s for nothing to do, at 700 shards a stage).
            chunk_key_encoding={"name": "default", "separator": "."},
        )

    def shard_name(self, ordinal: int) -> str:
        """The file of a shard, relative to the store's group."""
        return f"{self.name}/c.{ordinal}" + ".0" * len(self.item)


@dataclass(frozen=True)
class ShardPlace:
    """A finished shard and the bucket (id // videos_per_shard) that it holds."""

    bucket: int
    folder: Path
    ids: tuple[int, ...]
    key: str
    digests: Mapping[str, str] = field(default_factory=dict)
    """sha256 of its files, by path relative to ``folder``, where they are known already."""


def bucket_ids(ids: Iterable[int], videos_per_shard: int) -> dict[int, tuple[int, ...]]:
    """The ids grouped into buckets of consecutive videos, both in ascending order."""
    buckets: dict[int, list[int]] = {}
    for video in sorted(ids):
        buckets.setdefault(video // videos_per_shard, []).append(video)
    return {bucket: tuple(members) for bucket, members in sorted(buckets.items())}


Videos = Mapping[int, Mapping[str, np.ndarray]] | Iterator[tuple[int, Mapping[str, np.ndarray]]]


def write_shard(folder: Path, specs: Sequence[ArraySpec], videos: Videos, videos_per_shard: int) -> None:
    """Write one bucket's videos (id -> array name -> array) as one shard file per array below ``folder``.

    ``videos`` may be an iterator of (id, arrays): each is let go when the next one is there, so that memory holds two
    of them and the compressed shard. Neither that nor the order of the videos makes a difference to the bytes.

    Raises:
        StoreError: an array has another shape or dtype than its `ArraySpec` promises.
    """
    compressed: dict[str, Buffer] = {}
    arrays: dict[str, zarr.Array] = {}
    for video, values in videos.items() if isinstance(videos, Mapping) else videos:
        if not arrays:  # a shard without a video is no files at all
            memory = MemoryStore(compressed)
            arrays = {spec.name: spec.create(memory, videos_per_shard, videos_per_shard) for spec in specs}
        for spec in specs:
            value = values[spec.name]
            if value.shape != spec.item or value.dtype != np.dtype(spec.dtype):
                raise StoreError(
                    f"{spec.name} of video {video} is {value.dtype}{list(value.shape)}, "
                    f"the store holds {spec.dtype}{list(spec.item)}",
                    remedy="this is a defect of the stage that made the array: report it with both shapes",
                )
            arrays[spec.name][video % videos_per_shard] = value
    for name, content in compressed.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.to_bytes())


def read_shard(
    folder: Path, specs: Sequence[ArraySpec], ids: Iterable[int], videos_per_shard: int
) -> dict[int, dict[str, np.ndarray]]:
    """The videos ``ids`` of a shard that `write_shard` finished in ``folder``, as they were given to it.

    Whether a row holds a video is for the caller to know: rows without one read as zeros.

    Raises:
        StoreError: an array is missing, has another shape or dtype than its `ArraySpec`, or fails its checksum.
    """
    videos: dict[int, dict[str, np.ndarray]] = {i: {} for i in ids}
    for spec in specs if videos else ():
        try:
            array = zarr.open_array(store=str(folder / spec.name), mode="r")
        except FileNotFoundError:
            raise _unlike(folder / spec.name, "is missing", spec) from None
        if array.shape != (videos_per_shard, *spec.item) or array.dtype != np.dtype(spec.dtype):
            raise _unlike(folder / spec.name, f"holds {array.dtype}{list(array.shape)}", spec)
        for i, arrays in videos.items():
            arrays[spec.name] = _decoded(array, i % videos_per_shard, slice(None), f"{folder / spec.name}: video {i}")
    return videos


def _unlike(path: Path, found: str, spec: ArraySpec) -> StoreError:
    return StoreError(
        f"{path} {found}; a shard of videos of {spec.dtype}{list(spec.item)} was expected",
        remedy="remove the shard's folder and build it again",
    )


def _decoded(array: zarr.Array, row: int, steps: slice, what: str) -> np.ndarray:
    try:
        return np.asarray(array[row, steps])
    except (ValueError, RuntimeError) as error:
        raise StoreError(
            f"{what} cannot be decoded ({error})",
            remedy="the shard is damaged: run `clevrcast verify --repair`",
        ) from error


def assemble(
    out: Path,
    specs: Sequence[ArraySpec],
    shards: Sequence[ShardPlace],
    videos_per_shard: int,
    *,
    manifest: Mapping[str, Any],
) -> None:
    """Make the store ``out`` out of finished shards by hard links; ``manifest.json`` is written last.

    ``manifest`` adds the caller's facts (stage, fingerprint, params, quarantine). Everything written here is
    repeatable byte for byte; seconds and hosts belong to the journal.
    """
    if out.exists():
        shutil.rmtree(out)
    group = out / GROUP
    group.mkdir(parents=True)
    rows = len(shards) * videos_per_shard
    zarr.create_group(store=str(group))
    entries = []
    video = np.full(rows, -1, dtype=np.int32)
    for ordinal, shard in enumerate(shards):
        for i in shard.ids:
            video[ordinal * videos_per_shard + i % videos_per_shard] = i
    if rows:  # an empty store (no video has an annotation, say) has a manifest and no array
        coordinate = zarr.create_array(
            store=str(group), name="video", shape=(rows,), chunks=(rows,), dtype="int32", dimension_names=("video",)
        )
        coordinate[:] = video
        for spec in specs:
            spec.create(group, rows, videos_per_shard)
    for ordinal, shard in enumerate(shards):
        files = {}
        for spec in specs:
            source = shard.folder / spec.shard_name(0)
            if not source.exists():
                continue
            target = group / spec.shard_name(ordinal)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
            digest = shard.digests.get(str(source.relative_to(shard.folder)))
            files[str(target.relative_to(out))] = file_entry(source, digest)
        entries.append({"ids": list(shard.ids), "key": shard.key, "files": files})
    promised = {name for entry in entries for name in entry["files"]}
    rest = {str(f.relative_to(out)): f for f in sorted(group.rglob("*")) if f.is_file()}
    body = {
        **manifest,
        "videos_per_shard": videos_per_shard,
        "arrays": [asdict(spec) for spec in specs],
        "shards": entries,
        "files": {name: file_entry(file) for name, file in rest.items() if name not in promised},
    }
    write_manifest(out, body)


class Store:
    """A finished store, opened for reading. Cheap to open, safe to open again in a spawned worker."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.specs = {a["name"]: a for a in self.manifest["arrays"]}
        v = self.manifest["videos_per_shard"]
        self._row: dict[int, int] = {}
        self._shard: dict[int, dict[str, Any]] = {}
        for ordinal, shard in enumerate(self.manifest["shards"]):
            for relative, entry in shard["files"].items():
                file = self.path / relative
                if not file.exists() or file.stat().st_size != entry["bytes"]:
                    found = file.stat().st_size if file.exists() else "no file"
                    raise StoreError(
                        f"{file}: the manifest promises {entry['bytes']} bytes, found {found}",
                        remedy="run `clevrcast verify --repair`: undamaged shards are linked, not recomputed",
                    )
            for i in shard["ids"]:
                self._row[i] = ordinal * v + i % v
                self._shard[i] = shard
        self._arrays: dict[str, zarr.Array] = {}

    def _open(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            self._arrays[name] = zarr.open_array(store=str(self.path / GROUP / name), mode="r")
        return self._arrays[name]

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of the videos that are here and good, in ascending order."""
        return tuple(sorted(self._row))

    def shard_digest(self, video: int) -> str:
        """One digest for everything in the shard that holds ``video``: the part of a downstream shard's key."""
        files = self._shard[video]["files"]
        joined = "\n".join(f"{name.split('/')[1]} {entry['sha256']}" for name, entry in sorted(files.items()))
        return hashlib.sha256(joined.encode()).hexdigest()

    def read(self, name: str, video: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """``name`` of one video, time steps ``start`` to ``stop``, as stored.

        Raises:
            StoreError: the store has no such array or no such video, or the data fail their checksum.
        """
        if name not in self.specs:
            raise StoreError(
                f"{self.path} has no array {name!r}; it has {sorted(self.specs)}", remedy="name one of these"
            )
        if video not in self._row:
            bad = {q["id"]: q["reason"] for q in self.manifest.get("quarantine", [])}
            why = f"quarantined: {bad[video]}" if video in bad else "not part of this data set"
            raise StoreError(
                f"{self.path} holds no video {video} ({why})", remedy="choose one of the ids in its manifest"
            )
        what = f"{self.path / name}: video {video}, steps {start}:{stop}"
        return _decoded(self._open(name), self._row[video], slice(start, stop), what)

    def read_flow(self, name: str, video: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flow in pixels, float32 (t, 2, h, w), out of its stored int16."""
        return unpack_flow(self.read(name, video, start, stop))


def pack_flow(flow: np.ndarray) -> np.ndarray:
    """Flow in pixels to int16 in 1/32 px, rounded to nearest.

    Raises:
        StoreError: a vector is not finite or exceeds the +-1023 px that int16 can hold.
    """
    peak = float(np.abs(flow).max(initial=0.0))
    if not peak < 1023:
        raise StoreError(
            f"a flow vector of {peak} px cannot be stored (limit 1023 px, and finite)",
            remedy="look at the teacher's output for this video with `clevrcast teachers`",
        )
    return np.rint(flow * FLOW_SCALE).astype(np.int16)


def unpack_flow(stored: np.ndarray) -> np.ndarray:
    """The inverse of `pack_flow`: float32, in pixels."""
    return stored.astype(np.float32) / FLOW_SCALE
