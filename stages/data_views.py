"""What acquire, decode, label, flow and occlusion made of a video, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import Float32, UInt8

from data.annotation import read_annotation
from data.camera import Camera
from data.catalog import Catalog
from data.clevrer import (
    FPS,
    FRAMES,
    HEIGHT,
    MAX_OBJECTS,
    WIDTH,
    Annotation,
    annotation_path,
    official_split,
    video_path,
)
from data.errors import StoreError
from data.labels import visible_boxes
from data.overlay import banner, draw_boxes, draw_masks, flow_footer, time_line
from data.picture import flow_picture, occlusion_overlay
from data.raycast import Scene, cast
from data.resize import resize_field, resize_flow
from data.video import VideoReader
from models.metrics import score
from models.reconstruction import flow_quality
from models.statistics import state_of, visibility_statistics
from pipeline.params import Params
from stages.shelf import Progress, Shelf, is_finished, listed, output, shelf, shelf_if_any
from stages.view import Footer, Tiles, View, flow_scale

_CAST_FRAMES = 32
"""Frames whose rays are cast at once: what bounds the memory."""
_LINGERS = 12
"""Frames at full rate for which a collision stays written over the picture."""


def acquire(video: int, params: Params) -> View:
    """The source video, with the annotated boxes, ids and collisions where there are any."""
    path, note, told = _source(video)
    facts = _facts(path)
    frames = _frames(path, range(FRAMES), params)
    told = f"video_{video:05d} at {path}: {facts}, {told}"
    title = f"video_{video:05d}, frame {{}}, {facts}"
    if note is None:
        plain = (f"{told}. It has no annotation",)
        return View(FRAMES, lambda k: [(title.format(k), frames[k])], 1, FPS, (_line(FRAMES, ()),), plain)
    annotation = read_annotation(note)
    boxes = _true_boxes(annotation)
    names = [f"{p.object_id} {p.color} {p.shape}" for p in annotation.properties]
    collisions = sorted((c.frame, *c.object_ids) for c in annotation.collisions)
    ids = annotation.object_ids.tolist()

    def tiles(k: int) -> Tiles:
        struck = [any(at == k and i in pair for at, *pair in collisions) for i in ids]
        image = draw_boxes(frames[k], boxes[k], names, struck)
        recent = [f"{a}+{b} at {at}" for at, a, b in collisions if at <= k < at + _LINGERS]
        if recent:
            image = banner(image, f"collision {', '.join(recent)}")
        return [(title.format(k), frames[k]), ("annotated objects and collisions", image)]

    said = f"{told}. {len(ids)} objects; collisions: {_collisions(collisions)}"
    marks = [at for at, *_ in collisions]
    return View(FRAMES, tiles, 2, FPS, (_line(FRAMES, marks),), (said,))


def decode(video: int, params: Params) -> View:
    """Frames as they are stored."""
    found = shelf("decode", video)
    frames = found["frames"]
    t, h, w, _ = frames.shape
    every = params.decode.stride
    said = f"{t} frames of {h}x{w}, one of every {every} of the source; mean colour {frames.mean() / 255:.3f}"

    def tiles(k: int) -> Tiles:
        return [(f"video_{video:05d}, stored frame {k} (source {k * every})", frames[k])]

    return View(t, tiles, 1, FPS / every, (_line(t, ()),), (said, *_notes(found)))


def label(video: int, params: Params) -> View:
    """Boxes, masks, collisions, true flow and visibility."""
    found = shelf("label", video)
    instances, boxes, pairs, visible = (found[n] for n in ("instances", "boxes", "collision_pairs", "visible"))
    fwd, bwd = found.flow("flow_fwd"), found.flow("flow_bwd")
    t, h, w = instances.shape
    frames, scale = _kept(video, t, h, w, params), flow_scale(fwd, bwd)
    marks = np.flatnonzero(found["collision"]).tolist()
    names = [str(k) for k in range(MAX_OBJECTS)]
    struck = [(k, *(int(i) for i in pair)) for k in marks for pair in np.argwhere(np.triu(pairs[k]))]

    def tiles(k: int) -> Tiles:
        image = draw_boxes(frames[k], boxes[k], names, pairs[k].any(axis=1).tolist())
        recent = [f"{a}+{b} at {at}" for at, a, b in struck if at <= k < at + _LINGERS // 2]
        image = banner(image, f"collision {', '.join(recent)}") if recent else image
        seen = visible[k - 1] / 255 if k else np.ones((h, w))
        return [
            (f"video_{video:05d}, frame {k}: boxes", image),
            ("masks with the slots of the objects", draw_masks(frames[k], instances[k])),
            ("hidden in the frame before" if k else "nothing comes before", occlusion_overlay(frames[k], seen)),
            ("frame", frames[k]),
            (f"true flow to frame {k + 1}" if k < t - 1 else "no next frame", _wheel(fwd, k, scale, frames[k])),
            (f"true flow back to frame {k - 1}" if k else "no frame before", _wheel(bwd, k - 1, scale, frames[k])),
        ]

    present = found["presence"].any(axis=0)
    said = (
        f"{present.sum()} objects, at most {found['presence'].sum(axis=1).max()} in view at once; collisions at "
        f"stored frames: {_collisions(struck)}; the fastest pixel moves {np.linalg.norm(bwd, axis=1).max():.1f} px"
    )
    footers = (_line(t, marks), _wheel_key(scale))
    return View(t, tiles, 3, FPS / params.decode.stride, footers, (said, *_notes(found)))


def flow(video: int, params: Params) -> View:
    """The teacher's flow both ways on one scale, beside the truth with its end-point error where labelled."""
    found = shelf("flow", video)
    ways = {"forward": found.flow("flow_fwd"), "backward": found.flow("flow_bwd")}
    t, _, h, w = ways["forward"].shape
    frames, truth = _kept(video, t + 1, h, w, params), shelf_if_any("label", video)
    true = {}
    if truth is not None:
        arrays = {"forward": "flow_fwd", "backward": "flow_bwd"}
        true = {way: resize_flow(torch.from_numpy(truth.flow(name)), h, w).numpy() for way, name in arrays.items()}
    scale = flow_scale(*(true or ways).values())

    def tiles(k: int) -> Tiles:
        rows: Tiles = []
        for way, at, to in (("forward", k, k + 1), ("backward", k + 1, k)):
            rows.append((f"video_{video:05d}, frame {at}", frames[at]))
            error = f", EPE {np.linalg.norm(ways[way][k] - true[way][k], axis=0).mean():.3f} px" if true else ""
            rows.append((f"{way}, {at} to {to}{error}", flow_picture(ways[way][k], scale)))
            if true:
                rows.append((f"truth {way}", flow_picture(true[way][k], scale)))
        return rows

    said = f"{params.flow.teacher} at {h}x{w}, {t} pairs"
    if true:
        quality = flow_quality(torch.from_numpy(ways["backward"]), torch.from_numpy(true["backward"]))
        said += f"; backward EPE {quality['epe']:.3f} px, {_known(quality['epe_moving'], ' px')} where things move"
    else:
        said += "; not labelled, so nothing to compare it with"
    footers = (_line(t, ()), _wheel_key(scale))
    return View(t, tiles, 3 if true else 2, FPS / params.decode.stride, footers, (said, *_notes(found)), "pair")


def occlusion(video: int, params: Params) -> View:
    """What of each frame was hidden in the one before, and the truth where labelled."""
    found = shelf("occlusion", video)
    visible = found["visible"].astype(np.float32) / 255
    t, h, w = visible.shape
    frames, truth = _kept(video, t + 1, h, w, params), shelf_if_any("label", video)
    true = None
    if truth is not None:
        true = resize_field(torch.from_numpy(truth["visible"]).float()[:, None] / 255, h, w)[:, 0].numpy()

    def tiles(k: int) -> Tiles:
        shown = [(f"frame {k}", frames[k]), (f"video_{video:05d}, frame {k + 1}", frames[k + 1])]
        for name, field in (("hidden before, estimated", visible), ("hidden before, truth", true)):
            if field is not None:
                share = (field[k] <= 0.5).mean()
                shown.append((f"{name}: {share:.2%}", occlusion_overlay(frames[k + 1], field[k])))
        return shown

    said = f"{(visible <= 0.5).mean():.2%} of all pixels were hidden in the frame before"
    if true is not None:
        said += f", in truth {(true <= 0.5).mean():.2%}; F1 of the hidden {_hidden_f1(video, visible, true)}"
    line = _line(t, ())
    return View(t, tiles, 2, FPS / params.decode.stride, (line,), (said, *_notes(found)), "pair")


def _hidden_f1(video: int, visible: Float32[np.ndarray, "p h w"], true: Float32[np.ndarray, "p h w"]) -> str:
    said, truth = (torch.from_numpy(field)[:, None, None] for field in (visible, true))
    state = state_of(np.full(len(visible), video), visibility_statistics(said, truth))
    name = "nonvisible_f1"
    return f"{score(state, np.random.default_rng(0), names=(name,), resamples=0)[name].overall.value:.3f}"


def _source(video: int) -> tuple[Path, Path | None, str]:
    """The file of a video, its annotation, and a clause about its split."""
    if not is_finished("acquire"):
        progress = Progress.of("acquire")
        built, split = progress.of_video(video), official_split(video)
        note = built.folder / annotation_path(split, video)
        return built.folder / video_path(split, video), note if note.exists() else None, str(progress)
    catalog = Catalog.load(output("acquire"))
    for item in catalog.videos:
        if item.id == video:
            note = catalog.root / item.annotation if item.annotation else None
            return catalog.root / item.video, note, f"split {item.split}"
    reasons = [f": it is in quarantine, {q['reason']}" for q in catalog.quarantine if q["id"] == video]
    raise StoreError(
        f"acquire holds no video {video}{''.join(reasons)}",
        remedy=f"choose one of its videos: {listed(tuple(v.id for v in catalog.videos))}",
    )


def _facts(path: Path) -> str:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return f"{stream.width}x{stream.height}, {float(stream.average_rate or 0):g} frames/s"


def _frames(
    path: Path, frames: Sequence[int], params: Params, h: int = HEIGHT, w: int = WIDTH
) -> UInt8[np.ndarray, "t {h} {w} 3"]:
    with VideoReader(timeout=params.decode.timeout) as reader:
        return reader.read(path, frames, height=h, width=w, expected_frames=FRAMES)


def _kept(video: int, t: int, h: int, w: int, params: Params) -> UInt8[np.ndarray, "{t} {h} {w} 3"]:
    """The source's frames that stages work on, on the grid of one of them."""
    kept = range(0, params.decode.frames, params.decode.stride)
    if len(kept) != t:
        raise StoreError(
            f"the store is of {t} frames a video, params.yaml says {len(kept)}", remedy="run `dvc repro` first"
        )
    return _frames(_source(video)[0], kept, params, h, w)


def _true_boxes(annotation: Annotation) -> Float32[np.ndarray, "t n 4"]:
    camera, parts = Camera.clevrer(HEIGHT, WIDTH), []
    for start in range(0, FRAMES, _CAST_FRAMES):
        hits = cast(Scene.of(annotation, list(range(start, min(start + _CAST_FRAMES, FRAMES))), "cpu"), camera)
        parts.append(visible_boxes(hits, len(annotation.properties))[0])
    return np.concatenate(parts)


def _wheel(flows: Float32[np.ndarray, "p 2 h w"], k: int, scale: float, like: np.ndarray) -> np.ndarray:
    """Pair k, or white where there is none."""
    return flow_picture(flows[k], scale) if 0 <= k < len(flows) else np.full_like(like, 255)


def _wheel_key(scale: float) -> Footer:
    text = f"optical flow: hue is direction, saturation is speed, full colour {scale:g} px per step, darker is faster"
    return lambda k, width: flow_footer(width, text)


def _line(steps: int, marks: Sequence[int]) -> Footer:
    def draw(k: int, width: int) -> np.ndarray:
        near = ", ".join(map(str, marks))
        return time_line(width, k, steps, marks, f"{k} of {steps - 1}" + (f"; collisions at {near}" if near else ""))

    return draw


def _collisions(found: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(f"{a}+{b} at {at}" for at, a, b in found) or "none"


def _known(value: float | None, unit: str) -> str:
    return "undefined" if value is None else f"{value:.3f}{unit}"


def _notes(found: Shelf) -> tuple[str, ...]:
    return (found.note,) if found.note else ()


VIEWS = {"acquire": acquire, "decode": decode, "label": label, "flow": flow, "occlusion": occlusion}
