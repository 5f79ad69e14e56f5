"""How closely the camera and the primitives of `data` fit released videos.

    python -m benchmarks.camera_fit [FOLDER_IN_CLEVRER_LAYOUT] [--stride N]

The picture's own evidence is the foreground: pixels that differ from the background (the median over all videos,
CLEVRER's never changes) by more than a shadow can explain; of gray bodies the half above their shadow. It is compared
with ray-cast masks of objects that stand alone and wholly inside the picture: IoU of the masks, and distance between
their centroids.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from data.camera import Camera
from data.clevrer import Annotation, discover, read_annotation
from data.raycast import Scene, cast, image_boxes

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "clevrer"
MARGIN = 6  # pixels that must be free around an object


@dataclass(frozen=True)
class Isolated:
    """One object that stands alone in one frame: its foreground and its ray-cast mask in a window (x0, y0)."""

    video: int
    frame: int
    slot: int
    shape: str
    color: str
    material: str
    window: tuple[int, int, int, int]
    foreground: Bool[np.ndarray, "h w"]
    mask: Bool[np.ndarray, "h w"]

    @property
    def iou(self) -> float:
        return float((self.foreground & self.mask).sum() / (self.foreground | self.mask).sum())

    @property
    def offset(self) -> Float[np.ndarray, "2"]:
        """Centroid of the ray-cast mask minus centroid of the foreground (x, y), in pixels."""
        a, b = (np.argwhere(m).mean(0)[::-1] for m in (self.mask, self.foreground))
        return a - b


def background(videos: list[UInt8[np.ndarray, "t h w 3"]]) -> Float[np.ndarray, "h w 3"]:
    return np.median(np.concatenate(videos), axis=0)


def foreground(
    frame: UInt8[np.ndarray, "h w 3"], behind: Float[np.ndarray, "h w 3"], *, gray: bool
) -> Bool[np.ndarray, "h w"]:
    """Object pixels. A shadow multiplies the background by one factor and turns its colour by at most 6 degrees of
    RGB space, even where it catches coloured light; a coloured object turns it by about 17, so half of that is its
    border. Gray bodies (``gray``) are told from the ground by brightness, which takes shadows along."""
    c = cv2.GaussianBlur(frame.astype(np.float32), (0, 0), 0.6)
    b = np.maximum(behind.astype(np.float32), 1)
    factor = (c * b).sum(-1) / (b * b).sum(-1)
    cosine = (c * b).sum(-1) / np.maximum(np.linalg.norm(c, axis=-1) * np.linalg.norm(b, axis=-1), 1e-6)
    found = (factor < 0.82) if gray else (cosine < np.cos(np.radians(8.5))) | (factor < 0.42)
    found = (found | (factor > 1.1)).astype(np.uint8)
    found = cv2.morphologyEx(found, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    contours, _ = cv2.findContours(found, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros_like(found)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    return cv2.morphologyEx(filled, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) > 0


def isolated_objects(
    annotation: Annotation, video: UInt8[np.ndarray, "t h w 3"], behind: Float[np.ndarray, "h w 3"], stride: int
) -> list[Isolated]:
    """Every object that stands alone (no other box within `MARGIN`) and wholly inside, every ``stride`` frames."""
    cam = Camera.clevrer()
    frames = range(0, annotation.frames, stride)
    scene = Scene.of(annotation, frames)
    boxes, instance = image_boxes(scene, cam).numpy(), cast(scene, cam).instance.numpy()
    out = []
    for i, t in enumerate(frames):
        found = {gray: foreground(video[t], behind, gray=gray) for gray in (False, True)}
        for k, p in enumerate(annotation.properties):
            x0, y0, x1, y1 = boxes[i, k] + np.array([-1, -1, 1, 1]) * MARGIN
            others = np.delete(boxes[i], k, axis=0)
            free = (others[:, 0] > x1) | (others[:, 2] < x0) | (others[:, 1] > y1) | (others[:, 3] < y0)
            if not free.all() or x1 < x0 or x0 < 0 or y0 < 0 or x1 >= cam.width or y1 >= cam.height:
                continue
            window = (int(x0), int(y0), int(x1) + 1, int(y1) + 1)
            if p.color == "gray":  # its shadow cannot be told from it, and falls below the centre
                window = (*window[:3], int((y0 + y1) / 2))
            cut = (slice(window[1], window[3]), slice(window[0], window[2]))
            blobs = found[p.color == "gray"][cut]
            _, label, stats, _ = cv2.connectedComponentsWithStats(blobs.astype(np.uint8))
            blob = label == 1 + stats[1:, cv2.CC_STAT_AREA].argmax() if len(stats) > 1 else blobs
            mask = instance[i][cut] == k
            out.append(Isolated(annotation.scene_index, t, k, p.shape, p.color, p.material, window, blob, mask))
    return out


def load(root: Path) -> tuple[list[tuple[Annotation, np.ndarray]], np.ndarray]:
    """The annotated videos below ``root`` and the background of all of them."""
    import decord  # torch is imported first on purpose: decord's libraries must not come before torch's

    found = discover(root)
    clips = {f.id: decord.VideoReader(str(f.video), num_threads=1) for f in found}
    behind = background([r.get_batch(list(range(0, len(r), 16))).asnumpy() for r in clips.values()])
    annotated = [(read_annotation(f.annotation), f.id) for f in found if f.annotation is not None]
    return [(a, clips[k].get_batch(list(range(a.frames))).asnumpy()) for a, k in annotated], behind


def table(cases: list[Isolated]) -> str:
    lines = ["group            objects  IoU median   p10   centroid error median   p90    mean dx     dy   area ratio"]
    groups = sorted({c.shape for c in cases}) + sorted({f"{c.material} {c.shape}" for c in cases}) + ["all"]
    for group in groups:
        of = [c for c in cases if group in (c.shape, f"{c.material} {c.shape}", "all")]
        iou, offset = np.array([c.iou for c in of]), np.stack([c.offset for c in of])
        error = np.linalg.norm(offset, axis=1)
        ratio = np.median([c.mask.sum() / c.foreground.sum() for c in of])
        lines.append(
            f"{group:15s} {len(of):8d} {np.median(iou):11.3f} {np.quantile(iou, 0.1):5.3f} "
            f"{np.median(error):23.2f} {np.quantile(error, 0.9):5.2f} "
            f"{offset[:, 0].mean():10.2f} {offset[:, 1].mean():6.2f} {ratio:12.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--stride", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    videos, behind = load(args.root)
    cases = [c for a, v in videos for c in isolated_objects(a, v, behind, args.stride)]
    print(table(cases))


if __name__ == "__main__":
    main()
