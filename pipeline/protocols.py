"""Named protocols: what they fix, so that figures under one name can be compared, and what was published under them.

A protocol that is not named here is one's own; its figures compare with nothing but themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """Figures of a paper. None: not given there."""

    method: str
    source: str
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    fvd: float | None = None
    jedi: float | None = None


@dataclass(frozen=True)
class Protocol:
    """``fixed`` maps keys of ``params.yaml`` (dotted) to the only value that the protocol allows. ``note`` says what
    stands beside published figures: how theirs were measured, and what of it is not known."""

    fixed: Mapping[str, Any]
    published: tuple[Published, ...] = ()
    note: str = ""
    psnr: str = "psnr_frame"
    """The metric that the papers call PSNR."""


_SLOTFORMER = "Wu et al., SlotFormer, ICLR 2023"
_LIM = "Lim et al., Elucidating the Design Choice of Probability Paths in Flow Matching for Forecasting, TMLR 2025"

PROTOCOLS: Mapping[str, Protocol] = {
    "demo": Protocol(
        {
            "decode.resolution": (128, 192),
            "decode.stride": 2,
            "decode.frames": 128,
            "decode.resize": "swscale",
            "decode.no_entry": None,
            "evaluate.context": 4,
            "evaluate.horizon": 12,
            "evaluate.window_stride": 16,
            "evaluate.lpips_net": "squeeze",
        }
    ),
    "slotformer": Protocol(
        {
            "decode.resolution": (64, 64),
            "decode.stride": 2,
            "decode.frames": 128,
            "decode.resize": "bilinear",
            "decode.no_entry": {"context": 6, "horizon": 42},
            "evaluate.context": 6,
            "evaluate.horizon": 42,
            "evaluate.lpips_net": "vgg",
        },
        (
            Published("SlotFormer", _SLOTFORMER, 30.21, 0.89, 0.11),
            Published("PredRNN", _SLOTFORMER, 31.34, 0.90, 0.17),
            Published("SAVi-dyn", _SLOTFORMER, 29.77, 0.89, 0.19),
            Published("G-SWM", _SLOTFORMER, 28.42, 0.89, 0.16),
            Published("VQFormer", _SLOTFORMER, 26.80, 0.85, 0.18),
        ),
        "Of the 5,000 validation videos, one window each: the first in which no object comes into view between three "
        "observed frames before the prediction and its end; videos without such a window are left out. Videos without "
        "annotation cannot be asked, and start at their first frame. PSNR is the mean over frames of each frame's.",
    ),
    "pfi": Protocol(
        {
            "decode.resolution": (128, 128),
            "decode.stride": 1,
            "decode.frames": 128,
            "decode.resize": "swscale",
            "decode.no_entry": None,
            "evaluate.context": 4,
            "evaluate.horizon": 12,
            "evaluate.window_stride": 16,
            "evaluate.lpips_net": "squeeze",
        },
        (
            Published("Flow Matching", _LIM, 35.18, 0.95, None, 99.6, 0.78),
            Published("PFI", _LIM, 34.95, 0.95, None, 100.3, 0.84),
            Published("NeuralSDE", _LIM, 34.29, 0.95, None, 126.7, 1.06),
            Published("RIVER", _LIM, 30.49, 0.92, None, 134.9, 1.09),
        ),
        "The paper gives resolution, observed and predicted frames; which frames of which videos it does not say, and "
        "no code of it for CLEVRER is public. Here: every frame, windows side by side from the first frame on.",
    ),
}


def deviations(name: str, params: Mapping[str, Any]) -> list[str]:
    """What of ``params`` (plain, nested) is not as the protocol ``name`` fixes it; nothing for a name of one's own."""
    wrong = []
    for key, expected in PROTOCOLS[name].fixed.items() if name in PROTOCOLS else ():
        found: Any = params
        for part in key.split("."):
            found = found[part]
        found = tuple(found) if isinstance(found, list) else found
        if found != expected:
            wrong.append(f"{key} is {_plain(found)}, the protocol has {_plain(expected)}")
    return wrong


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else "null" if value is None else value
