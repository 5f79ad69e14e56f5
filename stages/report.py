"""report: the comparison of all predictors as one offline page, and the same figures for `dvc metrics`."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.chart import Chart, Curve
from data.manifest import read_manifest, write_json
from data.page import Clip, Interval, PageContent, Provenance, Quarantined, Row, Tile, Timing, build_page
from models.autoencoder import LatentVAE, load_vae
from models.evaluation import Evaluation, evaluate_reconstruction
from models.metrics import METRICS, Estimate, Score, paired_difference, score
from models.results import read_results
from pipeline.progress import progress
from pipeline.stage import ARTIFACTS, Job, read_runs, run_stage
from stages.evaluate import Windows
from stages.gallery import flow_gallery, reconstruction_gallery
from stages.teacher_accuracy import measure_teacher

BASELINES = ("copy_last", "advect")
CEILING = "vae_ceiling"
SHARED_RULES = ("most motion", "median motion", "first")
"""Rules that choose the same window for every predictor, so that their clips stand side by side."""
CURVES = (("skill", True), ("psnr", False), ("fg_psnr", False), ("ssim", False))
VERSIONS = ("clevrcast", "torch", "torchvision", "zarr", "decord", "opencv-python", "dvc", "diffusers", "pybullet")


def run(job: Job) -> None:
    windows = Windows(job)
    vae = load_vae(ARTIFACTS / "vae" / "frame")
    torch.nn.Module.to(vae, job.device)
    names = [*BASELINES, *(name for name in job.params.predictors if name not in BASELINES)]
    results = [read_results(ARTIFACTS / "evaluate" / name) for name in names]
    with progress("ceiling", len(windows.source.videos), "videos") as tick:
        ceiling = evaluate_reconstruction(
            lambda pictures: vae.to_frames(vae.to_latents(pictures)),
            windows.told(tick),
            name=CEILING,
            seed=job.params.evaluate.seed,
            device=job.device,
            parameters=sum(p.numel() for p in vae.parameters()),
        )
    seed = job.params.evaluate.seed
    scores = {r.name: score(r.state, np.random.default_rng(seed)) for r in [*results, ceiling]}
    teacher, teacher_figures = measure_teacher(job, windows.source.videos)
    content = PageContent(
        title=f"clevrcast: {job.params.evaluate.protocol}",
        summary=_summary(results, scores),
        facts=_facts(job, windows, results[0]),
        skill_steps=_headline_steps(windows.horizon),
        rows=tuple(_row(r, scores, results, windows.horizon, seed) for r in [*results, ceiling]),
        charts=_charts(scores),
        clips=_clips(results, windows.fps, job.params.report.examples),
        teachers=(teacher,) if teacher is not None else (),
        galleries=(*flow_gallery(job, windows), reconstruction_gallery(windows, vae, job.device)),
        quarantine=tuple(_quarantine()),
        timings=tuple(_timings()),
        provenance=_provenance(job, vae),
        definitions=tuple((name, metric.definition) for name, metric in METRICS.items()),
    )
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / "index.html").write_text(build_page(content))
    write_json(job.out / "metrics.json", _metrics(scores, windows.horizon) | {"teacher": teacher_figures})


def _headline_steps(horizon: int) -> tuple[int, ...]:
    return tuple(k for k in (1, 6, 12) if k <= horizon)


def _summary(results: Sequence[Evaluation], scores: dict[str, dict[str, Score]]) -> str:
    learned = [r.name for r in results if r.name not in BASELINES]
    if not learned:
        return "Only the baselines were evaluated."
    best = max(learned, key=lambda name: scores[name]["skill"].overall.value)
    skill, base = (scores[name]["skill"].overall for name in (best, "advect"))
    if not skill.value > 0:
        return f"No learned predictor beats copying the last frame: the best, {best}, has a skill of {skill.value:.2f}."
    interval = f" (95 % interval {_percent(skill.low)} to {_percent(skill.high)})" if math.isfinite(skill.low) else ""
    return (
        f"The best predictor is {best}: over the horizon it removes {_percent(skill.value)} of the squared error of "
        f"copying the last frame{interval}; advecting the last observed flow removes {_percent(base.value)}."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _facts(job: Job, windows: Windows, first: Evaluation) -> tuple[tuple[str, str], ...]:
    p = job.params
    h, w = p.decode.resolution
    return (
        ("videos", f"{len(first.state.videos)} {p.acquire.source}, {p.evaluate.split} split"),
        ("windows", f"{first.windows} of {windows.context} + {windows.horizon} frames, every {windows.every}"),
        ("frames", f"{h} x {w}, one in {p.decode.stride} ({windows.fps:g} per second)"),
        ("teacher", f"{p.flow.teacher} at {p.flow.resolution[0]} x {p.flow.resolution[1]}"),
    )


def _row(
    result: Evaluation, scores: dict[str, dict[str, Score]], all_results: Sequence[Evaluation], horizon: int, seed: int
) -> Row:
    mine, runs = scores[result.name], read_runs()
    kind = "ceiling" if result.name == CEILING else "baseline" if result.name in BASELINES else "predictor"
    advantage = None
    if kind == "predictor":
        advect = next(r for r in all_results if r.name == "advect")
        rng = np.random.default_rng(seed)
        advantage = _interval(paired_difference(result.state, advect.state, "skill", rng).overall)
    trained = runs.get(f"train@{result.name}", {}) if kind == "predictor" else {}
    speed = result.speed.frames_per_second if result.speed is not None else _speed(runs, result.name)
    return Row(
        name=result.name,
        kind=kind,
        skill=_interval(mine["skill"].overall),
        skill_at=tuple(mine["skill"].steps[k - 1].value for k in _headline_steps(horizon)),
        psnr=mine["psnr"].overall.value,
        ssim=mine["ssim"].overall.value,
        fg_psnr=mine["fg_psnr"].overall.value if "fg_psnr" in mine else None,
        advantage=advantage,
        parameters=result.parameters,
        frames_per_second=speed,
        seconds_trained=trained.get("build_seconds"),
    )


def _speed(runs: dict[str, dict[str, Any]], name: str) -> float | None:
    return runs.get(f"evaluate@{name}", {}).get("frames_per_second")


def _interval(estimate: Estimate) -> Interval:
    return Interval(estimate.value, estimate.low, estimate.high)


def _charts(scores: dict[str, dict[str, Score]]) -> tuple[Chart, ...]:
    charts = []
    for metric, zero in CURVES:
        curves = []
        for name, mine in scores.items():
            if metric not in mine:
                continue
            role = "ceiling" if name == CEILING else "baseline" if name in BASELINES else "predictor"
            steps = mine[metric].steps
            values, low, high = (tuple(_known(getattr(s, f)) for s in steps) for f in ("value", "low", "high"))
            curves.append(Curve(name, values, low, high, role))
        if curves:
            definition = METRICS[metric]
            charts.append(Chart(metric, definition.unit, definition.better, tuple(curves), zero))
    return tuple(charts)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _clips(results: Sequence[Evaluation], fps: float, most: int) -> tuple[Clip, ...]:
    clips, seen = [], set()
    for rule in SHARED_RULES:
        examples = {r.name: e for r in results for e in r.examples if rule in e.rules}
        first = next(iter(examples.values()), None)
        if first is None or (first.video, first.start) in seen:
            continue
        seen.add((first.video, first.start))
        truth = np.concatenate([first.context, first.truth])
        tiles = tuple(
            Tile(name, np.concatenate([e.context, e.prediction]), f"skill {1 - e.mse.sum() / e.mse_copy.sum():.2f}")
            for name, e in examples.items()
        )
        named = f"video_{first.video:05d}"
        clips.append(Clip(named, first.start, rule, len(first.context), float(fps), truth, tiles))
    return tuple(clips[:most])


def _quarantine() -> list[Quarantined]:
    items = []
    for manifest in sorted(ARTIFACTS.glob("*/manifest.json")) + sorted(ARTIFACTS.glob("encode/*/manifest.json")):
        body = read_manifest(manifest.parent)
        items += [
            Quarantined(f"video_{bad['id']:05d}", body["stage"], bad["reason"]) for bad in body.get("quarantine", [])
        ]
    return items


def _timings() -> list[Timing]:
    return [
        Timing(
            name, float(run["seconds"]), run["built"], "units built", f"{run['reused']} found ready; {run['device']}"
        )
        for name, run in read_runs().items()
    ]


def _provenance(job: Job, vae: LatentVAE) -> tuple[Provenance, ...]:
    digests = [
        f"{body['stage']:24} {body['fingerprint']}"
        for manifest in sorted(ARTIFACTS.rglob("manifest.json"))
        for body in [read_manifest(manifest.parent)]
    ]
    versions = [f"{name} {version(name)}" for name in VERSIONS] + [f"Python {platform.python_version()}"]
    return (
        Provenance("params.yaml", Path("params.yaml").read_text()),
        Provenance("versions", "\n".join([*versions, f"device {job.device}", f"threads {torch.get_num_threads()}"])),
        Provenance("fingerprints of the stages", "\n".join(digests)),
    )


def _metrics(scores: dict[str, dict[str, Score]], horizon: int) -> dict[str, Any]:
    """Flat figures per row of the table, rounded so that a difference in `dvc metrics diff` means something."""
    out: dict[str, Any] = {}
    for name, mine in scores.items():
        out[name] = {metric: round(s.overall.value, 5) for metric, s in mine.items() if math.isfinite(s.overall.value)}
        out[name] |= {f"skill_{k}": round(mine["skill"].steps[k - 1].value, 5) for k in _headline_steps(horizon)}
    return out


if __name__ == "__main__":
    run_stage("report", run)
