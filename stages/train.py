"""train@KEY: one loop for every predictor; a predictor with nothing to learn gets a checkpoint without weights.

A killed run goes on from its last saved state (``CLEVRCAST_SAVE_SECONDS``). Several processes train together by
``torchrun --nproc-per-node=N -m stages.train KEY``; docs/training.md tells the rest.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from data.catalog import Catalog
from data.clips import ClipSource
from data.manifest import write_json
from data.store import Store
from models.checkpoint import digest, load_pretrained, save_checkpoint
from models.predictor import Predictor, build, find
from models.training import TrainingOptions, TrainResult, train
from models.training_state import Keeping, load_state, save_state
from pipeline.devices import save_seconds
from pipeline.errors import ParamsError
from pipeline.journal import BadItem, Unit
from pipeline.live_curves import live_curves
from pipeline.params import check_options
from pipeline.progress import Tick
from pipeline.ranks import process_group, rank, world_size
from pipeline.shards import kept_state
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.folder import build_folder
from stages.trained import load_vaes

STORES = {
    "frames": ARTIFACTS / "decode",
    "flow_bwd": ARTIFACTS / "flow",
    "visible": ARTIFACTS / "occlusion",
    "latents": ARTIFACTS / "encode" / "frame",
    "flow_latents": ARTIFACTS / "encode" / "flow",
    "boxes": ARTIFACTS / "label",
    "presence": ARTIFACTS / "label",
    "collision": ARTIFACTS / "label",
    "collision_pairs": ARTIFACTS / "label",
}
"""Which store holds which field of a clip."""
STATE = "state.safetensors"


def run(job: Job) -> None:
    block = job.params.predictors[job.key]
    (h, w), context = job.params.decode.resolution, job.params.evaluate.context
    options_type, kind = find(block.model)
    options = check_options(options_type, block.options, f"predictors.{job.key}.options")
    training = check_options(TrainingOptions, block.training, f"predictors.{job.key}.training")
    if block.batch % world_size():
        raise ParamsError(
            f"predictors.{job.key}.batch {block.batch} cannot be shared equally by {world_size()} processes",
            remedy="start a number of processes that divides it, or change the batch",
        )
    vaes = load_vaes(kind)
    torch.manual_seed(block.seed)
    predictor = build(block.model, options.model_dump(), vaes=vaes, height=h, width=w, context=context)
    weights = "".join(digest(vae) for vae in vaes.values())
    if block.pretrained is not None:
        weights += load_pretrained(Path(block.pretrained), predictor, name=block.model, vaes=vaes).weights_digest
    try:
        predictor.freeze(block.frozen)
    except ValueError as error:
        raise ParamsError(
            f"predictors.{job.key}.frozen: {error}", remedy="choose among them, or leave it out"
        ) from error
    if rank():
        torch.manual_seed(block.seed + rank())  # noise of its own; the weights came from the common seed
    source = clip_source(job, predictor) if predictor.needs else None

    def make(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        result = fit(job, predictor, source, training, unit, folder, tick) if source is not None else None
        if rank():
            return []  # the first process writes
        steps = 0
        if result is not None:
            steps = result.steps
            write_json(folder / "curves.json", result.curves)
        predictor.cpu()
        save_checkpoint(folder, predictor, name=block.model, options=options.model_dump(), steps=steps, vaes=vaes)
        return []

    fingerprint = job.fingerprint(
        [block, context, (h, w)], weights=weights, modules=[f"models/predictors/{block.model}.py"]
    )
    videos = source.videos if source is not None else ()
    digests = source.digests() if source is not None else ()
    unit = Unit(videos, digests, job.title, steps=max(training.steps, 1) if source is not None else 1)
    build_folder(job, unit, make, fingerprint=fingerprint)


def fit(
    job: Job,
    predictor: Predictor,
    source: ClipSource,
    training: TrainingOptions,
    unit: Unit,
    folder: Path,
    tick: Tick,
) -> TrainResult:
    """Train, from where an earlier process was interrupted; ``folder`` is the one of the unit that is being built."""
    block = job.params.predictors[job.key]
    path = kept_state(folder) / STATE
    state = load_state(path)
    done = state.step if state is not None else 0
    if done:
        tick(done, "resumed")
    keeping = Keeping(state, None if rank() else partial(save_state, path), every_seconds=save_seconds())
    length = job.params.evaluate.context + block.horizon
    clips = source.batches(length, block.batch, seed=block.seed, first=done, part=(rank(), world_size()))
    curves = folder.parent / f"{unit.key()}.curves"
    if not rank():
        went_on = f"goes on after step {done}; " if done else ""
        print(f"{job.title}: {went_on}live curves: tensorboard --logdir {curves}", flush=True)
    began = time.monotonic()
    with process_group(job.device), nullcontext(_nothing) if rank() else live_curves(curves, after=done) as show:

        def progress(step: int, terms: dict[str, float]) -> None:
            show(step, terms)
            pace = (step - done) / max(time.monotonic() - began, 1e-9)
            tick(1, f"loss {terms['loss']:.4f}, {pace:.2f} steps/s")

        result = train(predictor, clips, training, device=job.device, progress=progress, keeping=keeping)
    job.facts |= {"steps": result.steps, "resumed_at": done, "train_seconds": round(result.seconds, 2)}
    return result


def clip_source(job: Job, predictor: Predictor) -> ClipSource:
    """The training split's clips with the fields that the predictor needs."""
    h, w = job.params.decode.resolution
    stores = {name: Store(STORES[name]) for name in sorted(predictor.needs)}
    return ClipSource(stores, height=h, width=w, videos=Catalog.load(ARTIFACTS / "acquire").split("train"))


def _nothing(step: int, terms: object) -> None:
    """What the other processes of a torchrun draw."""


if __name__ == "__main__":
    run_stage("train", run, keyed=True, together=True)
