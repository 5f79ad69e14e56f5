"""Predictors beside one another: who beats the baseline where, and the tables and sentences that say so."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison import bracketed, document, fixed, main, table
from models.comparison import Comparison, compare, spans, verdict
from models.evaluation import Evaluation
from models.metrics import Estimate, Score, paired_difference
from models.results import write_results
from models.statistics import State, Statistic
from pipeline import profiles
from pipeline.cli import main as cli

VIDEOS, STEPS = 30, 4


def evaluation(name: str, factors: list[float], *, seed: int | None = None, **means: float) -> Evaluation:
    """A predictor whose squared error is ``factors`` times that of copying, give or take where there is a ``seed``, on
    easy and hard videos."""
    hard = np.random.default_rng(99).lognormal(-5, 1, (VIDEOS, 1)) * np.ones((1, STEPS))
    error = hard * factors * (1 if seed is None else np.random.default_rng(seed).uniform(0.95, 1.05, hard.shape))
    ones = np.ones((VIDEOS, STEPS))
    statistics = {
        "squared_error": Statistic(error, ones),
        "squared_error_copy": Statistic(hard, ones),
        "ssim": Statistic(0.9 * ones, ones),
        **{name: Statistic(value * ones, ones) for name, value in means.items()},
    }
    return Evaluation(name, State(np.arange(VIDEOS), statistics), 1234, (), None)


@pytest.fixture
def results() -> list[Evaluation]:
    return [
        evaluation("copy_last", [1, 1, 1, 1]),
        evaluation("advect", [0.3, 0.4, 0.5, 0.6], seed=1),
        evaluation("warp", [0.4, 0.4, 0.4, 0.5], seed=2, lpips=0.125, box_iou=0.75, collision_base=0.0625),
    ]


def compared(results: list[Evaluation]) -> Comparison:
    return compare(results, baseline="advect", others=["warp"], seed=0)


def test_differences_are_paired_and_against_the_baseline(results: list[Evaluation]) -> None:
    found = compared(results)
    assert list(found.scores) == ["copy_last", "advect", "warp"]
    assert list(found.advantage) == ["warp"]
    expected = paired_difference(results[2].state, results[1].state, "skill", np.random.default_rng(0))
    assert found.advantage["warp"] == expected
    mine, theirs = (found.scores[n]["skill"].overall.value for n in ("warp", "advect"))
    assert expected.overall.value == pytest.approx(mine - theirs)


def test_the_best_is_set_against_every_other(results: list[Evaluation]) -> None:
    results.append(evaluation("blur", [0.5, 0.6, 0.7, 0.8], seed=3))
    found = compare(results, baseline="advect", others=["blur", "warp"], seed=0)
    assert found.best == "warp"
    assert list(found.lead) == ["advect", "blur"]
    assert found.lead["advect"] == found.advantage["warp"]
    expected = paired_difference(results[2].state, results[3].state, "skill", np.random.default_rng(0))
    assert found.lead["blur"] == expected
    assert expected.overall.low > 0
    nobody = compare(results[:2], baseline="advect", others=[], seed=0)
    assert (nobody.best, nobody.lead) == (None, {})


def test_the_sentence_says_where_the_interval_excludes_zero(results: list[Evaluation]) -> None:
    said = verdict("warp", "advect", compared(results).advantage["warp"])
    assert said.startswith(
        "warp beats advect at steps 3-4 with the interval above zero and falls behind it at step 1 with the interval "
        "below zero; over all steps the difference is +0.0"
    )


def score_of(*steps: tuple[float, float, float]) -> Score:
    estimates = tuple(Estimate(*step) for step in steps)
    return Score(estimates[0], estimates)


def test_other_sentences() -> None:
    above, below, open_ = (0.5, 0.25, 0.75), (-0.5, -0.75, -0.25), (0.1, -0.1, 0.3)
    end = "; over all steps the difference is {} ["
    assert verdict("a", "b", score_of(above, open_)).startswith(
        "a beats b at step 1 with the interval above zero" + end.format("+0.500")
    )
    assert verdict("a", "b", score_of(below, below)).startswith(
        "a falls behind b at steps 1-2 with the interval below zero" + end.format("-0.500")
    )
    assert verdict("a", "b", score_of(open_)) == "a cannot be told from b at any step: every interval holds zero."
    none = (0.5, math.nan, math.nan)
    assert verdict("a", "b", score_of(none)) == "a against b: one video gives no interval, so nothing can be said."


@pytest.mark.parametrize(
    ("steps", "text"),
    [([3], "step 3"), ([2, 3, 4], "steps 2-4"), ([1, 4, 5, 9], "steps 1, 4-5, 9"), ([1, 2], "steps 1-2")],
)
def test_spans(steps: list[int], text: str) -> None:
    assert spans(steps) == text


# --- the document ------------------------------------------------------------------------------------------------


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


def test_tables_hold_what_was_measured(results: list[Evaluation]) -> None:
    found = compared(results)
    ceiling = {"skill": 0.999, "psnr": 57.0, "ssim": 0.99, "lpips": 0.001, "parameters": 5000}
    first, second, third, sentences = document(results, found, ceiling, {"warp": 61.4}).split("\n\n")
    overall = rows_of(first)
    titles = ["skill", "PSNR dB", "SSIM", "LPIPS", "box IoU", "AP by chance", "F1 of always", "parameters", "frames/s"]
    assert overall["predictor"] == titles, "nothing of what nobody measured"
    skill = found.scores["warp"]["skill"]
    assert overall["warp"][0] == bracketed(skill.overall)
    assert overall["warp"][2:] == ["0.9000", "0.1250", "0.750", "0.062", "0.118", "1,234", "61"]
    assert overall["advect"][3:] == ["-", "-", "-", "-", "1,234", "-"], "absent, not zero"
    assert overall["copy_last"][0] == "0.000", "no interval without width"
    assert overall["vae_ceiling"] == ["0.999", "57.00", "0.9900", "0.0010", "-", "-", "-", "5,000", "-"]
    by_step = rows_of(second)
    assert by_step["skill at step"] == ["1", "2", "3", "4", "mean"]
    assert by_step["warp"] == [*(f"{s.value:.3f}" for s in skill.steps), bracketed(skill.overall)]
    against = rows_of(third)
    assert against["skill minus advect's at step"] == ["warp"]
    assert list(against)[2:] == ["1", "2", "3", "4", "mean"]
    step = found.advantage["warp"].steps[0]
    assert against["1"] == [f"{step.value:+.3f} [{step.low:+.3f}, {step.high:+.3f}]"]
    assert sentences == f"- {verdict('warp', 'advect', found.advantage['warp'])}"


def test_cells() -> None:
    assert bracketed(Estimate(0.5, math.nan, math.nan)) == "0.500"
    assert bracketed(Estimate(0.5, 0.25, 0.75), sign=True) == "+0.500 [+0.250, +0.750]"
    assert (fixed(None, 2), fixed(math.nan, 2), fixed(1234567, 0)) == ("-", "-", "1,234,567")
    assert (fixed(-0.0001, 3), fixed(-0.0001, 3, sign=True), fixed(-0.25, 2)) == ("0.000", "+0.000", "-0.25")
    with pytest.raises(ValueError, match="does not fit the 2 columns"):
        table(["a", "b"], [["1"]])


def test_programs_read_what_the_stages_wrote(
    results: list[Evaluation],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results[2] = evaluation("latent_warp", [0.4, 0.4, 0.4, 0.5], seed=2, lpips=0.125)
    for result in results:
        write_results(tmp_path / "artifacts/evaluate" / result.name, result, seed=0, fps=12.5)
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    shutil.copytree(root / "profiles", tmp_path / "profiles")
    profiles.apply(tmp_path, "tiny")
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".work/runs").mkdir(parents=True)
    (tmp_path / ".work/runs/evaluate@advect.json").write_text('{"frames_per_second": 2345.6}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["comparison"])
    main()
    found = compare(results, baseline="advect", others=["latent_warp"], seed=0)
    assert capsys.readouterr().out == document(results, found, {}, {"advect": 2345.6}) + "\n"
    figures = {name: {"skill": s["skill"].overall.value, "psnr": 30.0} for name, s in found.scores.items()}
    figures["latent_warp"] |= {"lpips": 0.125, "parameters": 1_234_567}
    file = tmp_path / "artifacts/report/metrics.json"
    file.parent.mkdir()
    file.write_text(json.dumps(figures | {"against_advect": {"latent_warp": {"value": 0.1}}}))
    assert cli(["results"]) == 0
    printed = capsys.readouterr().out
    cells = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.count("│") > 3}
    assert set(cells) == {"copy_last", "advect", "latent_warp"}
    assert "0.1250" in cells["latent_warp"]
    assert "1,234,567" in cells["latent_warp"]
    assert "2,346" in cells["advect"]
    for title in ("LPIPS", "parameters", "frames/s"):
        assert title in printed
    assert "collision" not in printed
