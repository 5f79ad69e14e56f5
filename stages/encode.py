"""encode@KEY: posterior means of every image, normalised per channel with the statistics of the VAE, as float16."""

from __future__ import annotations

import numpy as np
import torch

from data.store import ArraySpec
from models.autoencoder import load_vae
from models.checkpoint import digest
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.images import open_images
from stages.sharding import build_store

BATCH = 16
"""Images encoded at once; changes nothing but speed and memory."""
AXIS = {"frame": "time", "flow": "pair"}


def run(job: Job) -> None:
    images = open_images(job)
    vae = load_vae(ARTIFACTS / "vae" / job.key)
    torch.nn.Module.to(vae, job.device)
    item = (images.length, vae.latent_channels, images.height // vae.stride, images.width // vae.stride)
    dims = (AXIS[job.key], "latent", "y", "x")
    spec = ArraySpec("latents", item, "float16", dims, job.params.shards.clip, "picture")

    @torch.inference_mode()
    def compute(video: int) -> dict[str, np.ndarray]:
        parts = images.of(video).split(BATCH)
        return {"latents": torch.cat([vae.to_latents(part.to(job.device)).half().cpu() for part in parts]).numpy()}

    build_store(
        job,
        [spec],
        {video: (images.store.shard_digest(video),) for video in images.videos},
        compute,
        fingerprint=job.fingerprint([job.params.shards, job.params.decode.resolution], weights=digest(vae)),
        params={"vae": job.key, "vae_digest": digest(vae)},
    )


if __name__ == "__main__":
    run_stage("encode", run, keyed=True)
