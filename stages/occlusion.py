"""occlusion: which pixels of t+1 were visible in t, from both flows, on their grid; uint8 in 1/255."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8

from data.store import Store
from models.occlusion import visibility
from pipeline.sections import Occlusion
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.fields import visible_spec
from stages.sharding import build_store


def run(job: Job) -> None:
    occlusion, flow = job.params.occlusion, Store(ARTIFACTS / "flow")
    pairs, _, h, w = flow.specs["flow_bwd"]["item"]

    def compute(video: int) -> dict[str, np.ndarray]:
        fwd, bwd = (flow.read_flow(name, video) for name in ("flow_fwd", "flow_bwd"))
        return {"visible": seen_before(fwd, bwd, occlusion, job.device)}

    build_store(
        job,
        [visible_spec(pairs, h, w, job.params.shards.clip)],
        {video: (flow.shard_digest(video),) for video in flow.ids},
        compute,
        fingerprint=job.fingerprint([occlusion, job.params.shards]),
        params=occlusion.model_dump(mode="json"),
    )


def seen_before(
    flow_fwd: Float[np.ndarray, "p 2 h w"],
    flow_bwd: Float[np.ndarray, "p 2 h w"],
    occlusion: Occlusion,
    device: str,
) -> UInt8[np.ndarray, "p h w"]:
    """The visibility of `models.occlusion` as it is stored, from flows as they are read."""
    fwd, bwd = (torch.from_numpy(flow).to(device) for flow in (flow_fwd, flow_bwd))
    soft = visibility(fwd, bwd, alpha1=occlusion.relative, alpha2=occlusion.absolute, softness=occlusion.softness)
    return (soft * 255).round().to(torch.uint8).cpu().numpy()


if __name__ == "__main__":
    run_stage("occlusion", run)
