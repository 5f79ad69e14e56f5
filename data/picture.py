"""Pictures and films of what was measured: flow wheels, occlusion overlays, error maps, labelled panels, H.264.

Images are uint8 RGB arrays (h, w, 3). The same input gives the same bytes, so results can be compared by digest.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from jaxtyping import Float, UInt8

from data.files import replace_file

Image = UInt8[np.ndarray, "h w 3"]
Sheet = UInt8[np.ndarray, "rows cols 3"]
Film = UInt8[np.ndarray, "t h w 3"]

OCCLUDED = (255, 0, 160)
PREDICTED = (255, 214, 0)
SURE_BOX, UNSURE_BOX = 0.5, 0.2
ERROR_FULL_SCALE = 0.25
_PAPER, _INK = (250, 250, 250), (30, 30, 30)
_BT709, _LIMITED_RANGE = 1, 1
# Threads change the bytes; B-frames would make a browser's seeking start from an edit list. x264's AVX-512 code writes
# another stream nearly every time on a busy machine; its AVX2 code does not (docs/log.md).
_REPEATABLE = {"preset": "medium", "threads": "1", "bf": "0"}
if platform.machine() in ("x86_64", "AMD64"):
    _REPEATABLE["x264-params"] = "asm=avx2"


def to_uint8(frames: Float[np.ndarray, "*t c h w"]) -> UInt8[np.ndarray, "*t h w c"]:
    """Colours in [0, 1], channels first, to rounded uint8, channels last. Values outside are cut off."""
    return np.moveaxis(np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8), -3, -1)


def flow_picture(flow: Float[np.ndarray, "2 h w"], full_scale_px: float) -> Image:
    """Flow as colour: hue is direction, saturation is length; white is rest, ``full_scale_px`` is full colour.

    The wheel of Baker et al., "A Database and Evaluation Methodology for Optical Flow" (2011), as in their
    ``colorcode.cpp``: right is red, down yellow, left cyan, up violet. Longer vectors are darkened by a quarter. One
    fixed scale for all pictures of a page keeps them comparable, hence no automatic scale here.
    """
    if not full_scale_px > 0:
        raise ValueError(f"the flow that is drawn in full colour must be positive, got {full_scale_px} px")
    u, v = flow[0].astype(np.float64) / full_scale_px, flow[1].astype(np.float64) / full_scale_px
    length = np.hypot(u, v)
    wheel = _colour_wheel()
    position = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = np.floor(position).astype(int)
    blend = (position - low)[..., None]
    hue = (1 - blend) * wheel[low] + blend * wheel[(low + 1) % len(wheel)]
    inside = (length <= 1)[..., None]
    colour = np.where(inside, 1 - length[..., None] * (1 - hue), 0.75 * hue)
    return np.floor(255 * colour).astype(np.uint8)


def flow_legend(side: int) -> Image:
    """The wheel itself, ``side`` pixels square: each point shows the colour of the vector from the centre to it."""
    axis = np.linspace(-1, 1, side)
    u, v = np.meshgrid(axis, axis)
    wheel = flow_picture(np.stack([u, v]), 1.0)
    return np.where((np.hypot(u, v) <= 1)[..., None], wheel, np.uint8(255))


def _colour_wheel() -> Float[np.ndarray, "55 3"]:
    """The 55 hues of the Middlebury code: red, yellow, green, cyan, blue, magenta and back, unevenly spaced."""
    corners = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], dtype=float)
    steps = (15, 6, 4, 11, 13, 6)
    parts = [
        a + (b - a) * np.floor(255 * np.arange(n)[:, None] / n) / 255
        for a, b, n in zip(corners[:-1], corners[1:], steps, strict=True)
    ]
    return np.concatenate(parts)


def occlusion_overlay(frame: Image, visible: Float[np.ndarray, "h w"]) -> Image:
    """The frame in grey with the pixels that were not visible before in magenta (full where ``visible`` is 0)."""
    grey = np.repeat(frame.mean(axis=2, keepdims=True), 3, axis=2)
    hidden = 0.85 * (1 - np.clip(visible, 0, 1))[..., None]
    return np.round((1 - hidden) * grey + hidden * np.array(OCCLUDED)).astype(np.uint8)


def boxes_picture(
    frame: Image,
    true_boxes: Float[np.ndarray, "n 4"] | None,
    boxes: Float[np.ndarray, "s 4"] | None = None,
    sure: Float[np.ndarray, " s"] | None = None,
    *,
    scale: int = 2,
) -> Sheet:
    """The frame, ``scale`` times as large, with true boxes in white and predicted ones in yellow.

    Boxes are (x0, y0, x1, y1) in pixels of the frame, ends exclusive. ``sure`` is the presence of the predicted ones
    (1 without it): thick from `SURE_BOX` on, thin from `UNSURE_BOX` on, and left out below.
    """
    out = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    for box in () if true_boxes is None else true_boxes:
        _rectangle(out, box * scale, (255, 255, 255), 1)
    presence = np.ones(0 if boxes is None else len(boxes)) if sure is None else sure
    for box, p in zip(() if boxes is None else boxes, presence, strict=True):
        if p >= UNSURE_BOX:
            _rectangle(out, box * scale, PREDICTED, 2 if p >= SURE_BOX else 1)
    return out


def _rectangle(image: Image, box: Float[np.ndarray, " 4"], colour: tuple[int, int, int], width: int) -> None:
    x0, y0, x1, y1 = (int(v) for v in np.round(box))
    cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), colour, width)


def error_picture(prediction: Image, truth: Image, full_scale: float = ERROR_FULL_SCALE) -> Image:
    """Mean absolute difference over channels on a fixed scale: black is none, pale yellow ``full_scale`` or more
    (1 is the full range of colour). Colour map: inferno."""
    difference = np.abs(prediction.astype(np.float64) - truth.astype(np.float64)).mean(axis=2) / 255
    return _heat(difference / full_scale)


def error_legend(height: int, width: int, full_scale: float = ERROR_FULL_SCALE) -> Image:
    """A horizontal bar of the scale of `error_picture` with its ends written in figures."""
    bar = _heat(np.tile(np.linspace(0, 1, width), (height, 1)))
    _write(bar, "0", (4, height - 5), 0.4, (255, 255, 255))
    text = f"{full_scale:g}"
    _write(bar, text, (width - 4 - _text_width(text, 0.4), height - 5), 0.4, (0, 0, 0))
    return bar


def panel(images: Sequence[Image], labels: Sequence[str], *, columns: int, scale: int = 1) -> Sheet:
    """Images of one size in rows of ``columns``, each below its label, enlarged ``scale`` times without blurring.

    Labels shrink until they fit the width; both sides are padded to even numbers, so a panel can be filmed. Raises
    `ValueError` for no images, or other numbers of labels or sizes.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"a panel needs as many labels as images, and one at least: {len(labels)}, {len(images)}")
    sizes = sorted({image.shape for image in images})
    if len(sizes) > 1:
        raise ValueError(f"the images of a panel need one size, got {sizes}")
    tiles = [_labelled(image, label, scale) for image, label in zip(images, labels, strict=True)]
    blank = np.full_like(tiles[0], _PAPER[0])
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    sheet = np.concatenate(rows, axis=0)
    return np.pad(sheet, ((0, sheet.shape[0] % 2), (0, sheet.shape[1] % 2), (0, 0)), constant_values=_PAPER[0])


def _labelled(image: Image, label: str, scale: int) -> Sheet:
    h, w = scale * image.shape[0], scale * image.shape[1]
    margin, bar = 4, 22
    out = np.full((h + bar + margin, w + 2 * margin, 3), _PAPER, dtype=np.uint8)
    out[bar : bar + h, margin : margin + w] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    size = min(0.5, 0.5 * w / max(_text_width(label, 0.5), 1))
    _write(out, label, (margin, bar - 6), size, _INK)
    return out


def _heat(values: Float[np.ndarray, "h w"]) -> Image:
    scaled = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def _text_width(text: str, size: float) -> int:
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0]


def _write(image: Image, text: str, at: tuple[int, int], size: float, colour: tuple[int, int, int]) -> None:
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def encode_png(image: Image) -> bytes:
    """The image as PNG."""
    done, buffer = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"OpenCV could not encode an image of shape {image.shape} as PNG")
    return buffer.tobytes()


def write_png(path: Path, image: Image) -> None:
    """`encode_png` to a file, which appears complete or not at all."""
    replace_file(path, encode_png(image))


def encode_video(frames: Film, fps: int | float, crf: int = 18) -> bytes:
    """H.264 in MP4 that every browser plays: yuv420p, BT.709, index first. The same frames give the same bytes.

    ``crf`` from 0 (exact but for colour sampling) to 51. Raises `ValueError` for no frames or odd sides: yuv420p
    halves both, and cropping silently would move pixels.
    """
    t, h, w, _ = frames.shape
    if t == 0 or h % 2 or w % 2 or min(h, w) == 0:
        raise ValueError(f"H.264 needs at least one frame and even sides, got {t} frames of {h}x{w} (height x width)")
    rate = Fraction(fps).limit_denominator(1001)
    # The index moves to the front in a second pass that reopens the file by name, so memory alone will not do.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        with av.open(str(path), "w", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), **_REPEATABLE})
            stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
            codec = stream.codec_context
            codec.colorspace, codec.color_primaries, codec.color_trc = _BT709, _BT709, _BT709
            codec.color_range = _LIMITED_RANGE
            for array in frames:
                image = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
                yuv = image.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                container.mux(stream.encode(yuv))
            container.mux(stream.encode(None))
        return path.read_bytes()


def write_video(path: Path, frames: Film, fps: int | float, crf: int = 18) -> None:
    """`encode_video` to a file, which appears complete or not at all."""
    replace_file(path, encode_video(frames, fps, crf))
