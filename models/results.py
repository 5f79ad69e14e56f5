"""The folder of one evaluation: figures for DVC, states for merging and comparing, examples, films.

::

    metrics.json        headline figures with intervals (dvc metrics show, dvc metrics diff)
    by_horizon.csv      every metric at every step (dvc plots show)
    states.json         sums and counts per video: merge, compare in pairs, recompute
    examples/RULE.npz   windows to look at, lossless, with everything the report draws
    clips/RULE.mp4      truth | prediction | error, moving; .png: the same as a strip of steps
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from data.errors import StoreError
from data.files import replace_file
from data.picture import error_picture, panel, write_png, write_video
from models.evaluation import Evaluation
from models.examples import Example
from models.metrics import METRICS, Estimate, Score, paired_difference, score
from models.statistics import from_json

_WITH_INTERVAL = ("psnr", "ssim", "skill", "fg_psnr", "fg_skill", "epe_moving", "lpips", "box_iou")
_STRIP_STEPS = 6
_LEAST_TILE_PX = 192


def write_results(
    folder: Path,
    evaluation: Evaluation,
    *,
    seed: int,
    fps: float,
    headline_steps: Sequence[int] = (1, 6, 12),
    adapted: Evaluation | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> None:
    """Writes the folder above, repeatable byte for byte: the speed, which is not, is left to the caller.

    ``seed`` draws the bootstrap, ``fps`` is the rate of the films (that of the frames after striding, or slower).
    ``headline_steps`` beyond the horizon are left out of ``metrics.json``. ``adapted``, the same predictor with
    test-time training, stands there under that name with the paired difference of skill. ``protocol`` (its name, and
    what was evaluated under it) and the versions of the metrics travel with the figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = score(evaluation.state, np.random.default_rng(seed))
    headline = _headline(evaluation, scores, headline_steps)
    if adapted is not None:
        rng = np.random.default_rng(seed)
        other = _headline(adapted, score(adapted.state, np.random.default_rng(seed)), headline_steps)
        gained = paired_difference(adapted.state, evaluation.state, "skill", rng)
        steps = [_interval(step) for step in gained.steps]
        headline["adapted"] = {
            "overall": other["overall"],
            "step": other["step"],
            "skill_gained": {"overall": _interval(gained.overall), "steps": steps},
        }
    headline |= {"protocol": dict(protocol or {}), "versions": {name: METRICS[name].version for name in scores}}
    _write(folder / "metrics.json", _json(headline))
    _write(folder / "by_horizon.csv", _by_horizon(evaluation.name, scores))
    _write(folder / "states.json", evaluation.state.to_json())
    for example in evaluation.examples:
        slug = example.rules[0].replace(" ", "_")
        _save_example(folder / "examples" / f"{slug}.npz", example)
        write_video(folder / "clips" / f"{slug}.mp4", film(example), fps)
        write_png(folder / "clips" / f"{slug}.png", strip(example))


def read_results(folder: Path) -> Evaluation:
    """The evaluation behind a folder of `write_results`, without its speed. Raises `StoreError` for a missing file."""
    for name in ("metrics.json", "states.json"):
        if not (folder / name).is_file():
            raise StoreError(f"{folder} has no {name}", remedy="run the evaluate stage of this predictor again")
    headline = json.loads((folder / "metrics.json").read_text())
    current = {name: METRICS[name].version for name in headline.get("versions", {}) if name in METRICS}
    if (found := headline.get("versions")) != current:
        raise StoreError(
            f"the metrics of {folder} have the versions {found}, this code computes {current}",
            remedy="evaluate again: `dvc repro`",
        )
    return Evaluation(
        name=headline["predictor"],
        state=from_json((folder / "states.json").read_text()),
        parameters=headline["parameters"],
        examples=read_examples(folder),
        speed=None,
        protocol=headline["protocol"],
    )


def read_examples(folder: Path) -> tuple[Example, ...]:
    """The windows that were kept, whatever became of the metrics since."""
    return tuple(_load_example(path) for path in sorted((folder / "examples").glob("*.npz")))


def film(example: Example) -> UInt8[np.ndarray, "t rows cols 3"]:
    """Truth, prediction and error side by side: first the observed frames, then the predicted ones."""
    observed = [_tiles(frame, frame, ("observed", "observed", "error"), example) for frame in example.context]
    steps = zip(example.truth, example.prediction, strict=True)
    predicted = [
        _tiles(truth, said, (f"truth +{k}", f"prediction +{k}", "error"), example)
        for k, (truth, said) in enumerate(steps, start=1)
    ]
    return np.stack(observed + predicted)


def strip(example: Example) -> UInt8[np.ndarray, "rows cols 3"]:
    """Rows truth, prediction, error; columns the last observed frame and up to six steps, first and last included."""
    y = len(example.truth)
    steps = np.unique(np.linspace(0, y - 1, min(y, _STRIP_STEPS)).round().astype(int)).tolist()
    last = example.context[-1]
    truth = [last, *(example.truth[k] for k in steps)]
    said = [last, *(example.prediction[k] for k in steps)]
    error = [error_picture(a, b) for a, b in zip(said, truth, strict=True)]
    labels = ["observed", *(f"truth +{k + 1}" for k in steps)]
    labels += ["observed", *(f"prediction +{k + 1}" for k in steps)]
    labels += ["error", *(f"error +{k + 1}" for k in steps)]
    return panel([*truth, *said, *error], labels, columns=len(steps) + 1, scale=_scale(example))


def _tiles(
    truth: UInt8[np.ndarray, "h w 3"], said: UInt8[np.ndarray, "h w 3"], labels: tuple[str, ...], example: Example
) -> UInt8[np.ndarray, "rows cols 3"]:
    return panel([truth, said, error_picture(said, truth)], labels, columns=3, scale=_scale(example))


def _scale(example: Example) -> int:
    return math.ceil(_LEAST_TILE_PX / example.truth.shape[2])


def _headline(evaluation: Evaluation, scores: dict[str, Score], steps: Sequence[int]) -> dict[str, Any]:
    overall = {name: _interval(s.overall) for name, s in scores.items()}
    horizon = evaluation.state.horizon
    return {
        "predictor": evaluation.name,
        "parameters": evaluation.parameters,
        "videos": len(evaluation.state.videos),
        "windows": evaluation.windows,
        "horizon": horizon,
        "overall": {name: values for name, values in overall.items() if values},
        "step": {
            str(k): _known({name: s.steps[k - 1].value for name, s in scores.items() if s.steps})
            for k in steps
            if k <= horizon
        },
    }


def _interval(estimate: Estimate) -> dict[str, float]:
    return _known({"value": estimate.value, "low": estimate.low, "high": estimate.high})


def _by_horizon(name: str, scores: dict[str, Score]) -> str:
    """One row per step; a metric that was not measured leaves its cell empty, and the columns never change."""
    by_step = [name for name, metric in METRICS.items() if metric.overall not in ("ranked", "whole")]
    columns = ["predictor", "step"]
    for metric in by_step:
        columns += [metric, f"{metric}_low", f"{metric}_high"] if metric in _WITH_INTERVAL else [metric]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    for k in range(len(next(iter(scores.values())).steps)):
        row: dict[str, Any] = {"predictor": name, "step": k + 1}
        for metric in by_step:
            if metric not in scores:
                continue
            step = scores[metric].steps[k]
            row |= _known({metric: step.value})
            if metric in _WITH_INTERVAL:
                row |= _known({f"{metric}_low": step.low, f"{metric}_high": step.high})
        table.writerow(row)
    return text.getvalue()


def _known(values: dict[str, float]) -> dict[str, float]:
    """Without NaN, to six significant digits: what is left does not depend on the order of summation."""
    return {name: float(f"{v:.6g}") for name, v in values.items() if not math.isnan(v)}


def _save_example(path: Path, example: Example) -> None:
    given = {f.name: getattr(example, f.name) for f in fields(example)}
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in given.items() if value is not None}
    # savez leaves out the time of writing, so equal examples are equal files.
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def _load_example(path: Path) -> Example:
    with np.load(path, allow_pickle=False) as file:
        arrays: dict[str, Any] = dict(file)
    rules = tuple(arrays.pop("rules").tolist())
    video, start = int(arrays.pop("video")), int(arrays.pop("start"))
    return Example(rules=rules, video=video, start=start, **arrays)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    replace_file(path, text.encode())
