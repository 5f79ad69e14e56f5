"""label: boxes, states, collisions, masks, true rigid flow and visibility, from annotations and the fixed camera."""

from __future__ import annotations

import numpy as np

from data.catalog import Catalog
from data.clevrer import MAX_OBJECTS, read_annotation
from data.errors import AnnotationError
from data.labels import STATES, label_video
from data.store import ArraySpec, pack_flow
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.fields import flow_specs, visible_spec
from stages.kept import Kept
from stages.sharding import build_store


def run(job: Job) -> None:
    (h, w), decode, clip = job.params.label.resolution, job.params.decode, job.params.shards.clip
    catalog = Catalog.load(ARTIFACTS / "acquire")
    kept = Kept(catalog, decode)
    annotated = {v.id: v for v in catalog.videos if v.annotation is not None}
    if not annotated:
        print(f"label: none of the {len(catalog.videos)} videos has an annotation: nothing can be scored against truth")

    def compute(video: int) -> dict[str, np.ndarray]:
        annotation = read_annotation(catalog.root / str(annotated[video].annotation))
        if annotation.frames < decode.frames:
            raise AnnotationError(
                f"the annotation of video {video} has {annotation.frames} frames, decode.frames is {decode.frames}",
                remedy="lower decode.frames or leave the video out",
            )
        labels = label_video(annotation, kept.frames(video), h, w, device=job.device)
        return {
            "boxes": labels.boxes,
            "presence": labels.presence,
            "states": labels.states,
            "collision": labels.collision,
            "collision_pairs": labels.collision_pairs,
            "instances": labels.instances,
            "flow_fwd": pack_flow(labels.flow_fwd),
            "flow_bwd": pack_flow(labels.flow_bwd),
            "visible": labels.visible * np.uint8(255),
        }

    build_store(
        job,
        specs(decode.steps, h, w, clip),
        {v.id: (str(v.annotation_sha256),) for v in annotated.values()},
        compute,
        fingerprint=job.fingerprint(
            [job.params.label, decode.stride, decode.frames, decode.no_entry, job.params.shards]
        ),
        params={"resolution": [h, w], "stride": decode.stride, "frames": decode.frames},
        facts={"unlabelled": [v.id for v in catalog.videos if v.annotation is None]},
    )


def specs(t: int, h: int, w: int, clip: int) -> list[ArraySpec]:
    n = MAX_OBJECTS
    return [
        ArraySpec("boxes", (t, n, 4), "float32", ("time", "object", "side"), clip, "table"),
        ArraySpec("presence", (t, n), "uint8", ("time", "object"), clip, "table"),
        ArraySpec("states", (t, n, len(STATES)), "float32", ("time", "object", "state"), clip, "table"),
        ArraySpec("collision", (t,), "uint8", ("time",), clip, "table"),
        ArraySpec("collision_pairs", (t, n, n), "uint8", ("time", "object", "other"), clip, "table"),
        ArraySpec("instances", (t, h, w), "uint8", ("time", "y", "x"), clip, "field"),
        *flow_specs(t - 1, h, w, clip),
        visible_spec(t - 1, h, w, clip),
    ]


if __name__ == "__main__":
    run_stage("label", run)
