"""A still image set in motion: by the motion of a video, or by one that is drawn.

    clevrcast animate --video 15000 --frame 20 --move 96,70,3,0,14
    clevrcast animate --image photo.png --motion-from 15001 --start 8

``--move x,y,dx,dy,radius`` moves what stands at pixel (x, y) by (dx, dy) pixels (right, down) a step, all on the
model's grid (`decode.resolution`): the annotated object there, if the image is a frame of an annotated video and an
object is there, else a disc of that radius. ``--motion-from`` takes the teacher's flow of a stored video from frame
``--start`` on; it moves whatever stands where that video's objects were.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from models.applications import disc, move_region
from models.predictors.two_stream import TwoStream
from stages.application import (
    OUT,
    Take,
    instances,
    motion_pictures,
    perform,
    picture,
    pictures,
    run,
    shot,
    still,
)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with one message."""
    return run("animate", _parser(), animate, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    image = parser.add_mutually_exclusive_group(required=True)
    image.add_argument("--image", type=Path, help="the still image, a file")
    image.add_argument("--video", type=int, help="the still image, a frame of this video")
    parser.add_argument("--frame", type=int, default=0, help="which frame of --video (default 0)")
    motion = parser.add_mutually_exclusive_group(required=True)
    motion.add_argument("--motion-from", type=int, metavar="VIDEO", help="the motion of this video")
    motion.add_argument("--move", type=_move, metavar="X,Y,DX,DY,RADIUS", help="the motion of one region")
    parser.add_argument("--start", type=int, default=0, help="the frame of --motion-from to begin at (default 0)")
    return parser


def _move(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 5 or numbers[4] <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y,DX,DY,RADIUS, five numbers in pixels")
    return numbers


def animate(arguments: argparse.Namespace, predictor: TwoStream) -> None:
    """Drive the image by the motion; see `stages.application`."""
    if arguments.image is not None:
        first, name = picture(predictor, arguments.image), arguments.image.stem
    else:
        first, name = still(predictor, arguments.video, arguments.frame), f"{arguments.video:05d}-{arguments.frame}"
    elsewhere = None
    if arguments.move is not None:
        flow_bwd = drawn_motion(arguments, first)
        sources, motion = {}, "-".join(["move", *(f"{number:g}" for number in arguments.move)])
    else:
        taken = shot(predictor, arguments.motion_from, arguments.start, arguments.steps)
        flow_bwd, elsewhere = taken.flow_bwd, taken.frames[1:]
        sources, motion = {"motion of": pictures(taken.frames)}, f"{arguments.motion_from:05d}-{arguments.start}"
    asked = {k: str(v) if k == "image" and v else v for k, v in vars(arguments).items() if k not in ("out", "fps")}
    sources |= {"still image": pictures(first[None]) * (len(flow_bwd) + 1), "motion": motion_pictures(flow_bwd)}
    folder = arguments.out or OUT / f"animate-{name}-by-{motion}"
    perform(predictor, Take(first, flow_bwd, sources, asked, elsewhere), folder, arguments.fps)


def drawn_motion(arguments: argparse.Namespace, first: Float[Tensor, "3 h w"]) -> Float[Tensor, "y 2 h w"]:
    """The field of ``--move``."""
    x, y, dx, dy, radius = arguments.move
    h, w = first.shape[1:]
    region = disc(h, w, x, y, radius)
    objects = instances(arguments.video, arguments.frame, h, w) if arguments.video is not None else None
    if objects is not None and 0 <= y < h and 0 <= x < w and (hit := objects[int(y), int(x)]):
        region = torch.eq(objects, hit)
    return move_region(region, dx, dy, arguments.steps)


if __name__ == "__main__":
    raise SystemExit(main())
