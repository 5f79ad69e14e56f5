"""What autoencoders are given: the images of stored videos, held in memory up to a limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data.store import ArraySpec, ShardPlace, Store, assemble, write_shard
from stages.images import Images

T, H, W = 4, 8, 12


def test_videos_are_held_up_to_the_limit_and_read_singly_past_it(tmp_path: Path) -> None:
    spec = ArraySpec("frames", (T, H, W, 3), "uint8", ("t", "y", "x", "c"), 4, "picture")
    rng = np.random.default_rng(0)
    videos = {i: {"frames": rng.integers(0, 255, (T, H, W, 3), dtype=np.uint8)} for i in range(3)}
    write_shard(tmp_path / "work", [spec], videos, 8)
    place = ShardPlace(0, tmp_path / "work", tuple(videos), "k")
    assemble(tmp_path / "out", [spec], [place], 8, manifest={"stage": "test", "quarantine": []})
    store = Store(tmp_path / "out")
    every, some = (
        Images(store, "frames", [0, 1, 2], height=H, width=W, cache_bytes=limit)
        for limit in (1 << 30, T * H * W * 3 + 1)
    )
    for mine, theirs, _ in zip(every.batches(3, 1), some.batches(3, 1), range(5), strict=False):
        assert torch.equal(mine, theirs)
    assert len(every._held) == 3
    assert len(some._held) == 2  # the second begins below the limit
    assert some._held_bytes == sum(held.nbytes for held in some._held.values())
