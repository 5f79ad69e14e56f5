"""The whole comparison of the predictors that were evaluated, as Markdown tables for documents.

    python -m benchmarks.comparison [--folder CHECKOUT] [--seed N]

Reads what `dvc repro` left: the states below ``artifacts/evaluate``, the ceiling from ``artifacts/report``, and the
speeds of this machine's own runs. Computes nothing but means and intervals, with the seed of ``params.yaml``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.comparison import Comparison, compare, verdict
from models.evaluation import Evaluation
from models.metrics import Estimate
from models.results import read_results
from pipeline.params import load_params
from stages.report import BASELINES, CEILING, REFERENCE

FIGURES = (
    ("psnr", "PSNR dB", 2),
    ("fg_psnr", "objects, PSNR dB", 2),
    ("ssim", "SSIM", 4),
    ("lpips", "LPIPS", 4),
    ("box_iou", "box IoU", 3),
    ("collision_ap", "collision AP", 3),
    ("collision_base_rate", "AP by chance", 3),
    ("collision_f1_2", "collision F1, 2 frames", 3),
    ("collision_f1_5", "collision F1, 5 frames", 3),
    ("collision_f1_always", "F1 of always", 3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="a checkout with results (default: this one)")
    parser.add_argument("--seed", type=int, help="of the bootstrap (default: evaluate.seed)")
    arguments = parser.parse_args()
    params = load_params(arguments.folder / "params.yaml")
    names = [*BASELINES, *(name for name in params.predictors if name not in BASELINES)]
    results = [read_results(arguments.folder / "artifacts/evaluate" / name) for name in names]
    seed = params.evaluate.seed if arguments.seed is None else arguments.seed
    learned = [name for name in names if name not in BASELINES]
    comparison = compare(results, baseline=REFERENCE, others=learned, seed=seed)
    print(document(results, comparison, read_ceiling(arguments.folder), read_speeds(arguments.folder)))


def read_ceiling(folder: Path) -> dict[str, float]:
    """The figures of the VAE's own reconstructions; empty where the report was not made."""
    file = folder / "artifacts/report/metrics.json"
    return json.loads(file.read_text()).get(CEILING, {}) if file.exists() else {}


def read_speeds(folder: Path) -> dict[str, float]:
    """Predicted frames per second of each predictor, where it was evaluated on this machine."""
    runs = {file.stem: json.loads(file.read_text()) for file in sorted((folder / ".work/runs").glob("evaluate@*.json"))}
    speeds = {title.removeprefix("evaluate@"): run.get("frames_per_second") for title, run in runs.items()}
    return {name: speed for name, speed in speeds.items() if speed is not None}


def document(
    results: Sequence[Evaluation], comparison: Comparison, ceiling: dict[str, Any], speeds: dict[str, float]
) -> str:
    """All tables, and a sentence for each predictor."""
    parts = [overall(results, comparison, ceiling, speeds), by_step(comparison)]
    if comparison.advantage:
        parts.append(against(comparison))
        parts.append("\n".join(f"- {verdict(n, comparison.baseline, d)}" for n, d in comparison.advantage.items()))
    return "\n\n".join(parts)


def overall(
    results: Sequence[Evaluation], comparison: Comparison, ceiling: dict[str, Any], speeds: dict[str, float]
) -> str:
    """Every figure over the whole horizon; columns that nothing was measured for are left out."""
    measured = {name: {m: s.overall.value for m, s in scores.items()} for name, scores in comparison.scores.items()}
    figures = [column for column in FIGURES if any(column[0] in row for row in measured.values())]
    rows = [
        [
            result.name,
            bracketed(comparison.scores[result.name]["skill"].overall),
            *(fixed(measured[result.name].get(name), digits) for name, _, digits in figures),
            fixed(result.parameters, 0),
            fixed(speeds.get(result.name), 0),
        ]
        for result in results
    ]
    if ceiling:
        cells = [fixed(ceiling.get(name), digits) for name, digits in (("skill", 3), *((n, d) for n, _, d in figures))]
        rows.append([CEILING, *cells, fixed(ceiling.get("parameters"), 0), "-"])
    return table(["predictor", "skill", *(title for _, title, _ in figures), "parameters", "frames/s"], rows)


def by_step(comparison: Comparison) -> str:
    """Skill at every step, and its mean with the interval."""
    rows = [
        [name, *(fixed(step.value, 3) for step in scores["skill"].steps), bracketed(scores["skill"].overall)]
        for name, scores in comparison.scores.items()
    ]
    steps = range(1, len(rows[0]) - 1)
    return table(["skill at step", *map(str, steps), "mean"], rows)


def against(comparison: Comparison) -> str:
    """Paired differences of skill with intervals: a row per step, a column per predictor."""
    names, differences = list(comparison.advantage), list(comparison.advantage.values())
    rows = [
        [str(k), *(bracketed(d.steps[k - 1], sign=True) for d in differences)]
        for k in range(1, len(differences[0].steps) + 1)
    ]
    rows.append(["mean", *(bracketed(d.overall, sign=True) for d in differences)])
    return table([f"skill minus {comparison.baseline}'s at step", *names], rows)


def bracketed(estimate: Estimate, *, sign: bool = False) -> str:
    """ "0.652 [0.611, 0.690]", without the brackets where there is no interval or it has no width."""
    shown = [fixed(v, 3, sign=sign) for v in (estimate.value, estimate.low, estimate.high)]
    none = math.isnan(estimate.low) or estimate.low == estimate.high
    return shown[0] if none else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def fixed(value: float | None, digits: int, *, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return "-"
    rounded = round(value, digits) + 0.0  # no minus before a zero
    return f"{rounded:{'+' if sign else ''},.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Raises ValueError for a row of another length."""
    lines = [[*head], ["---"] * len(head), *(list(row) for row in rows)]
    if any(len(line) != len(head) for line in lines):
        raise ValueError(f"a row does not fit the {len(head)} columns {list(head)}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
