"""How dense fields between two frames are stored, the same for the truth, the teacher and the occlusion masks."""

from __future__ import annotations

from data.store import FLOW_SCALE, ArraySpec


def flow_specs(pairs: int, h: int, w: int, clip: int) -> list[ArraySpec]:
    """Both directions: ``flow_fwd[k]`` lives on frame k, ``flow_bwd[k]`` on frame k+1; 1/32 px."""
    dims = ("pair", "direction", "y", "x")
    scale = {"scale_factor": 1 / FLOW_SCALE, "units": "pixel"}
    return [ArraySpec(name, (pairs, 2, h, w), "int16", dims, clip, "field", scale) for name in ("flow_fwd", "flow_bwd")]


def visible_spec(pairs: int, h: int, w: int, clip: int) -> ArraySpec:
    """``visible[k]`` lives on frame k+1, 255 where warping frame k can be trusted."""
    return ArraySpec("visible", (pairs, h, w), "uint8", ("pair", "y", "x"), clip, "field", {"scale_factor": 1 / 255})
