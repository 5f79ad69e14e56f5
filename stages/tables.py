"""The tables of the report: which metrics stand in the headline, who beats whom, and what single options change."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.page import arrow, number
from data.page_content import Column, Difference, Interval, PublishedRow, StepTable, Table
from models.comparison import Comparison, verdict
from models.evaluation import Evaluation
from models.metrics import METRICS, Estimate, Score, paired_difference
from pipeline.protocols import PROTOCOLS
from pipeline.sections import PredictorBlock
from pipeline.stage import ARTIFACTS

DETAILS = frozenset(
    (
        "mse", "psnr_frame", "skill", "fg_mse", "fg_skill", "epe", "epe_moving", "epe_background", "epe_visible",
        "nonvisible_precision", "nonvisible_recall", "nonvisible_f1", "box_recall", "box_precision",
        "collision_f1_2", "collision_f1_5", "collision_f1_always", "tlpips", "motion_smoothness",
        "motion_smoothness_true", "subject_consistency", "subject_consistency_true", "background_consistency",
        "background_consistency_true",
    )
)  # fmt: skip
"""Metrics that have no column of their own in the headline table, or one that the page makes itself (skill)."""
TITLES = {
    "mse": "MSE", "psnr_frame": "PSNR, mean over frames", "skill": "Skill", "fg_mse": "Foreground MSE",
    "fg_skill": "Foreground skill", "epe": "End-point error", "epe_moving": "End-point error, moving",
    "epe_background": "End-point error, background", "epe_visible": "End-point error, visible",
    "nonvisible_f1": "Non-visible F1", "nonvisible_precision": "Non-visible precision",
    "nonvisible_recall": "Non-visible recall",
    "psnr": "PSNR", "ssim": "SSIM", "fg_psnr": "Foreground PSNR", "lpips": "LPIPS", "box_iou": "Box IoU",
    "collision_ap": "Collision AP", "collision_base_rate": "AP by chance", "fvd": "FVD", "jedi": "JEDi",
    "tlpips": "tLPIPS",
}  # fmt: skip
DIGITS = {"lpips": 4}
MARKED = "Bold: the interval is above zero; italic and underlined: below."


def columns() -> tuple[Column, ...]:
    """Columns of the headline table: every metric but `DETAILS`; the page drops those that nobody was measured by."""
    return tuple(
        Column(name, title(name), metric.better, DIGITS.get(name, 2 if metric.unit == "dB" else 3))
        for name, metric in METRICS.items()
        if name not in DETAILS
    )


def published(protocol: str, scores: Mapping[str, Mapping[str, Score]]) -> tuple[PublishedRow, ...]:
    """Figures of papers under this protocol below ours, by the metrics that they mean; nothing where there are none."""
    if protocol not in PROTOCOLS or not PROTOCOLS[protocol].published:
        return ()
    named = {"psnr": PROTOCOLS[protocol].psnr} | {name: name for name in ("ssim", "lpips", "fvd", "jedi")}
    ours = (
        PublishedRow(
            name,
            **{column: mine[metric].overall.value if metric in mine else None for column, metric in named.items()},
            source="this page",
        )
        for name, mine in scores.items()
    )
    theirs = (PublishedRow(**vars(row)) for row in PROTOCOLS[protocol].published)
    return (*ours, *theirs)


def title(name: str) -> str:
    """A metric for people, with its unit: "PSNR dB", "Box recall"."""
    return f"{TITLES.get(name, name.replace('_', ' ').capitalize())} {METRICS[name].unit}".strip()


def interval(estimate: Estimate) -> Interval:
    return Interval(estimate.value, estimate.low, estimate.high)


def difference(estimate: Estimate) -> Difference:
    return Difference(estimate.value, estimate.low, estimate.high)


def by_step(comparison: Comparison) -> tuple[StepTable, ...]:
    """Skill at every step, and the paired differences to the baseline."""

    def row(name: str, score: Score) -> tuple[str, tuple[Interval, ...]]:
        return name, tuple(interval(step) for step in score.steps)

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
        f"Skill minus that of {comparison.baseline} on the same videos, with 95 % intervals. {MARKED}",
        tuple(row(name, gained) for name, gained in comparison.advantage.items()),
        signed=True,
        remarks=tuple(verdict(name, comparison.baseline, d) for name, d in comparison.advantage.items()),
    )
    return skill, advantage


def lead(comparison: Comparison, steps: Sequence[int]) -> tuple[Table, ...]:
    """The best learned predictor against every other one, over the horizon and at ``steps``."""
    best = comparison.best
    if best is None or not comparison.lead:
        return ()
    rows = tuple(
        (name, difference(d.overall), *(difference(d.steps[k - 1]) for k in steps))
        for name, d in comparison.lead.items()
    )
    return (
        Table(
            "The best against the others",
            f"Skill of {best}, the best learned predictor, minus that of each other one on the same videos, with 95 % "
            f"intervals. {MARKED} The best of several is partly best by chance: its lead is a little too large.",
            (f"{best} minus", "over all steps", *(f"step {k}" for k in steps)),
            rows,
            remarks=tuple(verdict(best, name, d) for name, d in comparison.lead.items()),
        ),
    )


def ablations(
    results: Sequence[Evaluation],
    scores: Mapping[str, Mapping[str, Score]],
    blocks: Mapping[str, PredictorBlock],
    seed: int,
) -> tuple[Table, ...]:
    """Blocks of params.yaml that share a model: what each changes, and what that is worth on the same videos.

    They are compared with the block that bears the model's name, or else with the first of them.
    """
    states = {result.name: result.state for result in results}
    rows, remarks = [], []
    for model in dict.fromkeys(block.model for block in blocks.values()):
        names = [name for name, block in blocks.items() if block.model == model and name in states]
        if len(names) < 2:
            continue
        whole = model if model in names else names[0]
        rows.append((whole, "as it is", interval(scores[whole]["skill"].overall), None, _psnr(scores[whole])))
        for name in (n for n in names if n != whole):
            gained = paired_difference(states[name], states[whole], "skill", np.random.default_rng(seed))
            change = ", ".join(changes(blocks[whole], blocks[name])) or "nothing"
            skill = interval(scores[name]["skill"].overall)
            rows.append((name, change, skill, difference(gained.overall), _psnr(scores[name])))
            remarks.append(f"With {change}: {verdict(name, whole, gained)}")
    if not rows:
        return ()
    note = (
        "Predictors of one model with other options, each against the block above it that is left as it is: skill, and "
        f"the paired difference to that block on the same videos, with 95 % intervals. {MARKED}"
    )
    heads = ("Predictor", "Change", "Skill \N{UPWARDS ARROW}", "Difference", "PSNR \N{UPWARDS ARROW} dB")
    return (Table("Ablations", note, heads, tuple(rows), remarks=tuple(remarks)),)


def changes(whole: PredictorBlock, variant: PredictorBlock) -> list[str]:
    """What ``variant`` sets otherwise ("masked: default to false"). Test-time training is measured apart and no change
    of what is shown here."""
    kept, changed = (_flat(block.model_dump(exclude={"model", "adaptation"})) for block in (whole, variant))
    return [
        f"{name}: {_shown(kept.get(name))} to {_shown(changed.get(name))}"
        for name in dict.fromkeys([*kept, *changed])
        if kept.get(name) != changed.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        out |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path.removeprefix("options."): value}
    return out


def _shown(value: Any) -> str:
    return "default" if value is None else json.dumps(value).strip('"')


def _psnr(scores: Mapping[str, Score]) -> str:
    return number(scores["psnr"].overall.value, 2) if "psnr" in scores else number(None)


def adaptation(names: Sequence[str]) -> tuple[StepTable, ...]:
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
        f"without, on the same videos, with 95 % intervals. {MARKED}"
    )
    return (StepTable("Test-time training", note, tuple(rows), signed=True),) if rows else ()


def every_metric(scores: Mapping[str, Mapping[str, Score]]) -> Table:
    """All that was measured, over the whole horizon: a row per metric, a column per predictor."""
    rows = tuple(
        (
            f"{title(name)}{arrow(metric.better)}",
            *(f"{mine[name].overall.value:.4g}" if name in mine and _is_known(mine[name]) else None
              for mine in scores.values()),
        )
        for name, metric in METRICS.items()
        if any(name in mine and _is_known(mine[name]) for mine in scores.values())
    )  # fmt: skip
    return Table("Every metric", "Over the whole horizon; the definitions stand below the results.",
                 ("Metric", *scores), rows, folded=True)  # fmt: skip


def _is_known(score: Score) -> bool:
    return math.isfinite(score.overall.value)
