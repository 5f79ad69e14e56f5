"""Stores: what is written is read, by us and by plain zarr; anything torn, missing or wrong is said."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from data.errors import StoreError
from data.files import file_digest
from data.store import (
    ArraySpec,
    ShardPlace,
    Store,
    assemble,
    bucket_ids,
    pack_flow,
    read_shard,
    write_shard,
)

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


def test_neither_order_nor_iterator_changes_the_bytes(tmp_path: Path) -> None:
    write_shard(tmp_path / "dict", SPECS, {i: video(i) for i in (8, 9, 11)}, 4)
    write_shard(tmp_path / "iterator", SPECS, ((i, video(i)) for i in (11, 8, 9)), 4)
    whole = np.zeros((4, *SPECS[0].item), np.uint8)
    whole[[0, 1, 3]] = [video(i)["frames"] for i in (8, 9, 11)]
    SPECS[0].create(tmp_path / "whole", 4, 4)[:] = whole
    files = {str(f.relative_to(tmp_path / "dict")): f for f in (tmp_path / "dict").rglob("*") if f.is_file()}
    assert {name.split("/")[0] for name in files if "/c." in name} == {spec.name for spec in SPECS}
    for name, file in files.items():
        assert file.read_bytes() == (tmp_path / "iterator" / name).read_bytes(), name
        if name.startswith("frames/"):
            assert file.read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_one_video_at_a_time_is_held(tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    held: list[int] = []

    def videos() -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for i in range(4):
            held.append(sum(reference() is not None for reference in made))
            arrays = video(i)
            made.append(weakref.ref(arrays["frames"]))
            yield i, arrays
            del arrays

    write_shard(tmp_path, SPECS, videos(), 4)
    assert max(held) <= 1
    assert len(held) == 4


def test_a_shard_without_videos_is_no_file(tmp_path: Path) -> None:
    write_shard(tmp_path, SPECS, {}, 4)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_read_back_before_it_is_in_a_store(tmp_path: Path) -> None:
    still = {name: np.zeros_like(array) for name, array in video(9).items()}  # zarr keeps no chunk of it
    write_shard(tmp_path, SPECS, {8: video(8), 9: still, 11: video(11)}, 4)
    back = read_shard(tmp_path, SPECS, [9, 11], 4)
    assert sorted(back) == [9, 11]
    for i, truth in ((9, still), (11, video(11))):
        assert sorted(back[i]) == sorted(truth)
        for name, array in truth.items():
            np.testing.assert_array_equal(back[i][name], array)
            assert back[i][name].dtype == array.dtype
    write_shard(tmp_path / "again", SPECS, {8: video(8), **back}, 4)
    for file in (f for f in (tmp_path / "again").rglob("*") if f.is_file()):
        assert file.read_bytes() == (tmp_path / file.relative_to(tmp_path / "again")).read_bytes()
    assert read_shard(tmp_path / "nothing", SPECS, [], 4) == {}


def test_a_shard_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, SPECS[1:], {8: video(8)}, 4)
    with pytest.raises(StoreError, match="frames is missing"):
        read_shard(tmp_path, SPECS, [8], 4)
    for wrong in (replace(SPECS[1], item=(9, 2, 6, 9)), replace(SPECS[1], dtype="int32")):
        with pytest.raises(StoreError, match=r"holds int16\[4, 9, 2, 6, 8\].*was expected"):
            read_shard(tmp_path, [wrong], [8], 4)
    with pytest.raises(StoreError, match=r"holds int16\[4, "):
        read_shard(tmp_path, SPECS[1:], [8], 8)


def test_every_flipped_bit_of_a_shard_is_found(tmp_path: Path) -> None:
    write_shard(tmp_path, SPECS[2:], {8: video(8)}, 4)
    shard = next((tmp_path / "boxes").glob("c.*"))
    whole = shard.read_bytes()
    for position in range(len(whole)):
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
        with pytest.raises(StoreError, match=r"boxes: video 8 cannot be decoded"):
            read_shard(tmp_path, SPECS[2:], [8], 4)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    store = build(tmp_path, [0, 2])
    for name in ("frames", "flow_bwd", "boxes"):
        shard = next((tmp_path / "out/store.zarr" / name).glob("c.*"))
        torn = bytearray(shard.read_bytes())
        torn[len(torn) // 3] ^= 16
        shard.unlink()
        shard.write_bytes(torn)
        with pytest.raises(StoreError, match=rf"{name}.*cannot be decoded"):
            _ = [store.read(name, i) for i in store.ids]


def test_a_missing_shard_is_not_read_as_zeros(tmp_path: Path) -> None:
    build(tmp_path, [0, 9])
    next((tmp_path / "out/store.zarr/frames").glob("c.*")).unlink()
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
