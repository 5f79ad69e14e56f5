"""What `clevrcast animate`, `transfer` and `restyle` share: the trained predictor, the stores, and what they write.

Each drives the appearance stream of a trained `two_stream` by a motion that was asked for, and writes into one folder
``clip.mp4`` (sources beside the result), ``strip.png`` (the same at five moments) and ``figures.json`` (what was asked
for, and `models.applications.measure`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.clips import ClipSource
from data.errors import ClevrcastError, EmptyError, SourceError, WeightsError
from data.files import replace_file
from data.picture import flow_picture, panel, to_uint8, write_png, write_video
from data.store import Store
from models.applications import drag_ground, measure
from models.autoencoder import encode_windows
from models.checkpoint import load_predictor, read_meta
from models.predictors.two_stream import TwoStream
from pipeline.devices import device
from pipeline.errors import PipelineError
from pipeline.stage import ARTIFACTS
from stages.gallery import LEAST_SCALE_PX
from stages.trained import load_vaes

OUT = ARTIFACTS / "apply"
MOMENTS = 5
_CONTRAST = 20.0


@dataclass(frozen=True)
class Take:
    """A picture and the motion it is to follow, and what is shown beside the result.

    ``flow_bwd`` as `models.applications` has it. ``sources`` maps a caption to the pictures of the first frame and of
    every step; ``elsewhere`` are the frames that the motion was taken from; ``asked`` goes into the figures.
    """

    first: Float[Tensor, "3 h w"]
    flow_bwd: Float[Tensor, "y 2 h w"]
    sources: dict[str, list[np.ndarray]]
    asked: dict[str, Any]
    elsewhere: Float[Tensor, "y 3 h w"] | None = None


@dataclass(frozen=True)
class Shot:
    """Consecutive frames of a video on the model's grid, and the teacher's flow between them, in its pixels."""

    frames: Float[Tensor, "t 3 h w"]
    flow_bwd: Float[Tensor, "t-1 2 h w"]


def run(name: str, parser: argparse.ArgumentParser, work: Callable[..., None], argv: Sequence[str] | None) -> int:
    """Parse, load the predictor, do ``work(arguments, predictor)``. 0, or 1 with one clear message."""
    parser.prog = f"clevrcast {name}"
    parser.add_argument("--predictor", default="two_stream", help="a trained two_stream of params.yaml")
    parser.add_argument("--steps", type=positive, default=12, help="frames to make (default 12)")
    parser.add_argument("--fps", type=positive, default=6, help="frames per second of the clip (default 6)")
    parser.add_argument("--out", type=Path, help=f"folder for clip, strip and figures (default below {OUT})")
    arguments = parser.parse_args(argv)
    try:
        work(arguments, load_two_stream(arguments.predictor))
    except (ClevrcastError, PipelineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def positive(text: str) -> int:
    """The type of an argument that is a whole number from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def load_two_stream(key: str) -> TwoStream:
    """The trained predictor ``key`` on this machine's device.

    Raises:
        WeightsError: it is not trained, or is no two_stream.
    """
    folder = ARTIFACTS / "train" / key
    if (name := read_meta(folder).name) != "two_stream":
        raise WeightsError(
            f"the predictor {key!r} is a {name}; a clip is driven by a two_stream",
            remedy="name a block of params.yaml whose model is two_stream with --predictor",
        )
    predictor = load_predictor(folder, vaes=load_vaes(TwoStream))
    assert isinstance(predictor, TwoStream)
    return predictor.to(device())


def shot(predictor: TwoStream, video: int, start: int, steps: int) -> Shot:
    """Frames ``start`` to ``start + steps`` of a stored video.

    Raises:
        EmptyError: the stores do not hold the video, or it ends earlier.
    """
    stores = {"frames": Store(ARTIFACTS / "decode"), "flow_bwd": Store(ARTIFACTS / "flow")}
    source = ClipSource(stores, height=predictor.height, width=predictor.width, videos=[video], cache_bytes=0)
    if start < 0 or start + steps >= source.length:
        raise EmptyError(
            f"frames {start} to {start + steps} of video {video} were asked for; it has 0 to {source.length - 1}",
            remedy="choose an earlier start or fewer --steps",
        )
    clip = source.clip([(video, start)], steps + 1)
    return Shot(clip.require("frames")[0], clip.require("flow_bwd")[0])


def still(predictor: TwoStream, video: int, frame: int) -> Float[Tensor, "3 h w"]:
    """One stored frame, in [0, 1]. Raises EmptyError, StoreError as `shot`."""
    store = Store(ARTIFACTS / "decode")
    length = store.specs["frames"]["item"][0]
    if not 0 <= frame < length:
        raise EmptyError(f"video {video} has frames 0 to {length - 1}, not {frame}", remedy="choose another --frame")
    return torch.from_numpy(store.read("frames", video, frame, frame + 1)[0]).permute(2, 0, 1).float() / 255


def picture(predictor: TwoStream, path: Path) -> Float[Tensor, "3 h w"]:
    """An image file stretched to the model's grid, in [0, 1]. Raises SourceError if it cannot be read."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise SourceError(f"{path} is no image that OpenCV can read", remedy="give a PNG or JPEG file")
    resized = cv2.resize(image, (predictor.width, predictor.height), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).float() / 255


def instances(video: int, frame: int, height: int, width: int) -> Int[Tensor, "{height} {width}"] | None:
    """Which annotated object is seen where (0: none), or None if the video has no annotation."""
    if not (ARTIFACTS / "label").exists() or video not in (store := Store(ARTIFACTS / "label")).ids:
        return None
    stored = torch.from_numpy(store.read("instances", video, frame, frame + 1)).float()[None]
    return F.interpolate(stored, (height, width), mode="nearest-exact")[0, 0].long()


def objects_of(video: int, frame: int, height: int, width: int) -> Bool[Tensor, "n {height} {width}"]:
    """A mask for each object: the annotated ones, or regions that differ from the video's median picture."""
    found = instances(video, frame, height, width)
    if found is None:
        every = Store(ARTIFACTS / "decode").read("frames", video).astype(np.float32)
        apart = np.abs(every[frame] - np.median(every, axis=0)).max(axis=2) > _CONTRAST
        small = cv2.resize(apart.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        found = torch.from_numpy(cv2.connectedComponents(small)[1]).long()
    return torch.arange(1, int(found.max()) + 1)[:, None, None] == found


@torch.inference_mode()
def follow(predictor: TwoStream, take: Take) -> Float[Tensor, "y 3 h w"]:
    """The result: the first frame driven by the motion's latents, with the ground dragged along."""
    on = predictor.rest.device
    motion = encode_windows(predictor.flow_vae, drag_ground(take.flow_bwd)[None].to(on))
    return predictor.drive(take.first[None].to(on), motion)[0].cpu()


def perform(predictor: TwoStream, take: Take, folder: Path, fps: int, **more: float) -> dict[str, float]:
    """Make the result, write the three files, print the figures and return them. ``more`` are figures as well."""
    result = follow(predictor, take)
    figures = measure(result, take.first, take.flow_bwd, elsewhere=take.elsewhere) | more
    shown = {**take.sources, "result": pictures(torch.cat([take.first[None], result]))}
    film = [panel([column[k] for column in shown.values()], list(shown), columns=len(shown), scale=2)
            for k in range(len(result) + 1)]  # fmt: skip
    write_video(folder / "clip.mp4", np.stack(film), fps)
    moments = np.linspace(0, len(result), min(MOMENTS, len(result) + 1)).round().astype(int)
    images = [column[k] for column in shown.values() for k in moments]
    labels = [f"{name}, step {k}" for name in shown for k in moments]
    write_png(folder / "strip.png", panel(images, labels, columns=len(moments)))
    body = {"asked": take.asked, "figures": figures}
    replace_file(folder / "figures.json", (json.dumps(body, indent=1) + "\n").encode())
    for name, value in figures.items():
        print(f"{name:26} {value:.3f}")
    print(f"{folder}/clip.mp4, strip.png, figures.json")
    return figures


def pictures(frames: Float[Tensor, "t 3 h w"]) -> list[np.ndarray]:
    """Frames as images."""
    return list(to_uint8(frames.numpy()))


def motion_pictures(flow_bwd: Float[Tensor, "y 2 h w"]) -> list[np.ndarray]:
    """A flow wheel for every step, and before them one of rest."""
    scale = max(LEAST_SCALE_PX, float(flow_bwd.norm(dim=1).max()))
    return [flow_picture(flow.numpy(), scale) for flow in (torch.zeros_like(flow_bwd[0]), *flow_bwd)]
