"""All predictors beside one another: scores with intervals, and how each differs from the baseline on the same videos.

Two overlapping intervals do not say that two predictors are equal, since a hard video is hard for both. The paired
difference (`models.metrics.paired_difference`) takes that out, and is what a claim to be better should rest on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.evaluation import Evaluation
from models.metrics import Estimate, Score, paired_difference, score


@dataclass(frozen=True)
class Comparison:
    """``scores`` by row and metric, in the order given; ``advantage``: skill minus that of ``baseline``, by row.

    ``best`` has the greatest skill over the horizon of those in ``advantage`` (the earlier of equals; None where there
    is none), and ``lead`` is its skill minus that of ``baseline`` and of each of the others, by row.
    """

    baseline: str
    scores: dict[str, dict[str, Score]]
    advantage: dict[str, Score]
    best: str | None
    lead: dict[str, Score]


def compare(results: Sequence[Evaluation], *, baseline: str, others: Sequence[str], seed: int) -> Comparison:
    """Scores of all ``results``, and the differences of ``others`` to ``baseline``, all on the same draws of videos.

    Raises ValueError where they were not measured under one protocol, on the same windows.
    """
    protocols = {json.dumps(result.protocol, sort_keys=True) for result in results if result.protocol}
    if len(protocols) > 1:
        raise ValueError(f"results of different protocols cannot stand in one table: {' and '.join(sorted(protocols))}")
    states = {result.name: result.state for result in results}
    scores = {name: score(state, np.random.default_rng(seed)) for name, state in states.items()}

    def difference(name: str, other: str) -> Score:
        return paired_difference(states[name], states[other], "skill", np.random.default_rng(seed))

    advantage = {name: difference(name, baseline) for name in others}
    best = max(others, key=lambda name: scores[name]["skill"].overall.value, default=None)
    lead = {} if best is None else {name: difference(best, name) for name in (baseline, *others) if name != best}
    return Comparison(baseline, scores, advantage, best, lead)


def verdict(name: str, baseline: str, difference: Score) -> str:
    """One sentence: at which steps ``name`` is above, below or not told apart from ``baseline``, by the intervals."""
    above = [k for k, step in enumerate(difference.steps, start=1) if step.low > 0]
    below = [k for k, step in enumerate(difference.steps, start=1) if step.high < 0]
    if all(math.isnan(step.low) for step in difference.steps):
        return f"{name} against {baseline}: one video gives no interval, so nothing can be said."
    parts = []
    if above:
        parts.append(f"beats {baseline} at {spans(above)} with the interval above zero")
    if below:
        parts.append(f"falls behind {'it' if above else baseline} at {spans(below)} with the interval below zero")
    if not parts:
        return f"{name} cannot be told from {baseline} at any step: every interval holds zero."
    return f"{name} {' and '.join(parts)}{_over_all(difference.overall)}."


def _over_all(overall: Estimate) -> str:
    return f"; over all steps the difference is {overall.value:+.3f} [{overall.low:+.3f}, {overall.high:+.3f}]"


def spans(steps: Sequence[int]) -> str:
    """Ascending steps for people: "step 3", "steps 1, 4-12"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    named = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"step{'s' if len(steps) > 1 else ''} {named}"
