"""Another appearance under the same motion: the first frame is changed, the motion latents of the video are kept.

    clevrcast restyle --video 15000 --start 8 --style hue:120
    clevrcast restyle --video 15000 --start 8 --style painted.png

``--style`` is ``hue:DEGREES`` (every hue turned), ``grey``, ``swap:rgb->gbr`` (red takes what was green, green what
was blue, blue what was red), or a file: the first frame as edited by whatever means. Only the first frame is changed;
the model has to carry the change along, and what enters the picture later cannot appear. For the styles by rule the
truth is known, the whole video changed so: ``psnr_truth`` is the result's PSNR against it, ``psnr_truth_still`` that of
the changed first frame held still.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.predictors.two_stream import TwoStream
from models.reconstruction import psnr
from stages.application import OUT, Take, follow, motion_pictures, perform, picture, pictures, run, shot

Style = Callable[[Float[Tensor, "t 3 h w"]], Float[Tensor, "t 3 h w"]]


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=int, required=True, help="whose first frame and motion")
    parser.add_argument("--start", type=int, default=0, help="the first frame (default 0)")
    parser.add_argument("--style", type=_style, required=True, help="hue:DEGREES, grey, swap:rgb->gbr, or a file")
    return run("restyle", parser, restyle, argv)


def _style(text: str) -> str:
    if style_of(text) is None and not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file, nor hue:DEGREES, grey or swap:rgb->gbr")
    return text


def restyle(arguments: argparse.Namespace, predictor: TwoStream) -> None:
    """Drive the changed first frame by the video's own motion; see `stages.application`."""
    taken = shot(predictor, arguments.video, arguments.start, arguments.steps)
    rule = style_of(arguments.style)
    first = rule(taken.frames[:1])[0] if rule is not None else picture(predictor, Path(arguments.style))
    sources = {"original": pictures(taken.frames), "motion": motion_pictures(taken.flow_bwd)}
    asked = {k: v for k, v in vars(arguments).items() if k not in ("out", "fps")}
    take = Take(first, taken.flow_bwd, sources, asked, taken.frames[1:])
    known = {}
    if rule is not None:
        truth = rule(taken.frames[1:])
        known["psnr_truth"] = _psnr(follow(predictor, take), truth)
        known["psnr_truth_still"] = _psnr(first.expand_as(truth), truth)
    name = f"restyle-{arguments.video:05d}-{arguments.start}-{re.sub(r'[^a-z0-9]+', '-', Path(arguments.style).stem)}"
    perform(predictor, take, arguments.out or OUT / name, arguments.fps, **known)


def style_of(text: str) -> Style | None:
    """The rule that ``text`` names, on RGB in [0, 1]; None if it names none."""
    if text == "grey":
        return lambda frames: (
            (frames * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, True).expand_as(frames)
        )
    if found := re.fullmatch(r"hue:(-?\d+(?:\.\d+)?)", text):
        return lambda frames: _turn_hue(frames, float(found[1]))
    if (found := re.fullmatch(r"swap:rgb->([rgb]{3})", text)) and set(found[1]) == set("rgb"):
        return lambda frames: frames[:, ["rgb".index(channel) for channel in found[1]]]
    return None


def _turn_hue(frames: Float[Tensor, "t 3 h w"], degrees: float) -> Float[Tensor, "t 3 h w"]:
    turned = []
    for frame in frames.permute(0, 2, 3, 1).numpy():
        hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)  # of float32: hue in degrees
        hsv[..., 0] = (hsv[..., 0] + degrees) % 360
        turned.append(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    return torch.from_numpy(np.stack(turned)).permute(0, 3, 1, 2)


def _psnr(a: Float[Tensor, "y 3 h w"], b: Float[Tensor, "y 3 h w"]) -> float:
    """Mean over frames, in dB."""
    return round(float(psnr(a, b).mean()), 4)


if __name__ == "__main__":
    raise SystemExit(main())
