"""How large a store will be: known answers, the truth on real videos, and a disk that is too small for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.clevrer import FRAMES, annotation_path, official_split, read_annotation, video_path
from data.labels import label_video
from data.store import ArraySpec, pack_flow, write_shard
from data.video import VideoReader
from models.flow_teachers import build_teacher
from models.static_gate import gate_flow
from pipeline import size_estimate
from pipeline.errors import DiskFullError
from pipeline.journal import BadItem, Unit, finished_sizes
from pipeline.progress import Tick
from pipeline.shards import build_units
from pipeline.size_estimate import RATIOS, Motion, Ratio, announce, estimate, readable
from stages.fields import flow_specs, visible_spec
from stages.label import specs as label_specs

FRAMES_SPEC = ArraySpec("frames", (4, 10, 10, 3), "uint8", ("time", "y", "x", "channel"), 4, "picture")
FLOW, VISIBLE = flow_specs(3, 10, 10, 4), visible_spec(3, 10, 10, 4)


def test_before_any_shard_the_ratios_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(size_estimate.RATIOS, "frames 160x240", Ratio(100.0, 50.0, 200.0))
    monkeypatch.setitem(size_estimate.RATIOS, "true flow", Ratio(10.0, 5.0, 20.0))
    size = estimate([FRAMES_SPEC], 3)  # 1200 raw bytes a video
    assert (size.raw, size.bytes, size.low, size.high) == (3600, 360, 120, 1080)
    size = estimate([FRAMES_SPEC, *FLOW], 3, motion="true")  # and 1200 for each direction
    assert (size.raw, size.bytes, size.low, size.high) == (10800, 432, 144, 1296)


def test_finished_shards_are_counted_and_extrapolated() -> None:
    size = estimate([FRAMES_SPEC], 20, [(4, 400), (4, 800), (0, 0)])
    assert (size.bytes, size.low, size.high) == (3000, round(1200 + 1200 / 1.1), round(1200 + 2400 * 1.1))
    assert size.basis == "8 finished videos"
    whole = estimate([FRAMES_SPEC], 8, [(4, 400), (4, 800)])
    assert whole.bytes == whole.low == whole.high == 1200


def test_noise_costs_and_no_video_costs_nothing() -> None:
    order: tuple[Motion, ...] = ("true", "gated", "ungated")
    for specs in (FLOW, [VISIBLE]):
        sizes = [estimate(specs, 100, motion=motion) for motion in order]
        assert sizes[0].bytes < sizes[1].bytes < sizes[2].bytes
        assert all(0 < s.low < s.bytes < s.high for s in sizes)
    assert estimate(FLOW, 0).high == 0


def test_the_ratios_are_those_of_the_document(root: Path) -> None:
    table = (root / "docs/storage.md").read_text().split("defaults:begin")[1].split("defaults:end")[0]
    rows = {}
    for line in table.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in RATIOS:
            rows[name] = Ratio(*(float(cell) for cell in cells[1:]))
    assert rows.keys() == RATIOS.keys()
    for name, row in rows.items():  # a teacher's bfloat16 differs a little from machine to machine
        assert vars(row) == pytest.approx(vars(RATIOS[name]), rel=0.05), name


@pytest.mark.real
def test_real_videos_lie_in_the_range_and_within_a_factor_of_two(shared: Path, tmp_path: Path) -> None:
    """Three videos at other sizes than the ratios were measured at, two of them not measured for flow."""
    clevrer, kept, (h, w) = shared / "clevrer", range(0, FRAMES, 2), (160, 240)
    frames_spec = ArraySpec("frames", (len(kept), 128, 192, 3), "uint8", ("time", "y", "x", "channel"), 16, "picture")
    flow = flow_specs(len(kept) - 1, h, w, 16)
    stores: dict[Motion, tuple[list[ArraySpec], dict[int, dict[str, np.ndarray]]]] = {
        "gated": ([frames_spec, *flow], {}),
        "true": (label_specs(len(kept), h, w, 16), {}),
    }
    with VideoReader() as reader:
        for video in (0, 3, 10):
            path = clevrer / video_path(official_split(video), video)
            small = reader.read(path, kept, height=128, width=192, expected_frames=FRAMES)
            large = torch.from_numpy(reader.read(path, kept, height=h, width=w, expected_frames=FRAMES))
            pair = gate_flow(build_teacher("dis")(large), large, radius=8)
            both = {"flow_fwd": pack_flow(pair.flow_fwd.numpy()), "flow_bwd": pack_flow(pair.flow_bwd.numpy())}
            stores["gated"][1][video] = {"frames": small, **both}
    for video in (3000, 4000):
        labels = label_video(read_annotation(clevrer / annotation_path("train", video)), kept, h, w)
        both = {"flow_fwd": pack_flow(labels.flow_fwd), "flow_bwd": pack_flow(labels.flow_bwd)}
        stores["true"][1][video] = {**vars(labels), **both, "visible": labels.visible * np.uint8(255)}
    for motion, (specs, videos) in stores.items():
        write_shard(tmp_path / motion, specs, dict(enumerate(videos.values())), 4)
        truth = sum(f.stat().st_size for f in (tmp_path / motion).rglob("*") if f.is_file() and f.name != "zarr.json")
        size = estimate(specs, len(videos), motion=motion)
        assert size.low <= truth <= size.high, (motion, truth, size)
        assert truth / 2 <= size.bytes <= truth * 2, (motion, truth, size)


UNITS = [Unit((4 * k, 4 * k + 1), (f"{k}",), f"videos {k}", k) for k in range(3)]
SPEC = ArraySpec("frames", (64, 100, 100, 3), "uint8", ("time", "y", "x", "channel"), 16, "picture")


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))


def test_what_will_be_taken_is_said_and_a_small_disk_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = estimate([SPEC], 6)
    free(monkeypatch, size.low + 1)
    announce("decode", size, 0, tmp_path / "work")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert readable(size.low) in said
    assert "ratios measured on real videos" in said
    free(monkeypatch, size.low - 1)
    said = f"at least {readable(size.low)} .* {readable(size.low - 1)} free"
    with pytest.raises(DiskFullError, match=said) as caught:
        announce("decode", size, 0, tmp_path / "work")
    assert "acquire.videos" in caught.value.remedy


def test_finished_shards_are_neither_guessed_nor_needed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        (folder / "shard").write_bytes(bytes(2_200_000))
        return []

    build_units(tmp_path, UNITS[:2], make, what="t")
    finished = finished_sizes(tmp_path, UNITS)
    assert finished == [(2, 2_200_000), (2, 2_200_000)]
    capsys.readouterr()
    free(monkeypatch, 2_000_000)  # two videos more, 1.1 MB each or a tenth less
    announce("decode", estimate([SPEC], 6, finished), 4_400_000, tmp_path)
    said = capsys.readouterr().out
    assert "about 6.6 MB (6.4 MB to 6.8 MB, from 4 finished videos), 4.4 MB of it are there; 2.0 MB free" in said
    free(monkeypatch, 1_999_999)
    with pytest.raises(DiskFullError, match=r"at least 2.0 MB"):
        announce("decode", estimate([SPEC], 6, finished), 4_400_000, tmp_path)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (31e9, "31.0 GB"), (2.5e15, "2500.0 TB")]
)
def test_sizes_are_readable(size: float, text: str) -> None:
    assert readable(size) == text
