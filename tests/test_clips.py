"""The clip loader: the right frames beside the right flow, in an order that a seed decides."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.clips import Clip, ClipSource
from data.errors import EmptyError, StoreError
from data.store import ArraySpec, ShardPlace, Store, assemble, write_shard

T, H, W = 12, 8, 12


def store(folder: Path, spec: ArraySpec, videos: dict[int, np.ndarray]) -> Store:
    write_shard(folder / "work", [spec], {i: {spec.name: a} for i, a in videos.items()}, 8)
    place = ShardPlace(0, folder / "work", tuple(sorted(videos)), "k")
    assemble(folder / "out", [spec], [place], 8, manifest={"stage": "test", "quarantine": []})
    return Store(folder / "out")


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, Store]:
    """Frame t of video i has the grey level 10 i + t; flow k (at twice the resolution) is 2 (k + 1) px to the right."""
    frames = {
        i: np.full((T, H, W, 3), 10 * i, np.uint8) + np.arange(T, dtype=np.uint8)[:, None, None, None]
        for i in (1, 2, 5)
    }
    flow = np.zeros((T - 1, 2, 2 * H, 2 * W), np.int16)
    flow[:, 0] = 32 * 2 * (np.arange(T - 1)[:, None, None] + 1)
    visible = np.full((T - 1, 2 * H, 2 * W), 255, np.uint8)
    visible[:, :, :W] = 0
    return {
        "frames": store(
            tmp_path / "f", ArraySpec("frames", (T, H, W, 3), "uint8", ("t", "y", "x", "c"), 4, "picture"), frames
        ),
        "flow_bwd": store(
            tmp_path / "w",
            ArraySpec("flow_bwd", (T - 1, 2, 2 * H, 2 * W), "int16", ("p", "d", "y", "x"), 4, "field"),
            {1: flow, 2: flow, 5: flow},
        ),
        "visible": store(
            tmp_path / "v",
            ArraySpec("visible", (T - 1, 2 * H, 2 * W), "uint8", ("p", "y", "x"), 4, "field"),
            {1: visible, 5: visible},
        ),
    }


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_video_without_labels_is_kept_and_says_so(stores: dict[str, Store], tmp_path: Path, cache_bytes: int) -> None:
    n = 3
    specs = [
        ArraySpec("boxes", (T, n, 4), "float32", ("t", "n", "s"), 4, "table"),
        ArraySpec("presence", (T, n), "uint8", ("t", "n"), 4, "table"),
        ArraySpec("instances", (T, 2 * H, 4 * W), "uint8", ("t", "y", "x"), 4, "field"),
    ]
    boxes = np.zeros((T, n, 4), np.float32)
    boxes[:, 1] = (4, 2, 8, 6)
    arrays = {"boxes": boxes, "presence": (boxes[:, :, 2] > 0).astype(np.uint8)}
    video = arrays | {"instances": np.zeros((T, 2 * H, 4 * W), np.uint8)}
    write_shard(tmp_path / "l/work", specs, {5: video}, 8)
    place = ShardPlace(0, tmp_path / "l/work", (5,), "k", {"shard": "d" * 64})
    assemble(tmp_path / "l/out", specs, [place], 8, manifest={"stage": "test", "quarantine": []})
    labels = Store(tmp_path / "l/out")
    held = {"frames": stores["frames"], "boxes": labels, "presence": labels}
    source = ClipSource(held, height=H, width=W, videos=[1, 5], cache_bytes=cache_bytes)
    assert source.videos == (1, 5)
    assert labels.shard_digest(5) in source.digests()
    clip = source.clip([(5, 3), (1, 0)], 4)
    assert clip.require("labelled").tolist() == [1, 0]
    # The labels' grid is twice as high and four times as wide.
    assert clip.require("boxes")[0, :, 1].tolist() == [[1, 1, 2, 3]] * 4
    assert clip.require("presence")[0].tolist() == [[0, 1, 0]] * 4
    assert not clip.require("boxes")[1].any()
    assert not clip.require("presence")[1].any()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_fields_belong_together(stores: dict[str, Store], cache_bytes: int) -> None:
    source = ClipSource(stores, height=H, width=W, videos=[1, 2, 5], cache_bytes=cache_bytes)
    assert source.videos == (1, 5)  # video 2 has no visibility
    clip = source.clip([(5, 3), (1, 0)], 4)
    assert clip.video.tolist() == [5, 1]
    assert clip.start.tolist() == [3, 0]
    frames, flow, visible = (clip.require(n) for n in ("frames", "flow_bwd", "visible"))
    torch.testing.assert_close(frames[0, :, 0, 0, 0] * 255, torch.tensor([53.0, 54, 55, 56]))
    # Pair k leads from frame k + 1 back to k: the window from frame 3 holds the pairs 3, 4 and 5, at half the scale.
    torch.testing.assert_close(flow[0, :, 0, 0, 0], torch.tensor([4.0, 5, 6]))
    assert flow.shape == (2, 3, 2, H, W)
    assert visible[0, 0, 0, 0].tolist() == [0] * (W // 2) + [1] * (W // 2)


def test_a_field_that_was_not_loaded_is_an_error(stores: dict[str, Store]) -> None:
    source = ClipSource({"frames": stores["frames"]}, height=H, width=W, videos=[1])
    with pytest.raises(ValueError, match="loaded without 'flow_bwd'"):
        source.clip([(1, 0)], 3).require("flow_bwd")


def test_the_order_is_the_seeds_alone_and_resumes_anywhere(stores: dict[str, Store]) -> None:
    source = ClipSource({"frames": stores["frames"]}, height=H, width=W, videos=[1, 2, 5])

    def places(seed: int, first: int, count: int) -> list[tuple[int, int]]:
        clips = islice(source.batches(5, 7, seed=seed, first=first), count)
        return [p for c in clips for p in zip(c.video.tolist(), c.start.tolist(), strict=True)]

    whole = places(3, 0, 9)
    assert places(3, 4, 5) == whole[4 * 7 :]
    assert places(4, 0, 9) != whole
    epoch = source.windows(5)
    assert sorted(whole[: len(epoch)]) == sorted(epoch)
    assert sorted(whole[len(epoch) : 2 * len(epoch)]) == sorted(epoch)
    assert whole[: len(epoch)] != whole[len(epoch) : 2 * len(epoch)]


def test_windows_do_not_leave_the_video(stores: dict[str, Store]) -> None:
    source = ClipSource({"frames": stores["frames"]}, height=H, width=W, videos=[1])
    assert source.windows(5, 4) == [(1, 0), (1, 4)]
    assert source.windows(T) == [(1, 0)]
    with pytest.raises(EmptyError, match="13 frames does not fit into videos of 12"):
        source.windows(13)


def test_nothing_in_common_is_an_error(stores: dict[str, Store]) -> None:
    with pytest.raises(EmptyError, match="none of the 1 videos"):
        ClipSource(stores, height=H, width=W, videos=[2])


def test_frames_of_another_resolution_are_refused(stores: dict[str, Store]) -> None:
    source = ClipSource({"frames": stores["frames"]}, height=16, width=24, videos=[1])
    with pytest.raises(StoreError, match=r"\[8, 12\], the model works at \[16, 24\]"):
        source.clip([(1, 0)], 3)


def test_processes_share_every_batch_in_its_order(stores: dict[str, Store]) -> None:
    source = ClipSource({"frames": stores["frames"]}, height=H, width=W, videos=[1, 2, 5])
    whole = next(source.batches(5, 6, seed=3, first=2))
    shares = [next(source.batches(5, 6, seed=3, first=2, part=(i, 3))) for i in range(3)]
    for name in ("video", "start", "frames"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))
    with pytest.raises(ValueError, match="batch of 6 cannot be cut into 4 equal shares"):
        next(source.batches(5, 6, seed=3, part=(0, 4)))


def test_batches_are_loaded_ahead_of_their_use(stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    source = ClipSource({"frames": stores["frames"]}, height=H, width=W, videos=[1, 2, 5])
    plain, loaded = source.clip, threading.Semaphore(0)

    def clip(windows: Sequence[tuple[int, int]], length: int) -> Clip:
        loaded.release()
        return plain(windows, length)

    monkeypatch.setattr(source, "clip", clip)
    batches = source.batches(5, 6, seed=3)
    next(batches)
    for _ in range(2):
        assert loaded.acquire(timeout=20)
