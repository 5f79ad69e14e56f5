"""Pictures: colours with known answers, films that decode to what was written, bytes that repeat."""

from __future__ import annotations

import io
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from data import picture


def uniform_flow(dx: float, dy: float) -> np.ndarray:
    return np.array([dx, dy], dtype=np.float32)[:, None, None] * np.ones((2, 2, 3), dtype=np.float32)


def colour_of(dx: float, dy: float) -> list[int]:
    return picture.flow_picture(uniform_flow(dx, dy), 1.0)[0, 0].tolist()


def middlebury(fx: float, fy: float) -> list[int]:
    """colorcode.cpp of the Middlebury flow code, line by line, returning RGB."""
    wheel: list[list[int]] = []
    wheel += [[255, 255 * i // 15, 0] for i in range(15)]
    wheel += [[255 - 255 * i // 6, 255, 0] for i in range(6)]
    wheel += [[0, 255, 255 * i // 4] for i in range(4)]
    wheel += [[0, 255 - 255 * i // 11, 255] for i in range(11)]
    wheel += [[255 * i // 13, 0, 255] for i in range(13)]
    wheel += [[255, 0, 255 - 255 * i // 6] for i in range(6)]
    rad = np.sqrt(fx * fx + fy * fy)
    fk = (np.arctan2(-fy, -fx) / np.pi + 1) / 2 * 54
    k0 = int(fk)
    out = []
    for b in range(3):
        col0, col1 = wheel[k0][b] / 255, wheel[(k0 + 1) % 55][b] / 255
        col = (1 - (fk - k0)) * col0 + (fk - k0) * col1
        col = 1 - rad * (1 - col) if rad <= 1 else col * 0.75
        out.append(int(255 * col))
    return out


def test_flow_colours_of_the_four_directions() -> None:
    assert colour_of(0, 0) == [255, 255, 255]
    assert colour_of(1, 0) == [255, 0, 0], "right is red"
    down, left, up = colour_of(0, 1), colour_of(-1, 0), colour_of(0, -1)
    assert (down[0], down[2]) == (255, 0)
    assert down[1] > 220, "down is yellow"
    assert left[0] == 0
    assert left[2] == 255
    assert left[1] > 180, "left is cyan"
    assert up[1] == 0
    assert up[2] == 255
    assert 80 < up[0] < 140, "up is violet"


def test_flow_colours_equal_the_middlebury_code() -> None:
    rng = np.random.default_rng(0)
    for dx, dy in rng.uniform(-1.2, 1.2, size=(200, 2)).astype(np.float32):
        assert np.abs(np.subtract(colour_of(dx, dy), middlebury(float(dx), float(dy)))).max() <= 1


def test_flow_scale_is_fixed_and_positive() -> None:
    half = picture.flow_picture(uniform_flow(2, 0), 4.0)[0, 0].tolist()
    assert half == [255, 127, 127]
    with pytest.raises(ValueError, match="positive, got 0"):
        picture.flow_picture(uniform_flow(1, 0), 0.0)


def test_flow_legend_points_outwards() -> None:
    wheel = picture.flow_legend(33)
    assert wheel[16, 32].tolist() == [255, 0, 0]
    assert wheel[16, 16].tolist() == [255, 255, 255]
    assert wheel[0, 0].tolist() == [255, 255, 255]


def test_overlay_marks_only_hidden_pixels() -> None:
    frame = np.full((2, 2, 3), 100, dtype=np.uint8)
    visible = np.array([[1.0, 0.0], [1.0, 0.5]])
    out = picture.occlusion_overlay(frame, visible)
    assert out[0, 0].tolist() == [100, 100, 100]
    expected = [round(0.15 * 100 + 0.85 * c) for c in picture.OCCLUDED]
    assert np.abs(out[0, 1].astype(int) - expected).max() <= 1
    assert out[1, 1, 0] > 100 > out[1, 1, 1]


def test_error_scale_is_fixed() -> None:
    truth = np.zeros((2, 2, 3), dtype=np.uint8)
    same = picture.error_picture(truth, truth)
    small = picture.error_picture(truth + np.uint8(10), truth)
    large = picture.error_picture(truth + np.uint8(64), truth)
    larger = picture.error_picture(truth + np.uint8(200), truth)
    assert same.max() < 8
    assert same.sum() < small.sum() < large.sum() == larger.sum()
    legend = picture.error_legend(20, 120)
    assert np.abs(legend[0, 60].astype(int) - picture.error_picture(truth + np.uint8(32), truth)[0, 0]).max() <= 2
    assert not np.array_equal(legend[4:-2, :16], np.roll(legend, 40, axis=1)[4:-2, :16]), "the zero is written"


def test_to_uint8_rounds_and_cuts() -> None:
    frames = np.zeros((2, 3, 1, 2), dtype=np.float32)
    frames[0, :, 0, 0] = (0.5, 1.5, -1.0)
    out = picture.to_uint8(frames)
    assert out.shape == (2, 1, 2, 3)
    assert out[0, 0, 0].tolist() == [128, 255, 0]


def test_panel_keeps_pixels_and_fits_labels() -> None:
    images = [np.full((20, 30, 3), shade, dtype=np.uint8) for shade in (10, 90, 170)]
    out = picture.panel(images, ["a", "a very long label that must shrink", "c"], columns=2, scale=2)
    assert out.shape == (2 * (40 + 26), 2 * (60 + 8), 3)
    assert (out[22:62, 4:64] == 10).all()
    assert (out[22:62, 72:132] == 90).all()
    assert (out[66 + 22 : 66 + 62, 4:64] == 170).all()
    assert (out[66:, 68:] == 250).all()
    assert out[:22].min() < 120, "labels are dark"
    assert (out[:22, 132:] == 250).all(), "and end inside their tile"


def test_panel_refuses_nothing_and_mixtures() -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="as many labels as images"):
        picture.panel([image, image], ["only one"], columns=2)
    with pytest.raises(ValueError, match="one at least"):
        picture.panel([], [], columns=2)
    with pytest.raises(ValueError, match="one size"):
        picture.panel([image, np.zeros((4, 6, 3), dtype=np.uint8)], ["a", "b"], columns=2)


def moving_square(t: int = 12, h: int = 48, w: int = 64) -> np.ndarray:
    frames = np.full((t, h, w, 3), (200, 60, 40), dtype=np.uint8)
    for k in range(t):
        frames[k, 8:24, 3 * k : 3 * k + 16] = (40, 90, 220)
    return frames


def test_film_decodes_to_what_was_written(tmp_path: Path) -> None:
    frames = moving_square()
    picture.write_video(tmp_path / "deep" / "film.mp4", frames, fps=12.5, crf=10)
    with av.open(str(tmp_path / "deep" / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12.5
        decoded = np.stack([f.to_ndarray(format="rgb24", src_colorspace="ITU709") for f in container.decode(video=0)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded[:, 30:40].astype(int) - frames[:, 30:40]).max() <= 6, "colours keep their values"
    assert np.abs(decoded.astype(int) - frames).mean() < 3
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["film.mp4"]


def test_film_bytes_repeat_and_start_with_the_index() -> None:
    first, second = (picture.encode_video(moving_square(), fps=25) for _ in range(2))
    assert first == second
    assert 0 < first.index(b"moov") < first.index(b"mdat")


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (2, 7, 8, 3), (2, 8, 9, 3)])
def test_film_refuses_odd_sides_and_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"even sides, got {shape[0]} frames of {shape[1]}x{shape[2]}"):
        picture.encode_video(np.zeros(shape, dtype=np.uint8), fps=25)


def test_png_is_lossless_and_repeats(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    picture.write_png(tmp_path / "a.png", image)
    raw = (tmp_path / "a.png").read_bytes()
    assert raw == picture.encode_png(image)
    back = cv2.imdecode(np.frombuffer(io.BytesIO(raw).read(), np.uint8), cv2.IMREAD_COLOR)
    assert back is not None
    assert np.array_equal(back[..., ::-1], image)
