"""report: the comparison of all predictors as one offline page, and the same figures for `dvc metrics`."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data.chart import Chart, Curve, Kind
from data.manifest import read_manifest, write_json
from data.page import build_page
from data.page_content import PageContent, Provenance, Quarantined, Row, Timing
from models.autoencoder import LatentVAE, load_vae
from models.comparison import Comparison, compare
from models.evaluation import Evaluation, evaluate_reconstruction
from models.metrics import METRICS, Estimate, Score
from models.results import read_results
from pipeline.progress import progress
from pipeline.protocols import PROTOCOLS
from pipeline.stage import ARTIFACTS, Job, read_runs, run_stage
from stages.evaluate import Windows, networks_of
from stages.gallery import flow_gallery, reconstruction_gallery
from stages.tables import ablations, adaptation, by_step, columns, every_metric, interval, lead, published, title
from stages.teacher_accuracy import measure_teacher
from stages.windows_shown import extremes, films, films_note, shared, studies, together

BASELINES = ("copy_last", "advect")
REFERENCE = "advect"
"""What a predictor has to beat: knowing the last motion, and nothing learned."""
CEILING = "vae_ceiling"
CURVES = ("skill", "psnr", "fg_psnr", "ssim", "lpips", "epe_moving", "box_iou")
SKILL_FLOOR = -1.0
"""Where the chart of skill is cut, as one curve far below would flatten all others."""
VERSIONS = (
    "clevrcast",
    "torch",
    "torchvision",
    "zarr",
    "decord",
    "opencv-python",
    "altair",
    "dvc",
    "diffusers",
    "pybullet",
)


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
    teacher, teacher_figures = measure_teacher(job, windows.source.videos)
    steps, shown = headline_steps(windows.horizon), shared(results)
    protocol = job.params.evaluate.protocol
    own = extremes(results, comparison.best, windows)
    content = PageContent(
        title=f"clevrcast: {protocol}",
        summary=summary(comparison),
        facts=_facts(job, windows, results[0]),
        skill_steps=steps,
        rows=headline_rows(everyone, comparison, steps),
        columns=columns(),
        published=published(protocol, comparison.scores),
        published_note=PROTOCOLS[protocol].note if protocol in PROTOCOLS else "",
        tables=(
            *lead(comparison, steps),
            *by_step(comparison),
            *ablations(results, comparison.scores, job.params.predictors, job.params.evaluate.seed),
            *adaptation(names),
            every_metric(comparison.scores),
        ),
        charts=_charts(comparison.scores),
        clips=films(together(shown[: job.params.report.examples], own), windows.fps),
        films_note=films_note(comparison.best),
        studies=studies(shown, {name: kind_of(name) for name in names}),
        teachers=(teacher,) if teacher is not None else (),
        galleries=(*flow_gallery(job, windows), reconstruction_gallery(windows, vae, job.device)),
        quarantine=tuple(_quarantine()),
        timings=tuple(_timings()),
        provenance=_provenance(job, vae),
        definitions=tuple((name, metric.definition) for name, metric in METRICS.items()),
    )
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / "index.html").write_text(build_page(content))
    figures = report_figures(everyone, comparison, steps)
    write_json(job.out / "metrics.json", figures | {"teacher": teacher_figures})


def headline_steps(horizon: int) -> tuple[int, ...]:
    return tuple(k for k in (1, 6, 12) if k <= horizon)


def kind_of(name: str) -> Kind:
    return "ceiling" if name == CEILING else "baseline" if name in BASELINES else "predictor"


def summary(comparison: Comparison) -> str:
    """What came out, in two or three sentences."""
    best, scores = comparison.best, comparison.scores
    if best is None:
        return "Only the baselines were evaluated."
    skill, base = (scores[name]["skill"].overall for name in (best, REFERENCE))
    if not skill.value > 0:
        return f"No learned predictor beats copying the last frame: the best, {best}, has a skill of {skill.value:.2f}."
    bounds = f" (95 % interval {_percent(skill.low)} to {_percent(skill.high)})" if math.isfinite(skill.low) else ""
    text = (
        f"The best predictor is {best}: over the horizon it removes {_percent(skill.value)} of the squared error of "
        f"copying the last frame{bounds}; {REFERENCE}, which learns nothing, removes {_percent(base.value)}. "
        f"{_against_reference(comparison.lead[REFERENCE].overall)}"
    )
    behind = {name: d.overall for name, d in comparison.lead.items() if name not in BASELINES}
    if not behind:
        return text
    beaten = [name for name, d in behind.items() if d.low > 0]
    if len(beaten) == len(behind):
        return f"{text} Its lead over every other learned predictor is larger than chance."
    rest = ", ".join(name for name in behind if name not in beaten)
    return f"{text} On these videos it cannot be told from {rest} over the whole horizon."


def _against_reference(gained: Estimate) -> str:
    if math.isnan(gained.low):
        return "One video gives no interval, so the difference may be chance."
    bounds = f"{gained.value:+.3f} [{gained.low:+.3f}, {gained.high:+.3f}]"
    if gained.low > 0:
        return f"The difference in skill, {bounds}, is larger than chance."
    if gained.high < 0:
        return f"It falls behind {REFERENCE}: the difference in skill is {bounds}."
    return f"The difference in skill, {bounds}, may be chance."


def _percent(value: float) -> str:
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%"


def _facts(job: Job, windows: Windows, first: Evaluation) -> tuple[tuple[str, str], ...]:
    p = job.params
    h, w = p.decode.resolution
    return (
        ("videos", f"{len(first.state.videos)} {p.acquire.source}, {p.evaluate.split} split"),
        ("windows", f"{first.windows} of {windows.context} + {windows.horizon} frames, {_chosen(windows)}"),
        ("frames", f"{h} x {w}, one in {p.decode.stride} ({windows.fps:g} per second)"),
        ("teacher", f"{p.flow.teacher} at {p.flow.resolution[0]} x {p.flow.resolution[1]}"),
    )


def _chosen(windows: Windows) -> str:
    if windows.kept.decode.no_entry is None:
        return f"every {windows.every}"
    left_out = f"; {len(windows.without_window)} videos have none" if windows.without_window else ""
    return f"the first of each video in which nothing comes into view{left_out}"


def headline_rows(results: Sequence[Evaluation], comparison: Comparison, steps: Sequence[int]) -> tuple[Row, ...]:
    """The headline table; the ceiling is no predictor and was not trained here."""
    return tuple(_row(result, comparison, steps) for result in results)


def _row(result: Evaluation, comparison: Comparison, steps: Sequence[int]) -> Row:
    mine, runs, kind = comparison.scores[result.name], read_runs(), kind_of(result.name)
    gained = comparison.advantage.get(result.name)
    trained = runs.get(f"train@{result.name}", {}) if kind == "predictor" else {}
    speed = runs.get(f"evaluate@{result.name}", {}).get("frames_per_second")
    return Row(
        name=result.name,
        kind=kind,
        skill=interval(mine["skill"].overall),
        skill_at=tuple(mine["skill"].steps[k - 1].value for k in steps),
        figures={name: score.overall.value for name, score in mine.items()},
        advantage=interval(gained.overall) if gained is not None else None,
        parameters=result.parameters,
        frames_per_second=result.speed.frames_per_second if result.speed is not None else speed,
        seconds_trained=trained.get("build_seconds"),
    )


def _charts(scores: dict[str, dict[str, Score]]) -> tuple[Chart, ...]:
    charts = []
    for metric in CURVES:
        curves = []
        for name, mine in scores.items():
            if metric not in mine:
                continue
            steps = mine[metric].steps
            values, low, high = (tuple(_known(getattr(s, f)) for s in steps) for f in ("value", "low", "high"))
            curves.append(Curve(name, values, low, high, kind_of(name)))
        definition, skill = METRICS[metric], metric == "skill"
        if curves:
            floor = SKILL_FLOOR if skill else None
            shown = title(metric).removesuffix(f" {definition.unit}")
            charts.append(Chart(shown, definition.unit, definition.better, tuple(curves), zero=skill, floor=floor))
    return tuple(charts)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


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


def report_figures(results: Sequence[Evaluation], comparison: Comparison, steps: Sequence[int]) -> dict[str, Any]:
    """Flat figures per row of the headline table, then the paired differences, for `dvc metrics diff`.

    To six digits, as `models.results` writes them, so that one figure is one number in both files.
    """
    out: dict[str, Any] = {}
    for result in results:
        mine = comparison.scores[result.name]
        row = _rounded({metric: s.overall.value for metric, s in mine.items()})
        row |= _rounded({f"skill_{k}": mine["skill"].steps[k - 1].value for k in steps})
        out[result.name] = row | {"parameters": result.parameters}
    if comparison.advantage:
        out[f"against_{comparison.baseline}"] = _differences(comparison.advantage)
    if comparison.best is not None:
        out["best_against"] = {comparison.best: _differences(comparison.lead)}
    return out


def _differences(differences: Mapping[str, Score]) -> dict[str, Any]:
    return {
        name: _rounded(vars(d.overall))
        | {"step": {str(k): _rounded(vars(step)) for k, step in enumerate(d.steps, start=1)}}
        for name, d in differences.items()
    }


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in values.items() if math.isfinite(value)}


if __name__ == "__main__":
    run_stage("report", run)
