"""Decoding: the right frames, the same from both decoders, and every damaged file refused with its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import VideoError
from data.picture import write_video
from data.video import VideoReader, _read_decord, _read_pyav

FRAMES, H, W = 24, 64, 96


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bright square that moves 3 px a frame."""
    frames = np.full((FRAMES, H, W, 3), 60, np.uint8)
    for t in range(FRAMES):
        frames[t, 20:40, 3 * t : 3 * t + 16] = (200, 180, 40)
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, frames, 25)
    return path


@pytest.fixture(scope="module")
def reader() -> VideoReader:
    return VideoReader(timeout=30.0)


def test_strided_frames_are_the_right_ones(clip: Path, reader: VideoReader) -> None:
    kept = range(0, FRAMES, 5)
    frames = reader.read(clip, kept, height=H, width=W, expected_frames=FRAMES)
    assert frames.shape == (len(kept), H, W, 3)
    for frame, t in zip(frames, kept, strict=True):
        columns = np.flatnonzero(frame[30, :, 0] > 130)
        assert abs(columns[0] - 3 * t) <= 1


@pytest.mark.parametrize(("height", "width"), [(H, W), (32, 64), (40, 56)])
def test_both_decoders_give_the_same_bytes(clip: Path, height: int, width: int) -> None:
    request = (str(clip), list(range(0, FRAMES, 2)), height, width, FRAMES)
    np.testing.assert_array_equal(_read_decord(*request), _read_pyav(*request))


def test_a_size_that_decord_cannot_copy_is_served_by_pyav(clip: Path, reader: VideoReader) -> None:
    with pytest.raises(Exception, match="size must exactly match"):
        _read_decord(str(clip), [0], 32, 48, FRAMES)
    assert reader.read(clip, [0, 7], height=32, width=48, expected_frames=FRAMES).shape == (2, 32, 48, 3)


@pytest.mark.real
def test_both_decoders_agree_on_a_real_video(shared: Path) -> None:
    path = next((shared / "clevrer/videos").rglob("video_00000.mp4"))
    for height, width in ((320, 480), (128, 192)):
        request = (str(path), [0, 2, 126], height, width, 128)
        np.testing.assert_array_equal(_read_decord(*request), _read_pyav(*request))


@pytest.mark.parametrize("damage", ["absent", "empty", "text", "no moov", "truncated", "wrong count"])
def test_damaged_files_are_refused_with_path_and_reason(
    clip: Path, reader: VideoReader, tmp_path: Path, damage: str
) -> None:
    path, content, expected = tmp_path / "bad.mp4", clip.read_bytes(), FRAMES
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a video")
    elif damage == "no moov":
        path.write_bytes(content.replace(b"moov", b"none"))
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "wrong count":
        path.write_bytes(content)
        expected = 128
    with pytest.raises(VideoError) as caught:
        reader.read(path, [0, 1], height=H, width=W, expected_frames=expected)
    assert str(path) in str(caught.value)
    if damage == "wrong count":
        assert "24 frames, expected 128" in str(caught.value)
    # The reader serves the next file as if nothing had happened.
    assert reader.read(clip, [0], height=H, width=W, expected_frames=FRAMES).shape == (1, H, W, 3)


def test_a_decoder_that_hangs_is_killed_and_named(clip: Path) -> None:
    with VideoReader(timeout=1e-3) as hasty, pytest.raises(VideoError, match=r"decord: no answer within 0\.001 s"):
        hasty.read(clip, [0], height=H, width=W, expected_frames=FRAMES)


def test_a_decoder_that_dies_is_replaced(clip: Path) -> None:
    with VideoReader(timeout=30.0) as reader:
        reader.read(clip, [0], height=H, width=W, expected_frames=FRAMES)
        assert reader._worker is not None
        reader._worker.kill()
        reader._worker.join()
        assert reader.read(clip, [3], height=H, width=W, expected_frames=FRAMES).shape == (1, H, W, 3)
