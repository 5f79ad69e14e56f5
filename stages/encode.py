"""encode@KEY: posterior means of every frame, normalised per channel with the statistics of the VAE, as float16."""

from __future__ import annotations

import numpy as np
import torch

from data.store import ArraySpec, Store
from models.autoencoder import load_vae
from models.checkpoint import digest
from pipeline.stage import ARTIFACTS, Job, run_stage
from stages.sharding import build_store

BATCH = 16
"""Frames encoded at once; changes nothing but speed and memory."""


def run(job: Job) -> None:
    frames = Store(ARTIFACTS / "decode")
    vae = load_vae(ARTIFACTS / "vae" / job.key)
    torch.nn.Module.to(vae, job.device)
    t, h, w, _ = frames.specs["frames"]["item"]
    stride, z = vae.config["stride"], vae.config["latent_channels"]
    dims = ("time", "latent", "y", "x")
    spec = ArraySpec("latents", (t, z, h // stride, w // stride), "float16", dims, job.params.shards.clip, "picture")

    @torch.inference_mode()
    def compute(video: int) -> dict[str, np.ndarray]:
        pictures = torch.from_numpy(frames.read("frames", video)).permute(0, 3, 1, 2).float() / 255
        latents = torch.cat([vae.to_latents(part.to(job.device)).half().cpu() for part in pictures.split(BATCH)])
        return {"latents": latents.numpy()}

    build_store(
        job,
        [spec],
        {video: (frames.shard_digest(video),) for video in frames.ids},
        compute,
        fingerprint=job.fingerprint(job.params.shards, weights=digest(vae)),
        params={"vae": job.key, "vae_digest": digest(vae)},
    )


if __name__ == "__main__":
    run_stage("encode", run, keyed=True)
