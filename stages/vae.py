"""vae@KEY: train an autoencoder on the training split and store its per-channel latent statistics with it.

``frame`` encodes frames, ``flow`` the teacher's backward flow. Beside the weights stands `METRICS`: how well images of
the evaluation split come back, which no training depends on.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from data.files import file_digest
from data.manifest import write_json
from models.autoencoder import CONFIG, OPTIONS, WEIGHTS, LatentVAE, build_vae, load_vae, read_pretrained
from models.perceptual import load_lpips
from models.reconstruction import QUALITY, reconstruct
from models.vae_training import OPTIONS as TRAINING
from models.vae_training import FlowVaeOptions, VaeOptions, train_vae
from pipeline.errors import ParamsError
from pipeline.journal import BadItem, Unit
from pipeline.params import check_options
from pipeline.progress import Tick
from pipeline.sections import Vae, VaeKey
from pipeline.stage import Job, run_stage
from stages.folder import build_folder
from stages.images import open_images

METRICS = "metrics.json"
CALIBRATION_IMAGES = 512
"""Images of the training split, evenly spread, over which the latent statistics are measured."""
JUDGED_IMAGES = 64
"""Images of the evaluation split, evenly spread, over which reconstruction is measured."""


def run(job: Job) -> None:
    block, where = job.params.vae[cast(VaeKey, job.key)], f"vae.{job.key}"
    training = check_options(TRAINING[job.key], block.training, f"{where}.training")
    if training.steps == 0 and block.pretrained is None:
        raise ParamsError(
            f"{where}.training.steps is 0 and {where}.pretrained names no folder",
            remedy="train for some steps, or name the folder of a VAE that is trained",
        )
    torch.manual_seed(block.seed)
    vae, calibrated = _start(job, block)
    lpips = _lpips_file(training)
    perceptual = load_lpips(lpips) if lpips else None
    images = open_images(job, "train")

    def make(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        curves = {}
        if training.steps:
            result = train_vae(
                vae,
                images.batches(block.batch, block.seed),
                training,
                device=job.device,
                generator=torch.Generator().manual_seed(block.seed),
                progress=lambda step, logs: tick(1, f"loss {logs['loss']:.4f}"),
                pretrained=block.pretrained is not None,
                perceptual=perceptual,
            )
            curves = result.curves
        if training.steps or not calibrated:
            torch.nn.Module.to(vae, job.device)
            vae.calibrate(batch.to(job.device) for batch in images.spread(CALIBRATION_IMAGES, block.batch))
        vae.save_pretrained(folder)
        write_json(folder / "curves.json", curves)
        return []

    files = [Path(block.pretrained, name) for name in (CONFIG, WEIGHTS)] if block.pretrained else []
    files += [lpips] if lpips else []
    fingerprint = job.fingerprint(
        [block, job.params.decode.resolution], weights="".join(file_digest(file) for file in files)
    )
    unit = Unit(tuple(images.videos), images.digests(), job.title, steps=max(training.steps, 1))
    build_folder(job, unit, make, fingerprint=fingerprint, further=lambda folder: _judge(job, folder))


def _start(job: Job, block: Vae) -> tuple[LatentVAE, bool]:
    """The VAE that training starts from, and whether its latents' statistics are known."""
    where = f"vae.{job.key}"
    options = check_options(OPTIONS[block.architecture], block.options, f"{where}.options")
    if block.pretrained is not None:
        vae, calibrated = read_pretrained(Path(block.pretrained), block.architecture, job.key, options)
    else:
        try:
            vae, calibrated = build_vae(block.architecture, job.key, options), False
        except ValueError as error:
            raise ParamsError(f"{where}.options: {error}", remedy="change one of them") from error
    if any(side % vae.stride for side in job.params.decode.resolution):
        raise ParamsError(
            f"{where} has a stride of {vae.stride}, which does not divide decode.resolution "
            f"{list(job.params.decode.resolution)}",
            remedy="choose another resolution, or fewer levels",
        )
    return vae, calibrated


def _lpips_file(training: FlowVaeOptions) -> Path | None:
    if isinstance(training, VaeOptions) and training.perceptual > 0 and training.perceptual_weights:
        return Path(training.perceptual_weights)
    return None


def _judge(job: Job, folder: Path) -> list[str]:
    """Write `METRICS` if the evaluation split has videos; the names of the files written."""
    images = open_images(job, job.params.evaluate.split)
    if not images.videos:
        return []
    vae = load_vae(folder)
    torch.nn.Module.to(vae, job.device)
    truth = torch.cat(list(images.spread(JUDGED_IMAGES, JUDGED_IMAGES)))
    decoded = reconstruct(vae, truth)
    quality = QUALITY[job.key](decoded.clamp(0, 1) if job.key == "frame" else decoded, truth)
    rounded = {name: None if value is None else round(value, 4) for name, value in quality.items()}
    write_json(folder / METRICS, {"split": job.params.evaluate.split, "images": len(truth), **rounded})
    return [METRICS]


if __name__ == "__main__":
    run_stage("vae", run, keyed=True)
