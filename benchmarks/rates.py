"""How fast everything goes: every rate with its kind and its source. What was never measured says so.

*measured* is on CPU cores of an AMD EPYC (no GPU has been measured), *published* comes from others' hardware, *assumed*
is to be replaced by whoever knows better (``--rate``), and *computed* follows from those above by the profile's sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.work import NEEDS, Amounts
from pipeline.journal import Plan
from pipeline.stage import RUNS, WORK, read_runs
from pipeline.upkeep import newest

Kind = Literal["measured", "published", "assumed", "computed", "given", "recorded"]
MEASURED_BATCH = 4
"""Windows a step in docs/predictors.md."""


@dataclass(frozen=True)
class Rate:
    value: float
    kind: Kind
    source: str

    @property
    def shown(self) -> str:
        return f"{self.value:.3g}" if self.value < 100 else f"{self.value:,.0f}"


BUSY = "one core, real videos, other work beside it"
"""CPU seconds, on four videos at the sizes of the profile."""
BASE: dict[str, Rate] = {
    "cores_per_gpu": Rate(8, "assumed", "a rented GPU comes with 8 to 26; `CLEVRCAST_WORKERS` has to say so"),
    "gpu_over_two_cores": Rate(50, "assumed", "networks on one data-centre GPU, against two EPYC cores in bfloat16"),
    "training_efficiency": Rate(0.7, "assumed", "of GPUs that share a batch of a few windows"),
    "download_mb_per_second": Rate(20, "assumed", "the official server, for one client"),
    "hash_mb_per_second": Rate(350, "measured", "DVC, 330 to 380 MB/s, one process, local disk"),
    "publish_files_per_second": Rate(1000, "assumed", "links on a shared file system (local ext4: 46,000 measured)"),
    "decode_seconds": Rate(0.59, "measured", f"a video: {BUSY}"),
    "label_seconds": Rate(1.56, "measured", f"a video: {BUSY}"),
    "occlusion_seconds": Rate(1.53, "measured", f"a video: {BUSY}"),
    "flow_cpu_seconds": Rate(1.8, "measured", f"a video, without the teacher (decode, gate, compress): {BUSY}"),
    "flow_evaluations_per_second": Rate(
        23.4, "published", "RAFT, 139 ms a pair at 500x1000 on an RTX 3090 (ptlflow's table), by the number of pixels"
    ),
    "load_image.frame": Rate(0.0032, "measured", f"seconds an image, nothing cached: {BUSY}"),
    "load_image.flow": Rate(0.0047, "measured", f"seconds an image, nothing cached: {BUSY}"),
    "load_field.frames": Rate(0.0106, "measured", f"seconds a training clip, nothing cached: {BUSY}"),
    "load_field.flow": Rate(0.0239, "measured", f"seconds a training clip, nothing cached: {BUSY}"),
    "load_field.visible": Rate(0.0106, "measured", f"seconds a training clip, nothing cached: {BUSY}"),
    "load_field.labels": Rate(0.0071, "measured", f"seconds a training clip, nothing cached: {BUSY}"),
    "vae_cpu_images_per_second": Rate(
        64, "measured", "two cores, width 32, 128x192: 960 images in 30 CPU s (docs/log.md)"
    ),
    "encode_cpu_images_per_second.frame": Rate(221, "measured", "two cores, default sizes, 15 real videos"),
    "encode_cpu_images_per_second.flow": Rate(357, "measured", "two cores, default sizes, 15 real videos"),
    "evaluate_load": Rate(0.009, "measured", "seconds a predicted frame: clips with the truth beside them"),
    "evaluate_cpu_metrics": Rate(
        0.061, "measured", "seconds a predicted frame of copy_last, two busy cores, with LPIPS"
    ),
    "cpu_step_seconds.pixel_warp_lstm": Rate(1.4, "measured", "two idle cores, docs/predictors.md"),
    "cpu_step_seconds.latent_transformer": Rate(1.55, "measured", "two idle cores, docs/predictors.md"),
    "cpu_step_seconds.latent_diffusion": Rate(0.65, "measured", "two idle cores, docs/predictors.md"),
    "cpu_step_seconds.latent_flow_aux": Rate(1.55, "measured", "two idle cores, docs/predictors.md"),
    "cpu_step_seconds.latent_warp": Rate(1.2, "measured", "two idle cores, docs/predictors.md"),
    "cpu_step_seconds.two_stream": Rate(1.6, "measured", "two idle cores, docs/predictors.md"),
    "cpu_frames_per_second.copy_last": Rate(174_241, "measured", "docs/predictors.md"),
    "cpu_frames_per_second.advect": Rate(790, "measured", "docs/predictors.md"),
    "cpu_frames_per_second.pixel_warp_lstm": Rate(72, "measured", "docs/predictors.md"),
    "cpu_frames_per_second.latent_transformer": Rate(64, "measured", "docs/predictors.md"),
    "cpu_frames_per_second.latent_diffusion": Rate(17, "measured", "docs/predictors.md"),
    "cpu_frames_per_second.latent_flow_aux": Rate(75, "measured", "docs/predictors.md"),
    "cpu_frames_per_second.latent_warp": Rate(47, "measured", "docs/predictors.md"),
    "cpu_frames_per_second.two_stream": Rate(50, "measured", "docs/predictors.md"),
}


def rates_of(a: Amounts, given: Mapping[str, Rate]) -> dict[str, Rate]:
    """All rates; ``given`` replaces any of them, those that follow from others among them.

    Raises:
        SystemExit: there is no rate of a name that is given.
    """
    base = {name: given.get(name, rate) for name, rate in BASE.items()}
    r = {name: rate.value for name, rate in base.items()}
    gpu, computed = r["gpu_over_two_cores"], dict[str, float]()
    for key, growth in a.vae_growth.items():
        computed[f"vae_images_per_second.{key}"] = r["vae_cpu_images_per_second"] * gpu / growth_of_vae(a, key)
        encode = r[f"encode_cpu_images_per_second.{key}"]
        computed[f"encode_images_per_second.{key}"] = encode * gpu / growth / a.pixels
    computed["evaluate_metrics"] = r["evaluate_cpu_metrics"] * a.pixels / gpu
    for name in a.trained:
        slower = a.growth[name] * a.pixels
        computed[f"step_seconds.{name}"] = r[f"cpu_step_seconds.{name}"] * a.batch / MEASURED_BATCH * slower / gpu
        computed[f"load_window.{name}"] = sum(r[f"load_field.{field}"] for field in NEEDS[name])
    for name in a.predictors:
        slower = a.growth.get(name, 1.0) * a.pixels
        computed[f"rollout_frames_per_second.{name}"] = r[f"cpu_frames_per_second.{name}"] * gpu / slower
    made = "from those above, by the profile's batch, pixels, width and blocks"
    rates = base | {name: given.get(name, Rate(value, "computed", made)) for name, value in computed.items()}
    if unknown := sorted(set(given) - set(rates)):
        raise SystemExit(f"there is no rate {', '.join(unknown)}; there are: {', '.join(rates)}")
    return rates


def growth_of_vae(a: Amounts, key: str) -> float:
    """Work of an image against that of the measured frame autoencoder, width 32. A coarser grid is not allowed for."""
    width = {"frame": 1.0, "flow": 0.25}[key]  # `vae_growth` of flow is in those of width 16
    return a.vae_growth[key] * width * a.pixels


def from_records(workspace: Path) -> dict[str, Rate]:
    """What the last runs of a workspace say, each of the whole machine or GPU that it had."""
    found: dict[str, Rate] = {}
    for title, run in read_runs(workspace / RUNS).items():
        stage, _, key = title.partition("@")
        where = f"{title} on {run['device']}"
        folder = newest(workspace / WORK, title)
        items = sum(len(unit.ids) for unit in Plan.load(folder).units) if folder else 0
        seconds = run["build_seconds"]
        if stage in ("decode", "label", "occlusion") and items and seconds:
            found[f"{stage}_seconds"] = Rate(seconds / items, "recorded", where)
        if stage == "flow" and run.get("pairs_per_second"):
            found["flow_evaluations_per_second"] = Rate(2 * run["pairs_per_second"], "recorded", where)
        if stage == "train" and run.get("steps"):
            found[f"step_seconds.{key}"] = Rate(
                run["train_seconds"] / run["steps"], "recorded", f"{where}, with loading"
            )
            found[f"load_window.{key}"] = Rate(0.0, "recorded", "part of the step")
        if stage == "evaluate" and run.get("frames_per_second"):
            found[f"rollout_frames_per_second.{key}"] = Rate(run["frames_per_second"], "recorded", where)
    return found
