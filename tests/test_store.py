"""Stores: what is written is read, by us and by plain zarr; anything torn, missing or wrong is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from data.errors import StoreError
from data.store import ArraySpec, ShardPlace, Store, assemble, bucket_ids, file_digest, pack_flow, write_shard

SPECS = [
    ArraySpec("frames", (10, 6, 8, 3), "uint8", ("time", "y", "x", "channel"), 4, "picture"),
    ArraySpec("flow_bwd", (9, 2, 6, 8), "int16", ("pair", "direction", "y", "x"), 4, "field"),
    ArraySpec("boxes", (10, 2), "float32", ("time", "side"), 4, "table"),
]


def video(i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    return {
        "frames": rng.integers(0, 256, (10, 6, 8, 3), dtype=np.uint8),
        "flow_bwd": rng.integers(-900, 900, (9, 2, 6, 8)).astype(np.int16),
        "boxes": rng.normal(size=(10, 2)).astype(np.float32),
    }


def build(folder: Path, ids: list[int], *, per_shard: int = 4) -> Store:
    places = []
    for bucket, members in bucket_ids(ids, per_shard).items():
        work = folder / f"work-{bucket}-{len(members)}"
        if not work.exists():
            write_shard(work, SPECS, {i: video(i) for i in members}, per_shard)
        places.append(ShardPlace(bucket, work, members, f"key {bucket}"))
    quarantine = [{"id": 77, "reason": "torn", "digest": ""}]
    assemble(folder / "out", SPECS, places, per_shard, manifest={"stage": "test", "quarantine": quarantine})
    return Store(folder / "out")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = build(tmp_path, [0, 1, 2, 9, 10, 1000])
    assert store.ids == (0, 1, 2, 9, 10, 1000)
    for i in store.ids:
        for name, array in video(i).items():
            np.testing.assert_array_equal(store.read(name, i), array)
            np.testing.assert_array_equal(store.read(name, i, 3, 7), array[3:7])
    np.testing.assert_allclose(store.read_flow("flow_bwd", 9), video(9)["flow_bwd"] / 32)


def test_plain_zarr_and_xarray_read_it(tmp_path: Path) -> None:
    build(tmp_path, [0, 2, 9])
    plain = zarr.open_group(str(tmp_path / "out/store.zarr"), mode="r")
    frames = plain["frames"]
    assert isinstance(frames, zarr.Array)
    np.testing.assert_array_equal(np.asarray(frames[2]), video(2)["frames"])
    with xarray.open_zarr(str(tmp_path / "out/store.zarr"), consolidated=False) as data:
        assert data["video"].values.tolist() == [0, -1, 2, -1, -1, 9, -1, -1]
        np.testing.assert_array_equal(data["boxes"].sel(video=9).values, video(9)["boxes"])


def test_new_videos_touch_only_the_shards_of_their_own_bucket(tmp_path: Path) -> None:
    before = {
        name: e["sha256"] for s in build(tmp_path, [8, 9, 1000]).manifest["shards"] for name, e in s["files"].items()
    }
    after = build(tmp_path, [0, 8, 9, 1000])
    digests = {entry["sha256"] for shard in after.manifest["shards"] for entry in shard["files"].values()}
    assert set(before.values()) <= digests
    np.testing.assert_array_equal(after.read("frames", 9), video(9)["frames"])


def test_the_same_videos_give_the_same_bytes(tmp_path: Path) -> None:
    trees = []
    for name in ("a", "b"):
        build(tmp_path / name, [0, 2, 9])
        files = sorted(f for f in (tmp_path / name / "out").rglob("*") if f.is_file())
        trees.append({str(f.relative_to(tmp_path / name)): file_digest(f) for f in files})
    assert trees[0] == trees[1]


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    store = build(tmp_path, [0, 2])
    for name in ("frames", "flow_bwd", "boxes"):
        shard = next(f for f in (tmp_path / "out/store.zarr" / name / "c").rglob("*") if f.is_file())
        torn = bytearray(shard.read_bytes())
        torn[len(torn) // 3] ^= 16
        shard.unlink()
        shard.write_bytes(torn)
        with pytest.raises(StoreError, match=rf"{name}.*cannot be decoded"):
            _ = [store.read(name, i) for i in store.ids]


def test_a_missing_shard_is_not_read_as_zeros(tmp_path: Path) -> None:
    build(tmp_path, [0, 9])
    next(f for f in (tmp_path / "out/store.zarr/frames/c").rglob("*") if f.is_file()).unlink()
    with pytest.raises(StoreError, match=r"promises .* bytes, found no file"):
        Store(tmp_path / "out")


def test_an_unfinished_store_is_refused(tmp_path: Path) -> None:
    build(tmp_path, [0])
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(StoreError, match="did not finish"):
        Store(tmp_path / "out")


def test_unknown_names_and_videos_are_named(tmp_path: Path) -> None:
    store = build(tmp_path, [0])
    with pytest.raises(StoreError, match=r"no array 'flow'.*'flow_bwd'"):
        store.read("flow", 0)
    with pytest.raises(StoreError, match=r"video 5 .not part of this data set."):
        store.read("frames", 5)
    with pytest.raises(StoreError, match=r"video 77 .quarantined: torn."):
        store.read("frames", 77)


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    wrong = video(0) | {"frames": np.zeros((9, 6, 8, 3), np.uint8)}
    with pytest.raises(StoreError, match=r"uint8\[9, 6, 8, 3\], the store holds uint8\[10, 6, 8, 3\]"):
        write_shard(tmp_path, SPECS, {0: wrong}, 4)


def test_an_empty_store_is_a_store(tmp_path: Path) -> None:
    assemble(tmp_path / "out", SPECS, [], 4, manifest={"stage": "test", "quarantine": []})
    assert Store(tmp_path / "out").ids == ()


def test_flow_is_rounded_to_a_64th_of_a_pixel_and_refused_beyond_the_range() -> None:
    flow = np.random.default_rng(0).uniform(-40, 40, (3, 2, 5, 5)).astype(np.float32)
    assert np.abs(pack_flow(flow) / 32 - flow).max() <= 1 / 64 + 1e-6
    for bad in (1024.0, np.nan, np.inf):
        flow[0, 0, 0, 0] = bad
        with pytest.raises(StoreError, match="cannot be stored"):
            pack_flow(flow)
