"""The report: one figure is one number wherever it stands, and what is chosen to be shown."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.page import arrow, build_page, count, number
from data.page_content import Interval, PageContent
from models.comparison import Comparison, compare
from models.evaluation import Evaluation
from models.examples import Example
from models.metrics import METRICS
from models.results import write_results
from pipeline.sections import PredictorBlock
from stages.report import headline_rows, headline_steps, report_figures, summary
from stages.tables import ablations, by_step, changes, columns, every_metric, lead, published
from stages.windows_shown import Shown, copied, extremes, films, films_note, shared, studies, together
from tests.test_comparison import STEPS, evaluation
from tests.test_page import Reader

NAMES = ("copy_last", "advect", "warp", "blur")


@pytest.fixture
def results() -> list[Evaluation]:
    return [
        evaluation("copy_last", [1, 1, 1, 1], fg_squared_error=0.02, lpips=0.25),
        evaluation("advect", [0.3, 0.4, 0.5, 0.6], seed=1, fg_squared_error=0.01, lpips=0.2),
        evaluation("warp", [0.2, 0.3, 0.4, 0.5], seed=2, fg_squared_error=0.005, lpips=0.125, box_iou=0.75),
        evaluation("blur", [0.5, 0.6, 0.7, 0.8], seed=3, fg_squared_error=0.015, lpips=0.5),
    ]


def compared(results: list[Evaluation]) -> Comparison:
    return compare(results, baseline="advect", others=["warp", "blur"], seed=7)


def test_one_figure_is_one_number_wherever_it_stands(results: list[Evaluation], tmp_path: Path) -> None:
    comparison, steps = compared(results), headline_steps(STEPS)
    for result in results:
        write_results(tmp_path / result.name, result, seed=7, fps=12.5)
    figures = json.loads(json.dumps(report_figures(results, comparison, steps)))
    shown = columns()
    page = build_page(
        PageContent(
            "t", summary(comparison), (), steps, headline_rows(results, comparison, steps), shown,
            tables=(*lead(comparison, steps), *by_step(comparison), every_metric(comparison.scores)),
        )
    )  # fmt: skip
    reader = Reader(page)
    head, table = reader.rows[0], {row[0].split()[0]: row for row in reader.rows[1:5]}
    for name in NAMES:
        mine = json.loads((tmp_path / name / "metrics.json").read_text())
        assert mine["predictor"] == name
        with (tmp_path / name / "by_horizon.csv").open() as file:
            horizon = list(csv.DictReader(file))
        for metric, values in mine["overall"].items():
            assert figures[name][metric] == values["value"], (name, metric)
            if METRICS[metric].overall == "mean":
                over_steps = np.mean([float(row[metric]) for row in horizon])
                assert over_steps == pytest.approx(values["value"], rel=1e-5, abs=1e-12)
        for k in steps:
            assert figures[name][f"skill_{k}"] == mine["step"][str(k)]["skill"] == float(horizon[k - 1]["skill"])
        row, skill = table[name], mine["overall"]["skill"]
        assert row[1].split()[0] == number(skill["value"])
        if skill["low"] != skill["high"]:
            assert row[1].split(maxsplit=1)[1] == f"[{number(skill['low'])}, {number(skill['high'])}]"
        assert row[3:4] == [number(figures[name]["skill_1"], 2)]
        for column in shown:
            title = " ".join((column.title + arrow(column.better)).split())
            if title in head:
                assert row[head.index(title)] == number(figures[name].get(column.name), column.digits)
        assert row[head.index("Parameters")] == count(figures[name]["parameters"])
    against, best = figures["against_advect"], figures["best_against"]["warp"]
    assert set(best) == {"advect", "blur"}
    assert best["advect"] == against["warp"], "the same difference, said twice"
    for name in ("warp", "blur"):
        cell = table[name][head.index("Against advect")]
        assert cell.replace("+", "") == (
            f"{number(against[name]['value'])} [{number(against[name]['low'])}, {number(against[name]['high'])}]"
        )
    leads = next(row for row in reader.rows if row[0] == "warp minus")
    row = next(row for row in reader.rows if row[0] == "blur" and len(row) == len(leads))
    assert row[1].startswith(f"+{number(best['blur']['value'])} [")


def test_new_metrics_find_their_column_and_definition() -> None:
    names = [column.name for column in columns()]
    assert names[:4] == ["psnr", "ssim", "fg_psnr", "lpips"]
    assert {"box_iou", "collision_ap"} <= set(names)
    assert "mse" not in names
    assert [c.better for c in columns()][:4] == ["higher", "higher", "higher", "lower"]


def test_every_metric_is_told_for_everybody(results: list[Evaluation]) -> None:
    table = every_metric(compared(results).scores)
    assert table.columns == ("Metric", *NAMES)
    rows: dict[Any, Any] = {row[0]: row[1:] for row in table.rows}
    assert rows["Box IoU\N{NO-BREAK SPACE}\N{UPWARDS ARROW}"] == (None, None, "0.75", None)
    assert rows["LPIPS\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}"] == ("0.25", "0.2", "0.125", "0.5")


def test_published_figures_stand_below_ours_in_their_protocol_only(results: list[Evaluation]) -> None:
    scores = compared(results).scores
    assert published("demo", scores) == published("mine", scores) == ()
    rows = published("slotformer", scores)
    assert [row.method for row in rows[: len(scores)]] == list(scores)
    assert rows[0].psnr is None, "these have no psnr_frame, which is what the paper calls PSNR"
    assert rows[0].lpips == scores["copy_last"]["lpips"].overall.value
    assert rows[0].fvd is None
    assert (rows[-5].method, rows[-5].psnr) == ("SlotFormer", 30.21)
    assert all(row.source for row in rows)


def test_the_summary_says_who_leads_and_by_how_much(results: list[Evaluation]) -> None:
    text = summary(compared(results)).replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith("The best predictor is warp: over the horizon it removes 65 % of the squared error")
    assert "advect, which learns nothing, removes 55 %. The difference in skill, +0." in text
    assert "is larger than chance. Its lead" in text
    assert text.endswith("Its lead over every other learned predictor is larger than chance.")
    twin = replace(results[2], name="twin")
    text = summary(compare([*results, twin], baseline="advect", others=["warp", "blur", "twin"], seed=7))
    assert text.endswith("On these videos it cannot be told from twin over the whole horizon.")
    assert summary(compare(results[:2], baseline="advect", others=[], seed=7)) == "Only the baselines were evaluated."
    worse = evaluation("bad", [2, 2, 2, 2])
    text = summary(compare([*results[:2], worse], baseline="advect", others=["bad"], seed=7))
    assert text == "No learned predictor beats copying the last frame: the best, bad, has a skill of -1.00."


def block(model: str, **options: Any) -> PredictorBlock:
    return PredictorBlock(model=model, options=options)


def test_ablations_tell_the_change_and_what_it_is_worth(results: list[Evaluation]) -> None:
    comparison = compared(results)
    blocks = {"advect": block("advect"), "blur": block("warp", masked=False), "warp": block("warp", flow=0.5)}
    (table,) = ablations(results, comparison.scores, blocks, seed=7)
    change = "flow: 0.5 to default, masked: default to false"
    assert [row[:2] for row in table.rows] == [("warp", "as it is"), ("blur", change)]
    difference = table.rows[1][3]
    assert isinstance(difference, Interval)
    assert difference.value == pytest.approx(-comparison.lead["blur"].overall.value)
    assert table.remarks[0].startswith(f"With {change}: blur falls behind warp at")
    assert ablations(results, comparison.scores, {"warp": blocks["warp"]}, seed=7) == ()


def test_changes_reach_into_the_training_and_leave_adaptation_out() -> None:
    whole = PredictorBlock(model="m", training={"steps": 5, "learning_rate": 0.1})
    variant = PredictorBlock(model="m", training={"steps": 9, "learning_rate": 0.1}, batch=whole.batch + 1)
    said = changes(whole, variant)
    assert "training.steps: 5 to 9" in said
    assert f"batch: {whole.batch} to {whole.batch + 1}" in said
    assert changes(whole, whole.model_copy(update={"adaptation": {"steps": 3}})) == []


# --- windows -----------------------------------------------------------------------------------------------------


def example(video: int, *rules: str, shade: int = 80, heads: bool = False) -> Example:
    frames = np.full((3, 16, 24, 3), 60, dtype=np.uint8)
    boxes = np.array([[[2.0, 2.0, 10.0, 10.0]]] * 3, dtype=np.float32)
    ones = np.ones((3, 1), dtype=np.float32)
    field = np.full((3, 2, 16, 24), 1.5, dtype=np.float16)
    whole = Example(rules, video, 8, frames[:2], frames, frames - 60 + shade, np.full(3, 0.01), np.full(3, 0.04))
    if not heads:
        return replace(whole, true_flow_bwd=field, true_boxes=boxes, true_presence=ones)
    shift, known = np.array([0, 0, 8, 0], dtype=np.float32), np.array([[1], [1], [0]], dtype=np.float32)
    return replace(
        whole, flow_bwd=field, true_flow_bwd=field, visible=field[:, 0] / 3, true_visible=field[:, 0] / 3,
        boxes=boxes + shift, presence=ones, true_boxes=boxes, true_presence=ones * known,
        collision=np.array([0.1, 0.6, 0.2], dtype=np.float32), true_collision=np.array([0, 1, 0], dtype=np.float32),
    )  # fmt: skip


def test_shared_windows_once_each_with_everybody(results: list[Evaluation]) -> None:
    kept = (example(4, "most motion", "first"), example(5, "median motion"), example(6, "best"))
    everyone = [replace(r, examples=kept) for r in results]
    found = shared(everyone)
    assert [(s.rule, s.place) for s in found] == [("most motion", (4, 8)), ("median motion", (5, 8))]
    assert list(found[0].examples) == list(NAMES)
    (film, _) = films(found, 12.5)
    assert [tile.label for tile in film.predictions] == list(NAMES)
    assert film.predictions[0].note == "skill 0.75"
    assert (film.observed, len(film.truth)) == (2, 5)


def test_the_best_ones_extremes_stand_beside_the_baselines_and_who_kept_them(results: list[Evaluation]) -> None:
    copy, advect, warp, blur = results
    everyone = [
        replace(copy, examples=(example(1, "best"),)),
        replace(advect, examples=(example(6, "median"),)),
        replace(warp, examples=(example(6, "best"), example(7, "median"))),
        replace(blur, examples=(example(6, "worst"),)),
    ]
    (shown,) = extremes(everyone, "warp", None)  # pyright: ignore[reportArgumentType]  # advect kept it itself
    assert shown.rule == "best window of warp"
    assert list(shown.examples) == list(NAMES)
    again = shown.examples["copy_last"]
    assert np.array_equal(again.prediction, np.repeat(again.context[-1:], 3, axis=0))
    assert 1 - again.mse.sum() / again.mse_copy.sum() == 0
    assert extremes(everyone, None, None) == ()  # pyright: ignore[reportArgumentType]
    assert "warp gains most and least" in films_note("warp")
    assert "gains" not in films_note(None)
    assert copied(everyone[2].examples[0]).video == 6


def test_the_same_window_is_shown_once_with_all_its_rules() -> None:
    a, b, c = (Shown(rule, {"warp": example(k)}) for rule, k in (("first", 1), ("best", 1), ("worst", 2)))
    assert [(s.rule, s.place) for s in together([a], [b, c])] == [("first, and best", (1, 8)), ("worst", (2, 8))]


def test_studies_show_who_has_the_head_and_nobody_else() -> None:
    window = Shown("most motion", {"copy_last": example(4), "warp": example(4, heads=True)})
    kinds: Any = {"copy_last": "baseline", "warp": "predictor"}
    flow, occlusion, objects = studies([window], kinds)
    assert [name for name, _ in flow.parts[0][0].rows] == ["true frame", "true flow", "warp"]
    said, true = (dict(flow.parts[0][0].rows)[name] for name in ("warp", "true flow"))
    assert all(np.array_equal(a, b) for a, b in zip(said, true, strict=True)), "one scale"
    assert [name for name, _ in occlusion.parts[0][0].rows] == ["truth", "warp"]
    table, (iou, collision) = objects.parts[0]
    assert table.labels == ("step 1", "step 2", "step 3")
    assert iou.curves[0].values == (pytest.approx(0.5), pytest.approx(0.5), None), "nothing is there at step 3"
    assert collision.events == (2,)
    assert collision.curves[0].values == pytest.approx((0.1, 0.6, 0.2))
    assert studies([Shown("first", {"copy_last": example(4)})], kinds) == ()


def test_collisions_come_first_among_boxes() -> None:
    windows = [Shown(rule, {"warp": example(k, heads=True)}) for k, rule in enumerate(("a", "b", "most collisions"))]
    objects = studies(windows, {"warp": "predictor"})[2]
    assert [table.title.split(":")[0] for table, _ in objects.parts] == ["most collisions", "a"]


def test_a_figure_that_is_not_there_is_left_out(results: list[Evaluation]) -> None:
    figures = report_figures(results, compared(results), (1,))
    assert all(math.isfinite(v) for name in NAMES for v in figures[name].values())
    assert "box_iou" not in figures["blur"]
