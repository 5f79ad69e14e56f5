"""The motion of one video given to the first frame of another.

    clevrcast transfer --motion-from 15001 --start 8 --to 15003 --frame 20
    clevrcast transfer --match

A motion field belongs to places, not to objects: it moves whatever stands where the other video's objects moved. Where
that is bare ground, ground is moved, and the clip shows it. So ``--match`` looks for what fits: among the videos of a
split (or only those that are named) it takes the motion and the frame for which what moves and the objects in its way
overlap best (`fit`). How well is written into the figures as ``fit``; under a half, expect torn objects.

``--whole-objects`` mends the field instead: every object that it mostly covers moves as a whole, by the mean of what
moves on it, and nothing else does. The figures are then those of the mended motion.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.catalog import Catalog
from data.errors import EmptyError
from data.resize import resize_flow
from data.store import Store
from models.applications import MOVING_PX, whole_objects
from models.predictors.two_stream import TwoStream
from pipeline.stage import ARTIFACTS
from stages.application import OUT, Take, motion_pictures, objects_of, perform, pictures, run, shot, still

EVERY = 4
"""Every so many frames are compared by ``--match``, of motions and of targets."""
LEAST_MOVING = 0.003
"""Share of the picture that has to move: the overlap of a handful of pixels says nothing."""


@dataclass(frozen=True)
class Match:
    """Motion from frame ``start`` of ``source``, to frame ``frame`` of ``target``."""

    fit: float
    source: int
    start: int
    target: int
    frame: int


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--motion-from", type=int, metavar="VIDEO", help="whose motion")
    parser.add_argument("--start", type=int, help="its first frame (default 0, or what --match finds)")
    parser.add_argument("--to", type=int, metavar="VIDEO", help="whose first frame")
    parser.add_argument("--frame", type=int, help="which frame that is (default 0, or what --match finds)")
    parser.add_argument("--match", action="store_true", help="choose what is not named so that motion meets objects")
    parser.add_argument("--whole-objects", action="store_true", help="move whole objects, by the mean motion on them")
    parser.add_argument("--split", default="test", help="where --match looks for videos (default test)")
    return run("transfer", parser, transfer, argv)


def transfer(arguments: argparse.Namespace, predictor: TwoStream) -> None:
    """Drive the target's frame by the source's motion; see `stages.application`."""
    match = find_match(arguments, predictor) if arguments.match else _named(arguments, predictor)
    taken = shot(predictor, match.source, match.start, arguments.steps)
    first = still(predictor, match.target, match.frame)
    flow_bwd = taken.flow_bwd
    if arguments.whole_objects:
        flow_bwd = whole_objects(flow_bwd, objects_of(match.target, match.frame, *first.shape[1:]))
    sources = {
        f"motion of {match.source}": pictures(taken.frames),
        "motion": motion_pictures(flow_bwd),
        f"frame of {match.target}": pictures(first[None]) * len(taken.frames),
    }
    chosen = {"motion_from": match.source, "start": match.start, "to": match.target, "frame": match.frame}
    asked = {k: v for k, v in vars(arguments).items() if k not in ("out", "fps")} | chosen
    name = f"transfer-{match.source:05d}-{match.start}-to-{match.target:05d}-{match.frame}"
    take = Take(first, flow_bwd, sources, asked, taken.frames[1:])
    perform(predictor, take, arguments.out or OUT / name, arguments.fps, fit=round(match.fit, 4))


def _named(arguments: argparse.Namespace, predictor: TwoStream) -> Match:
    if arguments.motion_from is None or arguments.to is None:
        raise EmptyError("no videos are named", remedy="give --motion-from and --to, or --match")
    start, frame = arguments.start or 0, arguments.frame or 0
    shot(predictor, arguments.motion_from, start, arguments.steps)  # says what is wrong with the numbers
    still(predictor, arguments.to, frame)
    h, w = predictor.height, predictor.width
    value = fit(moving_from(arguments.motion_from, [start], h, w), objects_of(arguments.to, frame, h, w))[0]
    return Match(float(value), arguments.motion_from, start, arguments.to, frame)


def find_match(arguments: argparse.Namespace, predictor: TwoStream) -> Match:
    """The best `fit` among all that the arguments leave open; the first of equals.

    Raises:
        EmptyError: nothing moves enough, or no object is anywhere.
    """
    split = [
        v for v in Catalog.load(ARTIFACTS / "acquire").split(arguments.split) if v in Store(ARTIFACTS / "flow").ids
    ]
    sources = split if arguments.motion_from is None else [arguments.motion_from]
    targets = split if arguments.to is None else [arguments.to]
    length = Store(ARTIFACTS / "decode").specs["frames"]["item"][0]
    # Half the grid is enough to compare by, and four times as fast.
    h, w = predictor.height // 2, predictor.width // 2
    starts = range(0, length - arguments.steps, EVERY) if arguments.start is None else [arguments.start]
    frames = range(0, length, EVERY) if arguments.frame is None else [arguments.frame]
    moving = {v: moving_from(v, starts, h, w, unit=0.5) for v in sources}
    best: Match | None = None
    for target in targets:
        for frame in frames:
            objects = objects_of(target, frame, h, w)
            for source in sources:
                if source == target and len(split) > 1:
                    continue
                fits = fit(moving[source], objects)
                k = int(fits.argmax())
                if best is None or fits[k] > best.fit:
                    best = Match(float(fits[k]), source, starts[k], target, frame)
    if best is None or best.fit == 0:
        raise EmptyError(
            f"no motion in videos {sources} meets an object of {targets}",
            remedy="name other videos, or another --split",
        )
    return best


def moving_from(
    video: int, starts: Sequence[int], height: int, width: int, unit: float = 1.0
) -> Bool[Tensor, "n {height} {width}"]:
    """What is about to move in each of the frames ``starts``: by more than half a pixel times ``unit`` of this grid."""
    store = Store(ARTIFACTS / "flow")
    flows = torch.cat([torch.from_numpy(store.read_flow("flow_fwd", video, s, s + 1)) for s in starts])
    return resize_flow(flows, height, width).norm(dim=1) > MOVING_PX * unit


def fit(moving: Bool[Tensor, "s h w"], objects: Bool[Tensor, "n h w"]) -> Float[Tensor, " s"]:
    """Intersection over union of what moves with the objects of which at least half would move, in [0, 1].

    1: the motion has exactly the shape of these objects. 0 too where too little moves to tell.
    """
    flat, each = moving.flatten(1).float(), objects.flatten(1).float()
    overlap, size = flat @ each.T, each.sum(1)
    touched = (overlap >= 0.5 * size) & (size > 0)
    common = (overlap * touched).sum(1)
    union = flat.sum(1) + (size * touched).sum(1) - common
    return torch.where(flat.mean(1) >= LEAST_MOVING, common / union.clamp_min(1), 0.0)


if __name__ == "__main__":
    raise SystemExit(main())
