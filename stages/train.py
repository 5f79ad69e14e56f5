"""train@KEY: one loop for every predictor; a predictor with nothing to learn gets a checkpoint without weights."""

from __future__ import annotations

from pathlib import Path

import torch

from data.catalog import Catalog
from data.clips import ClipSource
from data.manifest import write_json
from data.store import Store
from models.autoencoder import Vaes, load_vae
from models.checkpoint import digest, save_checkpoint
from models.predictor import Predictor, build, find
from models.training import TrainingOptions, train
from pipeline.journal import BadItem, Unit
from pipeline.params import check_options
from pipeline.progress import Tick
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.folder import build_folder

STORES = {
    "frames": ARTIFACTS / "decode",
    "flow_bwd": ARTIFACTS / "flow",
    "visible": ARTIFACTS / "occlusion",
    "latents": ARTIFACTS / "encode" / "frame",
    "flow_latents": ARTIFACTS / "encode" / "flow",
    "boxes": ARTIFACTS / "label",
    "presence": ARTIFACTS / "label",
    "collision": ARTIFACTS / "label",
}
"""Which store holds which field of a clip."""


def run(job: Job) -> None:
    block = job.params.predictors[job.key]
    (h, w), context = job.params.decode.resolution, job.params.evaluate.context
    options_type, kind = find(block.model)
    options = check_options(options_type, block.options, f"predictors.{job.key}.options")
    training = check_options(TrainingOptions, block.training, f"predictors.{job.key}.training")
    vaes = load_vaes(kind)
    torch.manual_seed(block.seed)
    predictor = build(block.model, options.model_dump(), vaes=vaes, height=h, width=w, context=context)
    source = clip_source(job, predictor) if predictor.needs else None

    def make(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        steps = 0
        if source is not None:
            clips = source.batches(context + block.horizon, block.batch, seed=block.seed)
            result = train(
                predictor,
                clips,
                training,
                device=job.device,
                progress=lambda step, logs: tick(1, f"loss {logs['loss']:.4f}"),
            )
            steps = result.steps
            write_json(folder / "curves.json", result.curves)
        predictor.cpu()
        save_checkpoint(folder, predictor, name=block.model, options=options.model_dump(), steps=steps, vaes=vaes)
        return []

    fingerprint = job.fingerprint(
        [block, context, (h, w)],
        weights="".join(digest(vae) for vae in vaes.values()),
        modules=[f"models/predictors/{block.model}.py"],
    )
    videos = source.videos if source is not None else ()
    digests = {store.shard_digest(v) for v in videos for store in (source.stores.values() if source else ())}
    unit = Unit(videos, tuple(sorted(digests)), job.title, steps=training.steps if source is not None else 1)
    build_folder(job, unit, make, fingerprint=fingerprint)


def load_vaes(kind: type[Predictor]) -> Vaes:
    """The autoencoders that predictors of this class need, from their stages."""
    return {key: load_vae(ARTIFACTS / "vae" / key) for key in sorted(kind.needs_vaes)}


def clip_source(job: Job, predictor: Predictor) -> ClipSource:
    """The training split's clips with the fields that the predictor needs."""
    h, w = job.params.decode.resolution
    stores = {name: Store(STORES[name]) for name in sorted(predictor.needs)}
    return ClipSource(stores, height=h, width=w, videos=Catalog.load(ARTIFACTS / "acquire").split("train"))


if __name__ == "__main__":
    run_stage("train", run, keyed=True)
