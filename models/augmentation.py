"""Training windows in other guises: mirrored, and with other colours. Frames change, so latents must be made anew.

The camera is fixed, upright and centred, so a mirrored CLEVRER is one too, but for its lamps. Which windows of a batch
change depends on their place in it alone: nothing is drawn.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from data.clips import Clip
from models.autoencoder import LatentVAE, encode_windows


class GuiseOptions(BaseModel):
    """What the options of every predictor on latents share."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    flip: bool = Field(
        default=True, description="train on every other window mirrored; it then reads frames, not latents"
    )
    recolour: bool = Field(
        default=False, description="train on half of the windows with their colour channels rolled; needs flip"
    )

    @model_validator(mode="after")
    def _check(self) -> GuiseOptions:
        if self.recolour and not self.flip:
            raise ValueError("recolour is on and flip is off: it needs the frames that flip reads")
        return self


def latent_targets(vae: LatentVAE, batch: Clip, options: GuiseOptions) -> Clip:
    """The batch with float32 ``latents``: those of the store, or, with ``flip``, of frames of which every other window
    is mirrored (and, with ``recolour``, half have other colours); its other fields are mirrored alike."""
    if not options.flip:
        return replace(batch, latents=batch.require("latents").float())
    batch = augment(batch, mirror=True, recolour=options.recolour)
    return replace(batch, latents=encode_windows(vae, batch.require("frames")))


def augment(batch: Clip, *, mirror: bool, recolour: bool) -> Clip:
    """The batch with every other window mirrored left to right, and half of the windows with other colours.

    Fields that were not loaded stay None; latents cannot be mirrored and are dropped.
    """
    if not mirror and not recolour:
        return batch
    frames = batch.require("frames")
    batch = replace(batch, latents=None, flow_latents=None)
    if recolour:
        batch = replace(batch, frames=roll_colours(frames))
    if not mirror:
        return batch
    sign = torch.tensor([-1.0, 1.0], device=frames.device)[:, None, None]
    return replace(
        batch,
        frames=mirror_odd(batch.require("frames")),
        flow_bwd=None if batch.flow_bwd is None else mirror_odd(batch.flow_bwd, sign),
        visible=None if batch.visible is None else mirror_odd(batch.visible),
        boxes=None if batch.boxes is None else _mirror_boxes(batch.boxes, frames.shape[-1]),
    )


def roll_colours(windows: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 h w"]:
    """Windows 2, 3, 6, 7, ... with their channels rolled by one, so that every colour moves in every way."""
    out = windows.clone()
    for k in range(len(windows)):
        if k // 2 % 2:
            out[k] = windows[k].roll(1 + k // 4 % 2, dims=1)
    return out


def mirror_odd(
    windows: Float[Tensor, "b t c h w"], sign: Float[Tensor, "c 1 1"] | None = None
) -> Float[Tensor, "b t c h w"]:
    """Windows 1, 3, 5, ... of the batch mirrored left to right, their channels times ``sign``: dx changes its own."""
    out = windows.clone()
    out[1::2] = windows[1::2].flip(-1) * (1.0 if sign is None else sign)
    return out


def _mirror_boxes(boxes: Float[Tensor, "b t n 4"], width: int) -> Float[Tensor, "b t n 4"]:
    """Absent boxes, which are all zeros, stay so."""
    x0, y0, x1, y1 = boxes[1::2].unbind(-1)
    there = (x1 > x0)[..., None]
    out = boxes.clone()
    out[1::2] = torch.where(there, torch.stack([width - x1, y0, width - x0, y1], dim=-1), boxes[1::2])
    return out
