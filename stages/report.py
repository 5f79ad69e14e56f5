"""report: the comparison of all predictors as one offline page, and the same figures for `dvc metrics`."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.chart import Chart, Curve
from data.manifest import read_manifest, write_json
from data.page import Clip, Interval, PageContent, Provenance, Quarantined, Row, StepTable, Tile, Timing, build_page
from models.autoencoder import LatentVAE, load_vae
from models.comparison import Comparison, compare, verdict
from models.evaluation import Evaluation, evaluate_reconstruction
from models.metrics import METRICS, Estimate, Score
from models.results import read_results
from pipeline.progress import progress
from pipeline.stage import ARTIFACTS, Job, read_runs, run_stage
from stages.evaluate import Windows, networks_of
from stages.gallery import flow_gallery, reconstruction_gallery
from stages.teacher_accuracy import measure_teacher

BASELINES = ("copy_last", "advect")
REFERENCE = "advect"
"""What a predictor has to beat: knowing the last motion, and nothing learned."""
CEILING = "vae_ceiling"
ROW_METRICS = ("psnr", "ssim", "fg_psnr", "lpips", "box_iou", "collision_ap", "collision_base_rate")
SHARED_RULES = ("most motion", "median motion", "first")
"""Rules that choose the same window for every predictor, so that their clips stand side by side."""
CURVES = (
    ("skill", True),
    ("psnr", False),
    ("fg_psnr", False),
    ("ssim", False),
    ("lpips", False),
    ("box_iou", False),
)
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
            networks=networks_of(job),
        )
    everyone = [*results, ceiling]
    learned = [name for name in names if name not in BASELINES]
    comparison = compare(everyone, baseline=REFERENCE, others=learned, seed=job.params.evaluate.seed)
    scores = comparison.scores
    teacher, teacher_figures = measure_teacher(job, windows.source.videos)
    content = PageContent(
        title=f"clevrcast: {job.params.evaluate.protocol}",
        summary=_summary(results, scores),
        facts=_facts(job, windows, results[0]),
        skill_steps=_headline_steps(windows.horizon),
        rows=tuple(_row(r, comparison, windows.horizon) for r in everyone),
        tables=(*_tables(comparison), *_adaptation(names)),
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
    figures = _metrics(everyone, comparison, windows.horizon)
    write_json(job.out / "metrics.json", figures | {"teacher": teacher_figures})


def _headline_steps(horizon: int) -> tuple[int, ...]:
    return tuple(k for k in (1, 6, 12) if k <= horizon)


def _summary(results: Sequence[Evaluation], scores: dict[str, dict[str, Score]]) -> str:
    learned = [r.name for r in results if r.name not in BASELINES]
    if not learned:
        return "Only the baselines were evaluated."
    best = max(learned, key=lambda name: scores[name]["skill"].overall.value)
    skill, base = (scores[name]["skill"].overall for name in (best, REFERENCE))
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


def _row(result: Evaluation, comparison: Comparison, horizon: int) -> Row:
    mine, runs = comparison.scores[result.name], read_runs()
    kind = "ceiling" if result.name == CEILING else "baseline" if result.name in BASELINES else "predictor"
    difference = comparison.advantage.get(result.name)
    trained = runs.get(f"train@{result.name}", {}) if kind == "predictor" else {}
    speed = result.speed.frames_per_second if result.speed is not None else _speed(runs, result.name)
    return Row(
        name=result.name,
        kind=kind,
        skill=_interval(mine["skill"].overall),
        skill_at=tuple(mine["skill"].steps[k - 1].value for k in _headline_steps(horizon)),
        **{name: mine[name].overall.value for name in ROW_METRICS if name in mine},
        advantage=_interval(difference.overall) if difference is not None else None,
        parameters=result.parameters,
        frames_per_second=speed,
        seconds_trained=trained.get("build_seconds"),
    )


def _speed(runs: dict[str, dict[str, Any]], name: str) -> float | None:
    return runs.get(f"evaluate@{name}", {}).get("frames_per_second")


def _interval(estimate: Estimate) -> Interval:
    return Interval(estimate.value, estimate.low, estimate.high)


def _tables(comparison: Comparison) -> tuple[StepTable, ...]:
    def row(name: str, score: Score) -> tuple[str, tuple[Interval, ...]]:
        return name, tuple(_interval(step) for step in score.steps)

    skill = StepTable(
        "Skill by step",
        "At every predicted frame, with 95 % intervals over videos. Where two intervals overlap, the predictors may "
        f"still differ: the difference to {comparison.baseline} has a table of its own.",
        tuple(row(name, scores["skill"]) for name, scores in comparison.scores.items()),
    )
    if not comparison.advantage:
        return (skill,)
    advantage = StepTable(
        f"Against {comparison.baseline}",
        f"Skill minus that of {comparison.baseline} on the same videos, with 95 % intervals. Bold: the interval is "
        "above zero; italic and underlined: below.",
        tuple(row(name, difference) for name, difference in comparison.advantage.items()),
        signed=True,
        remarks=tuple(verdict(name, comparison.baseline, d) for name, d in comparison.advantage.items()),
    )
    return skill, advantage


def _adaptation(names: Sequence[str]) -> tuple[StepTable, ...]:
    """What test-time training gained, for the predictors that were measured with it too."""
    rows = []
    for name in names:
        adapted = json.loads((ARTIFACTS / "evaluate" / name / "metrics.json").read_text()).get("adapted")
        if adapted is not None:
            steps = [
                Interval(s["value"], s.get("low", math.nan), s.get("high", math.nan))
                for s in adapted["skill_gained"]["steps"]
            ]
            rows.append((name, tuple(steps)))
    note = (
        "Skill with the flow head trained on the observed frames of each window before it is predicted, minus skill "
        "without, on the same videos, with 95 % intervals. Bold: the interval is above zero; italic and underlined: "
        "below."
    )
    return (StepTable("Test-time training", note, tuple(rows), signed=True),) if rows else ()


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
        definition = METRICS[metric]
        if curves and definition.better != "neither":
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


def _metrics(results: Sequence[Evaluation], comparison: Comparison, horizon: int) -> dict[str, Any]:
    """Flat figures per row of the table, rounded so that a difference in `dvc metrics diff` means something."""
    out: dict[str, Any] = {}
    for result in results:
        mine = comparison.scores[result.name]
        row = _rounded({metric: s.overall.value for metric, s in mine.items()})
        row |= _rounded({f"skill_{k}": mine["skill"].steps[k - 1].value for k in _headline_steps(horizon)})
        out[result.name] = row | {"parameters": result.parameters}
    if comparison.advantage:
        out[f"against_{comparison.baseline}"] = {
            name: _rounded(vars(d.overall))
            | {"step": {str(k): _rounded(vars(step)) for k, step in enumerate(d.steps, start=1)}}
            for name, d in comparison.advantage.items()
        }
    return out


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items() if math.isfinite(value)}


if __name__ == "__main__":
    run_stage("report", run)
